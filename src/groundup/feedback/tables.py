"""The tables of the annotation application.

    users ── invitations, login_sessions, login_failures
    endpoints ── project_endpoints ── projects ── batches ── items ── assignments ── turns
                                                                          └── submissions ── reviews

An item is asked `overlap` times, an assignment is one person's place at it (a lease, then done), a submission is what
that person said. Submissions are never deleted, nor their answers changed: an undone or rejected one is superseded. A
quality review is itself an item, whose row in `reviews` names the submission that it judges.

What an item asks (`Item.content`), what people answer (`Submission.answer`) and what is right (`Item.gold`) are JSON
whose form `contents.py` holds and checks. A change here needs a migration in `migrations/versions`.
"""

import enum
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal

from sqlalchemy import (
    JSON,
    DateTime,
    Dialect,
    Enum,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from groundup.base.records import Criterion

Role = Literal["admin", "reviewer", "annotator"]
ProjectKind = Literal["preference", "sft", "comparison", "redteam", "entrance"]
ItemKind = Literal["preference", "sft", "comparison", "redteam", "entrance", "review"]
AssignmentState = Literal["leased", "submitted", "skipped"]
ReviewState = Literal["pending", "approved", "edited", "rejected"]
SupersededBecause = Literal["undone", "rejected"]


class UtcTime(TypeDecorator[datetime]):
    """Times with their zone in Python, UTC in the database; SQLite itself knows no zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        assert value is None or value.tzinfo is not None, "a time without its zone"
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Table(DeclarativeBase):
    """Base of all tables. Constraints are named, so that migrations can name them too."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {
        datetime: UtcTime,
        dict[str, Any]: JSON(none_as_null=True),
        list[Any]: JSON(none_as_null=True),
        Literal: Enum(enum.Enum, native_enum=False, length=24),  # checked in Python; a new word needs no migration
    }

    id: Mapped[int] = mapped_column(primary_key=True, sort_order=-1)


class User(Table):
    """A person. Nobody is ever deleted, for their work is kept; who left is inactive."""

    __tablename__ = "users"

    name: Mapped[str] = mapped_column(String(64), unique=True)
    """What they sign in with: normalised and lower-case."""
    pseudonym: Mapped[str] = mapped_column(String(32), unique=True)
    """What exports call them."""
    role: Mapped[Role]
    password_hash: Mapped[str] = mapped_column(String(256))
    is_active: Mapped[bool] = mapped_column(default=True)
    created_at: Mapped[datetime]


class Invitation(Table):
    """A one-time link that makes an account, or sets a new password for the account `user_id`."""

    __tablename__ = "invitations"

    token_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    role: Mapped[Role]
    note: Mapped[str] = mapped_column(String(200), default="")
    user_id: Mapped[int | None] = mapped_column(ForeignKey("users.id"))
    created_by: Mapped[int | None] = mapped_column(ForeignKey("users.id"))
    """None: the first administrator's link, which the program itself prints."""
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class LoginSession(Table):
    """A browser that is signed in; only the hash of its token is here."""

    __tablename__ = "login_sessions"

    token_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), index=True)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]


class LoginFailure(Table):
    """An attempt to sign in that has not succeeded; kept as long as it slows the next one."""

    __tablename__ = "login_failures"

    name: Mapped[str] = mapped_column(String(64), index=True)
    address: Mapped[str] = mapped_column(String(64), index=True)
    at: Mapped[datetime]


