"""Into the database: prompts and ready-made items out of files, and whole projects out of exports.

A file of items has one JSON object a row (any kind of file that data/rows.py reads). All but what is asked may be left
out:

    {"messages": [{"role": "user", "content": "..."}]}               a prompt; also any format that read_prompts knows
    {"messages": [...], "responses": [{"text": "...", "model": "sft-v2"}, {"text": "..."}], "gold": [0]}
    {"question": "...", "choices": ["...", "..."], "gold": [1]}      of an entrance test
    {"instructions": "Write about ..."}                              the annotator writes the prompt

`gold` lists the right answers, `id` is the item's name: importing it again changes nothing.
"""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from argon2 import PasswordHasher
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from groundup.base.artifacts import open_artifact
from groundup.base.files import read_json, sha256_json
from groundup.base.records import Prompt, read_jsonl, to_json
from groundup.data.prompts import PromptReport, read_prompts
from groundup.data.rows import Row, is_row_file, read_rows
from groundup.feedback.accounts import Account
from groundup.feedback.clock import utc_now
from groundup.feedback.contents import STORED_ANSWERS, Gold, ItemContent, parse
from groundup.feedback.database import Database
from groundup.feedback.errors import Conflict, Invalid
from groundup.feedback.export import (
    ITEMS_FILE,
    PROJECT_FIELDS,
    PROJECT_FILE,
    SCHEMA_VERSION,
    SUBMISSIONS_FILE,
    UNNAMED,
)
from groundup.feedback.projects import NewItem, ProjectSettings
from groundup.feedback.tables import Assignment, Batch, Item, Project, Review, Submission, User

OPERATOR = Account(0, "command line", "", "admin", True)
"""Who acts at the machine itself, with the database's address at hand."""
_ITEM_KEYS = {"responses", "question", "choices", "instructions", "gold"}
"""By which a file of items is told from one of prompts."""
_OTHER_KEYS = {"id", "messages", "order_seed", "metadata"}
_LOOK_AHEAD_ROWS = 20
_MAX_ITEMS = 100_000
"""Of one file; what is larger than anybody can rate was not meant."""


def read_items(source: str | Path, report: PromptReport) -> list[NewItem]:
    """The items of a file, or of anything that `read_prompts` reads; what it cannot use is counted in `report`.

    Raises: UserError for a file of no known format, Invalid for a row that is no item.
    """
    path = Path(source)
    if _is_item_file(path):
        items = [_item(path.name, number, row) for number, row in islice(read_rows(path), _MAX_ITEMS + 1)]
        report.kept += len(items)
    else:
        items = [_item_of_prompt(prompt) for prompt in islice(read_prompts(source, report), _MAX_ITEMS + 1)]
    if len(items) > _MAX_ITEMS:
        raise Invalid(f"{source}: more than {_MAX_ITEMS} items", "import a part of them")
    return items


def _is_item_file(path: Path) -> bool:
    first = islice(read_rows(path), _LOOK_AHEAD_ROWS) if path.is_file() and is_row_file(path) else ()
    return any(_ITEM_KEYS & (row or {}).keys() for _, row in first)


def _item(file: str, number: int, row: Row) -> NewItem:
    try:
        if row is None:
            raise Invalid("not a JSON object")
        if unknown := sorted(row.keys() - _ITEM_KEYS - _OTHER_KEYS):
            raise Invalid(f"unknown key {unknown[0]!r}")
        gold = None if row.get("gold") is None else parse(Gold, {"answers": row["gold"]})
        content = parse(ItemContent, {key: row[key] for key in row.keys() - {"id", "gold"} if row[key] is not None})
        name = str(row.get("id") or _digest(content))
        if name.startswith(UNNAMED) or len(name) > 200:
            raise Invalid(f"id {name[:40]!r} begins with {UNNAMED!r} or is longer than 200 characters")
    except Invalid as error:
        raise Invalid(f"{file}:{number}: {error.message}", error.remedy) from None
    return NewItem(content, name, gold=gold)


def _item_of_prompt(prompt: Prompt) -> NewItem:
    metadata = {"id": prompt.id, "source": prompt.source, "criterion": prompt.criterion, **prompt.metadata}
    messages = [to_json(message) for message in prompt.messages]
    content = parse(ItemContent, {"messages": messages, "metadata": metadata})
    return NewItem(content, _digest(content))


def _digest(content: ItemContent) -> str:
    """The same for everything that asks the same."""
    return sha256_json(content.model_dump(mode="json", exclude={"metadata"}))[:32]


@dataclass(frozen=True)
class Imported:
    """What came out of an export."""

    project: str
    items: int
    submissions: int
    people: int
    """New accounts, inactive and without a password, that stand for the annotators."""


