"""What is to be done: projects, batches, items, and the models that answer. Changing it is for administrators."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from sqlalchemy import delete, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from groundup.base.config import Config
from groundup.base.records import Criterion
from groundup.feedback.accounts import Account, require_admin
from groundup.feedback.clock import Clock, utc_now
from groundup.feedback.contents import Gold, ItemContent, Name, Text, parse
from groundup.feedback.database import Database, find
from groundup.feedback.errors import Conflict, Invalid, NotFound
from groundup.feedback.tables import Batch, Endpoint, Item, Project, ProjectEndpoint, ProjectKind

MAX_OVERLAP, MAX_EXTERNAL_ID = 100, 200


class ProjectSettings(Config):
    """What an administrator sets at a project."""

    name: Name = Field(description="what people see")
    kind: ProjectKind = Field(description="the type of work; fixed once there is a project")
    criterion: Criterion = Field("helpfulness", description="what preferences are about")
    guidelines: Text | None = Field(None, description="Markdown, shown beside the work")
    system_prompt: Text | None = Field(None, description="the models' system message")
    overlap: int = Field(1, ge=1, le=MAX_OVERLAP, description="how many people rate an item")
    lease_seconds: int = Field(1800, ge=30, le=7 * 24 * 3600, description="how long an idle person keeps an item")
    max_turns: int = Field(8, ge=1, le=50, description="of a dialogue")
    gold_share: float = Field(0.0, ge=0, le=1, description="share of the items that are gold items")
    is_reviewed: bool = Field(False, description="SFT answers count after a quality review only")
    pass_mark: float = Field(0.8, gt=0, le=1, description="of an entrance test: share of right answers")
    entrance_id: int | None = Field(None, description="the entrance test to be passed first")
    endpoint_ids: list[int] = Field([], description="the model variants that answer")
    is_open: bool = Field(True, description="whether it gives out work")


class EndpointSettings(Config):
    """What an administrator sets at a model's address."""

    name: Name = Field(description="what administrators call it")
    base_url: str = Field(max_length=500, description="of an OpenAI-compatible API, e.g. http://127.0.0.1:8000/v1")
    model: Name = Field(description="name of the model there")
    revision: str = Field("", max_length=200, description="which weights: an artifact's id or a hash, for exports")
    api_key: str = Field("", max_length=500, description="sent to base_url alone", repr=False)
    min_temperature: float = Field(0.7, ge=0, le=2)
    max_temperature: float = Field(1.0, ge=0, le=2)
    max_new_tokens: int = Field(512, ge=1, le=32768)
    is_active: bool = Field(True, description="whether it is asked at all")

    @field_validator("base_url")
    @classmethod
    def _address(cls, value: str) -> str:
        parts = urlsplit(value.strip())
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("it is an address such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password:
            raise ValueError("it holds a name or a password; a key goes into api_key")
        return value.strip().rstrip("/")

    @field_validator("api_key")
    @classmethod
    def _header(cls, value: str) -> str:
        if value and not (value.isascii() and value.isprintable() and " " not in value):
            raise ValueError("it has characters that no HTTP header can carry")
        return value

    @model_validator(mode="after")
    def _range(self) -> "EndpointSettings":
        if self.min_temperature > self.max_temperature:
            raise ValueError("min_temperature is above max_temperature")
        return self


@dataclass(frozen=True)
class NewItem:
    """An item to be added."""

    content: ItemContent = field(default_factory=ItemContent)
    external_id: str | None = None
    overlap: int | None = None
    """None: the project's."""
    gold: Gold | None = None
    """Given: a gold item (in an entrance test: the right answer), which everybody gets."""


@dataclass(frozen=True)
class Added:
    """What came of adding items: the others were there already, by their external ids."""

    added: int
    already_there: int


class Projects:
    """Every method is one transaction; what takes `by` refuses who is no administrator. Rows come back detached."""

    def __init__(self, database: Database, clock: Clock = utc_now) -> None:
        self._database = database
        self._clock = clock

    def create_project(self, by: Account, **values: Any) -> Project:
        """A new project. `values`: fields of `ProjectSettings`. Raises: Invalid, Conflict (name taken)."""
        require_admin(by)
        settings = parse(ProjectSettings, values)
        with self._database.write() as session:
            project = Project(created_at=self._clock(), version=1)
            _set_project(session, project, settings)
            return project

    def change_project(self, by: Account, project_id: int, version: int, **values: Any) -> Project:
        """Set some fields. Raises: Invalid; Conflict if `version` is not the project's any more (If-Match)."""
        require_admin(by)
        with self._database.write() as session:
            project = _project(session, project_id)
            session.refresh(project, with_for_update=True)
            if project.version != version:
                raise Conflict("somebody else has changed this project meanwhile", "load the page again")
            if values.get("kind", project.kind) != project.kind:
                raise Invalid("the type of a project's work is fixed", "make another project")
            now = {name: getattr(project, name) for name in ProjectSettings.model_fields if name != "endpoint_ids"}
            now |= {"guidelines": project.guidelines or None, "system_prompt": project.system_prompt or None}
            now["endpoint_ids"] = [endpoint.id for endpoint in _endpoints(session, project.id)]
            _set_project(session, project, parse(ProjectSettings, now | values))
            project.version += 1
            return project

    def project(self, project_id: int) -> Project:
        """Raises: NotFound."""
        with self._database.read() as session:
            return _project(session, project_id)

    def projects(self) -> list[Project]:
        """All of them, by name."""
        with self._database.read() as session:
            return list(session.scalars(select(Project).order_by(Project.name)))

    def endpoints_of(self, project_id: int) -> list[Endpoint]:
        """The models that answer in a project; with their keys, so never for a page."""
        with self._database.read() as session:
            return _endpoints(session, _project(session, project_id).id)

    def open_batch(self, by: Account, project_id: int, label: str | None = None) -> Batch:
        """The next batch; it is called after the week ("2026-W31") unless told otherwise."""
        require_admin(by)
        now = self._clock()
        with self._database.write() as session:
            session.refresh(_project(session, project_id), with_for_update=True)
            last = session.scalar(select(func.max(Batch.number)).where(Batch.project_id == project_id))
            batch = Batch(
                project_id=project_id,
                number=(last or 0) + 1,
                label=(label or f"{now:%G-W%V}")[:100],
                is_open=True,
                created_at=now,
            )
            session.add(batch)
            session.flush()
            return batch

    def set_batch_open(self, by: Account, batch_id: int, is_open: bool) -> Batch:
        """A closed batch gives out no items; what is leased may still be submitted."""
        require_admin(by)
        with self._database.write() as session:
            batch = _batch(session, batch_id)
            batch.is_open = is_open
            return batch

    def batches(self, project_id: int) -> list[Batch]:
        """A project's, by number."""
        with self._database.read() as session:
            project = _project(session, project_id)
            return list(session.scalars(select(Batch).where(Batch.project_id == project.id).order_by(Batch.number)))

    def add_items(self, by: Account, batch_id: int, items: Sequence[NewItem]) -> Added:
        """Append items. For dialogues that annotators start themselves: as many empty `NewItem()` as are wanted.

        Raises: Invalid for an item that does not fit the project's kind; then none is added.
        """
        require_admin(by)
        with self._database.write() as session:
            batch = _batch(session, batch_id)
            project = session.get_one(Project, batch.project_id, with_for_update=True)
            there = set(session.scalars(select(Item.external_id).where(Item.project_id == project.id)))
            there.discard(None)
            added = 0
            for number, new in enumerate(items, 1):
                _check_fit(project.kind, new, number)
                if new.external_id in there:
                    continue
                if new.external_id is not None:
                    there.add(new.external_id)
                session.add(_item(project, batch, new, self._clock()))
                added += 1
            return Added(added, len(items) - added)

    def create_endpoint(self, by: Account, **values: Any) -> Endpoint:
        """A model that answers. `values`: fields of `EndpointSettings`. Raises: Invalid, Conflict (name taken)."""
        require_admin(by)
        settings = parse(EndpointSettings, values)
        with self._database.write() as session:
            endpoint = Endpoint(created_at=self._clock(), **settings.model_dump())
            session.add(endpoint)
            _flush_named(session, settings.name)
            return endpoint

    def change_endpoint(self, by: Account, endpoint_id: int, **values: Any) -> Endpoint:
        """Set some fields; an `api_key` that is left out stays, unless the address changes.

        Why: whoever may change an address must not be able to have the old key sent to it.
        """
        require_admin(by)
        with self._database.write() as session:
            endpoint = find(session, Endpoint, endpoint_id)
            if endpoint is None:
                raise NotFound("there is no such model")
            now = {name: getattr(endpoint, name) for name in EndpointSettings.model_fields}
            settings = parse(EndpointSettings, now | values)
            if settings.base_url != endpoint.base_url and "api_key" not in values:
                settings = settings.model_copy(update={"api_key": ""})
            for name, value in settings.model_dump().items():
                setattr(endpoint, name, value)
            _flush_named(session, settings.name)
            return endpoint

    def endpoints(self, by: Account) -> list[Endpoint]:
        """All of them, by name."""
        require_admin(by)
        with self._database.read() as session:
            return list(session.scalars(select(Endpoint).order_by(Endpoint.name)))


def _set_project(session: Session, project: Project, settings: ProjectSettings) -> None:
    if settings.entrance_id is not None:
        entrance = find(session, Project, settings.entrance_id)
        if entrance is None or entrance.kind != "entrance" or settings.kind == "entrance":
            raise Invalid("entrance_id is not an entrance test for this project", "choose one of the entrance tests")
    for name, value in settings.model_dump(exclude={"endpoint_ids"}).items():
        setattr(project, name, "" if value is None and name != "entrance_id" else value)
    session.add(project)
    _flush_named(session, settings.name)
    known = set(session.scalars(select(Endpoint.id)))
    if unknown := set(settings.endpoint_ids) - known:
        raise Invalid(f"endpoint_ids: there is no model {min(unknown)}")
    session.execute(delete(ProjectEndpoint).where(ProjectEndpoint.project_id == project.id))
    session.add_all(
        ProjectEndpoint(project_id=project.id, endpoint_id=endpoint_id) for endpoint_id in set(settings.endpoint_ids)
    )


def _flush_named(session: Session, name: str) -> None:
    try:
        session.flush()
    except IntegrityError:
        raise Conflict(f"the name {name!r} is taken", "choose another one") from None


def _endpoints(session: Session, project_id: int) -> list[Endpoint]:
    return list(
        session.scalars(
            select(Endpoint)
            .join(ProjectEndpoint, ProjectEndpoint.endpoint_id == Endpoint.id)
            .where(ProjectEndpoint.project_id == project_id)
            .order_by(Endpoint.id)
        )
    )


def _project(session: Session, project_id: int) -> Project:
    project = find(session, Project, project_id)
    if project is None:
        raise NotFound("there is no such project")
    return project


def _batch(session: Session, batch_id: int) -> Batch:
    batch = find(session, Batch, batch_id)
    if batch is None:
        raise NotFound("there is no such batch")
    return batch


def _check_fit(kind: ProjectKind, new: NewItem, number: int) -> None:
    content, where = new.content, f"item {number}"
    if new.overlap is not None and not 1 <= new.overlap <= MAX_OVERLAP:
        raise Invalid(f"{where}: overlap is 1 to {MAX_OVERLAP}")
    if new.external_id is not None and not 0 < len(new.external_id) <= MAX_EXTERNAL_ID:
        raise Invalid(f"{where}: its id has 1 to {MAX_EXTERNAL_ID} characters")
    if kind == "entrance":
        if not content.question or len(content.choices) < 2 or new.gold is None:
            raise Invalid(f"{where}: an entrance question has a question, two choices or more, and what is right")
        if not all(0 <= answer < len(content.choices) for answer in new.gold.answers):
            raise Invalid(f"{where}: what is right is the index of a choice, from 0")
        return
    if content.messages and content.messages[-1].role != "user":
        raise Invalid(f"{where}: the dialogue ends with the user")
    if content.responses is not None and (kind not in ("preference", "comparison") or not content.messages):
        raise Invalid(f"{where}: two responses go with a dialogue in preference or comparison projects")
    if kind == "comparison" and not content.messages:
        raise Invalid(f"{where}: models are compared on a given prompt")
    if new.gold is not None and (content.responses is None or not set(new.gold.answers) <= {0, 1}):
        raise Invalid(f"{where}: a gold item has two responses, and 0 or 1 for which is better")


def _item(project: Project, batch: Batch, new: NewItem, now: Any) -> Item:
    is_everybodys = new.gold is not None
    return Item(
        project_id=project.id,
        batch_id=batch.id,
        kind=project.kind,
        external_id=new.external_id,
        content=new.content.model_dump(mode="json", exclude_defaults=True),
        overlap=None if is_everybodys else new.overlap or project.overlap,
        is_gold=is_everybodys and project.kind != "entrance",
        gold=None if new.gold is None else new.gold.model_dump(),
        is_done=False,
        created_at=now,
    )