class Endpoint(Table):
    """A model behind an OpenAI-compatible API. Only administrators set addresses, and no others are ever fetched."""

    __tablename__ = "endpoints"

    name: Mapped[str] = mapped_column(String(100), unique=True)
    """What administrators and exports call it; annotators never see it."""
    base_url: Mapped[str] = mapped_column(String(500))
    model: Mapped[str] = mapped_column(String(200))
    revision: Mapped[str] = mapped_column(String(200), default="")
    """Which weights: an artifact's id or a hash, for the exports."""
    api_key: Mapped[str] = mapped_column(String(500), default="")
    """Sent to `base_url` alone; never shown again."""
    min_temperature: Mapped[float] = mapped_column(default=0.7)
    max_temperature: Mapped[float] = mapped_column(default=1.0)
    max_new_tokens: Mapped[int] = mapped_column(default=512)
    is_active: Mapped[bool] = mapped_column(default=True)
    created_at: Mapped[datetime]


class Project(Table):
    """Work of one kind under one set of guidelines."""

    __tablename__ = "projects"

    name: Mapped[str] = mapped_column(String(100), unique=True)
    kind: Mapped[ProjectKind]
    criterion: Mapped[Criterion] = mapped_column(default="helpfulness")
    guidelines: Mapped[str] = mapped_column(Text, default="")
    """Markdown."""
    system_prompt: Mapped[str] = mapped_column(Text, default="")
    overlap: Mapped[int] = mapped_column(default=1)
    """How many people rate an item, unless the item says otherwise."""
    lease_seconds: Mapped[int] = mapped_column(default=1800)
    max_turns: Mapped[int] = mapped_column(default=8)
    """Of a dialogue (preference and red-team work)."""
    gold_share: Mapped[float] = mapped_column(default=0.0)
    """Of the items a person gets, the share drawn from the gold items as long as there are some left."""
    is_reviewed: Mapped[bool] = mapped_column(default=False)
    """Whether SFT answers are quality-reviewed before they count."""
    pass_mark: Mapped[float] = mapped_column(default=0.8)
    """Of an entrance test: the share of right answers."""
    entrance_id: Mapped[int | None] = mapped_column(ForeignKey("projects.id"))
    """The entrance test that people must have passed to work here."""
    is_open: Mapped[bool] = mapped_column(default=True)
    version: Mapped[int] = mapped_column(default=1)
    created_at: Mapped[datetime]


class ProjectEndpoint(Table):
    """A model variant that answers in a project."""

    __tablename__ = "project_endpoints"
    __table_args__ = (UniqueConstraint("project_id", "endpoint_id"),)

    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"))
    endpoint_id: Mapped[int] = mapped_column(ForeignKey("endpoints.id"))


class Batch(Table):
    """A round of collection in a project, usually a week's."""

    __tablename__ = "batches"
    __table_args__ = (UniqueConstraint("project_id", "number"),)

    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"))
    number: Mapped[int]
    """From 1; what exports call the batch."""
    label: Mapped[str] = mapped_column(String(100))
    is_open: Mapped[bool] = mapped_column(default=True)
    created_at: Mapped[datetime]


class Item(Table):
    """One thing to be done, by `overlap` people; items are given out in the order of their ids."""

    __tablename__ = "items"
    __table_args__ = (
        UniqueConstraint("project_id", "external_id"),
        Index("ix_items_open", "project_id", "kind", "is_done", "is_gold"),
    )

    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"))
    batch_id: Mapped[int] = mapped_column(ForeignKey("batches.id"), index=True)
    kind: Mapped[ItemKind]
    """The project's kind, or "review"."""
    external_id: Mapped[str | None] = mapped_column(String(200))
    """Its name where it came from; importing it again changes nothing."""
    content: Mapped[dict[str, Any]]
    """`contents.ItemContent`."""
    overlap: Mapped[int | None]
    """None: everybody's (entrance tests and gold items)."""
    is_gold: Mapped[bool] = mapped_column(default=False)
    gold: Mapped[dict[str, Any] | None]
    """What is right, of gold items and of entrance questions (`contents.Gold`); no page ever shows it."""
    is_done: Mapped[bool] = mapped_column(default=False)
    """Whether `overlap` people have submitted it, or it was withdrawn; kept with every submission."""
    created_at: Mapped[datetime]