def import_export(database: Database, folder: Path, name: str | None = None) -> Imported:
    """Make the project of an export anew, with everything that was said; `name` instead of its own. It is closed.

    Raises: CorruptFile for an export whose files are not what its manifest says; Invalid for one of another version;
    Conflict where a project has that name.
    """
    artifact = open_artifact(folder, verify=True)
    settings = read_json(artifact.file(PROJECT_FILE))
    if settings.get("schema_version") != SCHEMA_VERSION:
        raise Invalid(f"{folder}: schema version {settings.get('schema_version')}, expected {SCHEMA_VERSION}")
    name = name or settings["name"]
    values = {field: settings[field] or None for field in ("guidelines", "system_prompt")}
    checked = parse(ProjectSettings, {**{field: settings[field] for field in PROJECT_FIELDS}, **values, "name": name})
    now = utc_now()
    with database.write() as session:
        if session.scalar(select(Project.id).where(Project.name == name)) is not None:
            raise Conflict(f"there is a project {name!r} already", "import it under another name with --name")
        project = Project(created_at=now, is_open=False, version=1, entrance_id=None)
        for field in PROJECT_FIELDS:
            setattr(project, field, getattr(checked, field) or settings[field])
        session.add(project)
        session.flush()
        batches = {row["number"]: Batch(project_id=project.id, created_at=now, **row) for row in settings["batches"]}
        session.add_all(batches.values())
        session.flush()
        asked = list(read_jsonl(artifact.file(ITEMS_FILE)))
        items = _import_items(session, project, batches, asked)
        rows = list(read_jsonl(artifact.file(SUBMISSIONS_FILE)))
        before = session.scalar(select(func.count()).select_from(User)) or 0
        people = _people(session, {row["annotator"] for row in rows}, now)
        after = session.scalar(select(func.count()).select_from(User)) or 0
        reviews = {
            row["id"]: (row["review_of"]["item"], row["review_of"]["annotator"]) for row in asked if row["review_of"]
        }
        _import_submissions(session, project, batches, items, people, rows, reviews)
    return Imported(name, len(items), len(rows), after - before)


def _import_items(
    session: Session, project: Project, batches: Mapping[int, Batch], rows: Iterable[Mapping[str, Any]]
) -> dict[str, Item]:
    items = {}
    for row in rows:
        parse(ItemContent, row["content"])
        item = Item(
            project_id=project.id, batch_id=batches[row["batch"]].id, external_id=row["id"],
            created_at=datetime.fromisoformat(row["created_at"]),
            **{key: row[key] for key in ("kind", "content", "overlap", "is_gold", "gold", "is_done")},
        )  # fmt: skip
        session.add(item)
        session.flush()  # one by one: their ids keep their order
        items[row["id"]] = item
    return items


def _people(session: Session, pseudonyms: Iterable[str], now: datetime) -> dict[str, int]:
    """Pseudonym -> id; who is not there gets an account that nobody can use."""
    nobodys_hash = PasswordHasher().hash(secrets.token_urlsafe())
    found = {}
    for pseudonym in sorted(pseudonyms):
        user = session.scalar(select(User).where(User.pseudonym == pseudonym))
        if user is None:
            user = User(
                name=f"imported-{secrets.token_hex(8)}", pseudonym=pseudonym, role="annotator", is_active=False,
                password_hash=nobodys_hash, created_at=now,
            )  # fmt: skip
            session.add(user)
            session.flush()
        found[pseudonym] = user.id
    return found


def _import_submissions(
    session: Session,
    project: Project,
    batches: Mapping[int, Batch],
    items: Mapping[str, Item],
    people: Mapping[str, int],
    rows: Sequence[Mapping[str, Any]],
    review_of: Mapping[str, tuple[str, str]],
) -> None:
    """Reviews last: they name the answers that they are about."""
    ids: dict[tuple[str, str], int] = {}
    for row in sorted(rows, key=lambda row: row["kind"] == "review"):
        answer = row["answer"]
        if row["kind"] == "review":
            target = review_of.get(row["item"])
            answer = {**answer, "submission_id": 0 if target is None else ids[target]}
        parse(STORED_ANSWERS[row["kind"]], answer)
        key = (row["item"], row["annotator"])
        ids[key] = _import_submission(session, project, batches, items[row["item"]], people, row, answer)
    session.add_all(
        Review(item_id=items[item].id, submission_id=ids[target]) for item, target in review_of.items()
    )  # fmt: skip


def _import_submission(
    session: Session,
    project: Project,
    batches: Mapping[int, Batch],
    item: Item,
    people: Mapping[str, int],
    row: Mapping[str, Any],
    answer: dict[str, Any],
) -> int:
    at, user_id = datetime.fromisoformat(row["created_at"]), people[row["annotator"]]
    assignment = Assignment(
        item_id=item.id, user_id=user_id, state="submitted", lease_expires_at=at, is_swapped=False, version=1,
        feedback="", started_at=at, seen_at=at, active_seconds=row["seconds"],
    )  # fmt: skip
    session.add(assignment)
    session.flush()
    submission = Submission(
        assignment_id=assignment.id, item_id=item.id, user_id=user_id, project_id=project.id,
        batch_id=batches[row["batch"]].id, kind=row["kind"], answer=answer,
        idempotency_key=f"import:{secrets.token_hex(24)}",
        request_sha256=sha256_json(answer), seconds=row["seconds"], gold_correct=row["gold_correct"],
        review_state=row["review_state"], created_at=at,
    )  # fmt: skip
    session.add(submission)
    session.flush()
    return submission.id
