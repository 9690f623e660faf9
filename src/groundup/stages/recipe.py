"""A recipe: the values of one run, one section for each stage that is to run."""

from pathlib import Path

from pydantic import Field, model_validator

from groundup.base.config import Config, apply_overrides, load_yaml, parse_config
from groundup.stages.curate import CurateConfig
from groundup.stages.import_model import ImportConfig
from groundup.stages.pretrain import PretrainConfig
from groundup.stages.report import ReportConfig
from groundup.stages.sft import SFTConfig
from groundup.stages.shards import ShardsConfig
from groundup.stages.tokenizer import TokenizerConfig


class Recipe(Config):
    """All keys a recipe may have. A stage whose section is absent does not run.

    Choice: relative paths in a recipe are relative to the current directory, as on any command line, so that an
    override means what it says where it is typed.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run: its artifacts lie in runs/NAME unless --out says otherwise."""
    description: str = ""
    seed: int = 0
    """Every stage derives its own seed from it."""
    curate: CurateConfig | None = None
    tokenizer: TokenizerConfig | None = None
    shards: ShardsConfig | None = None
    pretrain: PretrainConfig | None = None
    import_: ImportConfig | None = Field(None, alias="import")
    sft_v1: SFTConfig | None = None
    sft_v2: SFTConfig | None = None
    report: ReportConfig | None = None

    @model_validator(mode="after")
    def _one_origin_of_the_base_model(self) -> "Recipe":
        if self.pretrain is not None and self.import_ is not None:
            raise ValueError("pretrain and import both make the base model; keep one of the two sections")
        return self


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """The recipe in a YAML file, with overrides such as "pretrain.steps=100" applied."""
    return parse_config(Recipe, apply_overrides(load_yaml(path), overrides), str(path))


def default_out(recipe: Recipe) -> Path:
    """Where a run's artifacts lie when the user names no folder."""
    return Path("runs") / recipe.name