class Assignment(Table):
    """One person's place at an item; there is never a second one."""

    __tablename__ = "assignments"
    __table_args__ = (
        UniqueConstraint("item_id", "user_id"),
        Index("ix_assignments_user_state", "user_id", "state"),
    )

    item_id: Mapped[int] = mapped_column(ForeignKey("items.id"))
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    state: Mapped[AssignmentState]
    lease_expires_at: Mapped[datetime]
    """From then on others may take the place; who still has it in time may go on."""
    is_swapped: Mapped[bool]
    """Whether responses[1] of the item is shown first."""
    version: Mapped[int] = mapped_column(default=1)
    """Raised by everything this person saves at the item; what was saved over an older version is refused."""
    draft: Mapped[dict[str, Any] | None]
    """The form as its page left it, in the page's own terms."""
    feedback: Mapped[str] = mapped_column(Text, default="")
    """Why a reviewer sent the answer back, or why the person skipped the item."""
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]
    active_seconds: Mapped[float] = mapped_column(default=0.0)
    """Time at the item, breaks left out; measured by the server."""


class Turn(Table):
    """One exchange with the models within an assignment: a prompt, one or two responses, and what was said of them."""

    __tablename__ = "turns"
    __table_args__ = (UniqueConstraint("assignment_id", "number"),)

    assignment_id: Mapped[int] = mapped_column(ForeignKey("assignments.id"))
    number: Mapped[int]
    """From 1."""
    prompt: Mapped[str] = mapped_column(Text)
    plan: Mapped[list[Any]]
    """`contents.Planned` of each response; its seeds are new whenever the prompt of an unanswered turn is."""
    responses: Mapped[list[Any] | None]
    """`contents.GivenResponse` of each, in the plan's order; None: not generated yet."""
    is_swapped: Mapped[bool]
    """Whether responses[1] is shown first."""
    judgement: Mapped[dict[str, Any] | None]
    """`contents.PairJudgement` about `responses` (not about the order shown), or `contents.RiskLabel`."""
    created_at: Mapped[datetime]
    judged_at: Mapped[datetime | None]


class Submission(Table):
    """What a person said about an item; one that is not superseded counts."""

    __tablename__ = "submissions"
    __table_args__ = (
        UniqueConstraint("user_id", "idempotency_key"),
        Index("ix_submissions_project_time", "project_id", "created_at"),
        Index(
            "uq_submissions_standing",
            "item_id",
            "user_id",
            unique=True,
            sqlite_where=text("superseded_at IS NULL"),
            postgresql_where=text("superseded_at IS NULL"),
        ),
    )

    assignment_id: Mapped[int] = mapped_column(ForeignKey("assignments.id"), index=True)
    item_id: Mapped[int] = mapped_column(ForeignKey("items.id"))
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"))
    batch_id: Mapped[int] = mapped_column(ForeignKey("batches.id"), index=True)
    kind: Mapped[ItemKind]
    answer: Mapped[dict[str, Any]]
    """`contents.STORED_ANSWERS[kind]`: complete in itself, about the item's own order of responses."""
    idempotency_key: Mapped[str] = mapped_column(String(64))
    request_sha256: Mapped[str] = mapped_column(String(64))
    """Of what was sent under the key: the same key never stands for two answers."""
    seconds: Mapped[float]
    """Time at the item, breaks left out."""
    gold_correct: Mapped[bool | None]
    """None: not a gold item."""
    review_state: Mapped[ReviewState | None]
    """None: needs no review."""
    created_at: Mapped[datetime]
    superseded_at: Mapped[datetime | None]
    superseded_because: Mapped[SupersededBecause | None]


class Review(Table):
    """Which submission a review item is about."""

    __tablename__ = "reviews"

    item_id: Mapped[int] = mapped_column(ForeignKey("items.id"), unique=True)
    submission_id: Mapped[int] = mapped_column(ForeignKey("submissions.id"), unique=True)
