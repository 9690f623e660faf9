"""Settings of `groundup annotate`."""

from pathlib import Path

from pydantic import Field

from groundup.base.config import Config


class AnnotateConfig(Config):
    """Where the application listens, and where it keeps what people say."""

    database: str = Field(
        default="annotations.sqlite",
        description="a file (SQLite), sqlite:///FILE, or postgresql://USER:PASSWORD@HOST/NAME for a team",
    )
    host: str = Field(default="127.0.0.1", description="address to listen at")
    port: int = Field(default=8080, ge=0, le=65535, description="0: a free one")
    hosts: list[str] = Field(
        default=[], description="names under which browsers may reach it, besides the address itself"
    )
    secure_cookies: bool = Field(
        default=False, description="set where browsers come by HTTPS: cookies then never go without"
    )
    session_hours: float = Field(default=12, gt=0, le=24 * 30, description="after this long people sign in again")
    invitation_hours: float = Field(default=72, gt=0, le=24 * 30, description="after this long an invitation is void")
    handover_overlap: int = Field(
        default=1, ge=1, le=100, description="how many people rate a comparison that a run waits for"
    )

    @property
    def database_url(self) -> str:
        """`database` as a URL."""
        return self.database if "://" in self.database else f"sqlite:///{Path(self.database).expanduser().resolve()}"
