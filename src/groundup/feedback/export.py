"""What people said, out of the database into artifacts that training reads: one snapshot, the same bytes each time.

An export is a folder with a manifest (base/artifacts.py). Every kind of project gives

    project.json        the project's settings and batches
    items.jsonl         everything that was asked
    submissions.jsonl   everything that was answered and stands, with pseudonyms

from which `importing.import_export` makes the same project in another database, whose export has the same id. On top
come, for preferences (kind `comparisons`), train.jsonl, held_out.jsonl and both as .parquet: one `Comparison` for each
judged turn; for SFT work (kind `dialogues`), dialogues.jsonl, held_out.jsonl and both as .parquet. Other projects are
of the kind `annotations`.

Choice: where several people judged one pair, each judgement is a comparison of its own. A reward model then learns how
sure people are together, and those who read the file can still take majorities: the rows share `metadata.item`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from groundup.align.judges import UNSAFE_WINNER
from groundup.base.artifacts import Artifact, new_artifact, open_artifact
from groundup.base.errors import UserError
from groundup.base.files import atomic_file, write_json
from groundup.base.records import Comparison, Dialogue, Message, Response, SafetyLabel, to_json, write_jsonl
from groundup.data.comparisons import HELD_OUT_FILE, TRAIN_FILE, check_comparison
from groundup.data.dialogues import DIALOGUES_FILE
from groundup.data.record_files import Malformed, opening, text_said
from groundup.data.splits import split_held_out
from groundup.feedback.contents import GivenResponse, JudgedPair, StoredPreference, StoredReview, StoredSft, Turn
from groundup.feedback.database import Database
from groundup.feedback.tables import Batch, Item, Project, Review, Submission, User

SCHEMA_VERSION = 1
PROJECT_FILE, ITEMS_FILE, SUBMISSIONS_FILE = "project.json", "items.jsonl", "submissions.jsonl"
UNNAMED = "#"
"""How items begin that have no name of their own."""
KINDS = {"preference": "comparisons", "sft": "dialogues"}
ANNOTATIONS = "annotations"
PROJECT_FIELDS = (
    "name", "kind", "criterion", "guidelines", "system_prompt", "overlap", "lease_seconds", "max_turns", "gold_share",
    "is_reviewed", "pass_mark",
)  # fmt: skip
UNDECIDED, GOLD, NOT_REVIEWED = "left undecided", "an answer to a gold item", "not approved by a reviewer (yet)"
"""Reasons why a standing answer is no row to train on."""
DEFAULT_HELD_OUT = 0.1


@dataclass(frozen=True)
class Snapshot:
    """A project as it was at one moment, in terms that another database understands: no ids of rows."""

    project: dict[str, Any]
    items: list[dict[str, Any]]
    submissions: list[dict[str, Any]]
    superseded: dict[str, int]
    """Answers that do not stand, by reason; they are counted and not exported."""


def export_project(
    database: Database, name: str, out: Path, *, held_out_fraction: float = DEFAULT_HELD_OUT, seed: int = 0
) -> Artifact:
    """Write a project's export as the folder `out`.

    `held_out_fraction` of what was asked is kept for testing; `seed` decides which, whoever exports, and however much
    has been added since.
    Raises: UserError for a project that is not there.
    """
    snapshot = read_snapshot(database, name)
    kind = KINDS.get(snapshot.project["kind"], ANNOTATIONS)
    command = ["groundup", "annotate", "export", "--project", name]  # sys.argv may hold the database's password
    manifest: dict[str, Any] = {
        "kind": kind,
        "argv": command,
        "config": {"project": name, "held_out_fraction": held_out_fraction, "seed": seed},
        "schema_version": SCHEMA_VERSION,
        "inputs": {},
    }
    with new_artifact(out, manifest) as folder:
        write_json(folder / PROJECT_FILE, snapshot.project)
        write_jsonl(folder / ITEMS_FILE, snapshot.items)
        write_jsonl(folder / SUBMISSIONS_FILE, snapshot.submissions)
        dropped: Counter[str] = Counter()
        counts: dict[str, int] = {}
        if kind == "comparisons":
            comparisons = list(comparisons_of(snapshot, dropped))
            parts = split_held_out(comparisons, held_out_fraction, seed, lambda c: text_said(c.prompt))
            for file, part in zip((TRAIN_FILE, HELD_OUT_FILE), parts):
                counts[file.removesuffix(".jsonl")] = _write_both(folder / file, part, COMPARISON_SCHEMA)
        elif kind == "dialogues":
            dialogues = list(dialogues_of(snapshot, dropped))
            split = split_held_out(dialogues, held_out_fraction, seed, lambda d: text_said(opening(d.messages)))
            for file, rows in zip((DIALOGUES_FILE, HELD_OUT_FILE), split):
                counts[file.removesuffix(".jsonl")] = _write_both(folder / file, rows, DIALOGUE_SCHEMA)
        manifest["metrics"] = {
            **counts, "dropped": dict(dropped), "items": len(snapshot.items),
            "submissions": len(snapshot.submissions), "superseded": snapshot.superseded,
        }  # fmt: skip
    return open_artifact(out)


def read_snapshot(database: Database, name: str) -> Snapshot:
    """A project as it is now. Raises: UserError for a name that no project has."""
    with database.read() as session:
        project = session.scalar(select(Project).where(Project.name == name))
        if project is None:
            names = ", ".join(session.scalars(select(Project.name).order_by(Project.name))) or "none"
            raise UserError(f"no project is called {name!r}", f"projects: {names}")
        batches = list(session.scalars(select(Batch).where(Batch.project_id == project.id).order_by(Batch.number)))
        numbers = {batch.id: batch.number for batch in batches}
        items = list(session.scalars(select(Item).where(Item.project_id == project.id).order_by(Item.id)))
        keys = {item.id: item_key(item) for item in items}
        rows = session.execute(
            select(Submission, User.pseudonym)
            .join(User, User.id == Submission.user_id)
            .where(Submission.project_id == project.id, Submission.superseded_at.is_(None))
            .order_by(Submission.item_id, Submission.created_at, User.pseudonym)
        ).all()
        whose = {
            submission.id: {"item": keys[submission.item_id], "annotator": pseudonym} for submission, pseudonym in rows
        }
        reviewed = {
            review.item_id: whose[review.submission_id]
            for review in session.scalars(select(Review).join(Item, Item.id == Review.item_id))
            if review.submission_id in whose
        }
        settings = {field: getattr(project, field) for field in PROJECT_FIELDS}
        labels = [{"number": batch.number, "label": batch.label, "is_open": batch.is_open} for batch in batches]
        return Snapshot(
            {"schema_version": SCHEMA_VERSION, **settings, "batches": labels},
            [_item_row(item, numbers[item.batch_id], reviewed.get(item.id)) for item in items],
            [_submission_row(submission, pseudonym, keys, numbers) for submission, pseudonym in rows],
            _superseded(session, project.id),
        )


def item_key(item: Item) -> str:
    """What an item is called outside this database."""
    return item.external_id or f"{UNNAMED}{item.id}"


def _item_row(item: Item, batch: int, review_of: dict[str, str] | None) -> dict[str, Any]:
    """`review_of`: the answer that a review is about; None also where that answer does not stand any more."""
    return {
        "id": item_key(item), "batch": batch, "kind": item.kind, "overlap": item.overlap, "is_gold": item.is_gold,
        "gold": item.gold, "is_done": item.is_done, "created_at": item.created_at.isoformat(), "review_of": review_of,
        "content": without_endpoint_ids(item.content),
    }  # fmt: skip


def _submission_row(
    submission: Submission, pseudonym: str, keys: Mapping[int, str], batches: Mapping[int, int]
) -> dict[str, Any]:
    answer = {key: value for key, value in submission.answer.items() if key != "submission_id"}
    return {
        "item": keys[submission.item_id], "annotator": pseudonym, "batch": batches[submission.batch_id],
        "kind": submission.kind, "created_at": submission.created_at.isoformat(), "seconds": submission.seconds,
        "gold_correct": submission.gold_correct, "review_state": submission.review_state,
        "answer": without_endpoint_ids(answer),
    }  # fmt: skip


def _superseded(session: Session, project_id: int) -> dict[str, int]:
    rows = session.execute(
        select(Submission.superseded_because, func.count())
        .where(Submission.project_id == project_id, Submission.superseded_at.is_not(None))
        .group_by(Submission.superseded_because)
    )
    return {str(reason): count for reason, count in rows}


def without_endpoint_ids(value: Any) -> Any:
    """JSON in which endpoints go by their models' names alone; ids mean nothing in another database."""
    if isinstance(value, dict):
        return {
            key: None if key == "endpoint_id" else without_endpoint_ids(child)
            for key, child in value.items()
        }  # fmt: skip
    return [without_endpoint_ids(child) for child in value] if isinstance(value, list) else value


def comparisons_of(snapshot: Snapshot, dropped: Counter[str]) -> Iterator[Comparison]:
    """Every judged turn from which something can be learned; the others are counted by reason."""
    gold = {item["id"] for item in snapshot.items if item["is_gold"]}
    prompt_ids = {item["id"]: str(item["content"].get("metadata", {}).get("id", "")) for item in snapshot.items}
    for row in snapshot.submissions:
        if row["item"] in gold:
            dropped[GOLD] += 1
            continue
        for number, pair in enumerate(StoredPreference.model_validate(row["answer"]).turns, 1):
            try:
                comparison = _comparison(snapshot.project, row, number, pair, prompt_ids[row["item"]])
                check_comparison(comparison)
            except Malformed as error:
                dropped[str(error)] += 1
                continue
            yield comparison


def _comparison(
    project: Mapping[str, Any], row: Mapping[str, Any], number: int, pair: JudgedPair, prompt_id: str
) -> Comparison:
    if pair.winner is None:
        raise Malformed(UNDECIDED)
    chosen, rejected = pair.responses[pair.winner], pair.responses[1 - pair.winner]
    return Comparison(
        _messages(pair.messages), _response(chosen), _response(rejected), project["criterion"], pair.rating,
        safety_label(pair), row["batch"], annotator=row["annotator"],
        id=f"{project['name']}/{row['item']}/{row['annotator']}/{number}", source=project["name"],
        metadata={
            "schema_version": SCHEMA_VERSION,
            "item": row["item"],
            "turn": number,
            "prompt_id": prompt_id,
            "shown_first": "chosen" if pair.shown_first == pair.winner else "rejected",
            "reason": pair.reason,
            "created_at": row["created_at"],
            "seconds": row["seconds"],
            "revisions": [chosen.revision, rejected.revision],
            "ended": [_ended(chosen), _ended(rejected)],
            "prompt_token_ids": chosen.prompt_token_ids,
            "chosen_token_ids": chosen.token_ids,
            "rejected_token_ids": rejected.token_ids,
        },
    )  # fmt: skip


def safety_label(pair: JudgedPair) -> SafetyLabel | None:
    """The bin of section 3.2.1. Raises: Malformed for an unsafe winner over a safe loser; such pairs are discarded."""
    if pair.is_safe is None or pair.winner is None:
        return None
    if any(pair.is_safe) and not pair.is_safe[pair.winner]:
        raise Malformed(UNSAFE_WINNER)
    return "both safe" if all(pair.is_safe) else "chosen safe" if any(pair.is_safe) else "both unsafe"


def _response(given: GivenResponse) -> Response:
    return Response(given.text, given.model, given.temperature)


def _ended(given: GivenResponse) -> bool | None:
    return None if given.finish_reason is None else given.finish_reason == "stop"


def _messages(turns: Iterable[Turn]) -> tuple[Message, ...]:
    return tuple(Message(turn.role, turn.content) for turn in turns)


def dialogues_of(snapshot: Snapshot, dropped: Counter[str]) -> Iterator[Dialogue]:
    """Every SFT answer that counts, as its reviewer left it; the others are counted by reason."""
    review_of = {item["id"]: item["review_of"] for item in snapshot.items}
    reviews = {
        (target["item"], target["annotator"]): StoredReview.model_validate({"submission_id": 0, **row["answer"]})
        for row in snapshot.submissions
        if row["kind"] == "review" and (target := review_of[row["item"]]) is not None
    }
    for row in snapshot.submissions:
        if row["kind"] != "sft":
            continue
        if row["review_state"] in ("pending", "rejected"):
            dropped[NOT_REVIEWED] += 1
            continue
        key = (row["item"], row["annotator"])
        said: StoredSft | StoredReview = StoredSft.model_validate(row["answer"])
        if row["review_state"] == "edited":
            said = reviews[key]
        yield Dialogue(
            (*_messages(said.messages), Message("assistant", said.response)),
            id=f"{snapshot.project['name']}/{row['item']}/{row['annotator']}",
            source=snapshot.project["name"],
            metadata={
                "schema_version": SCHEMA_VERSION,
                "item": row["item"],
                "annotator": row["annotator"],
                "batch": row["batch"],
                "criterion": snapshot.project["criterion"],
                "review": row["review_state"],
                "created_at": row["created_at"],
                "seconds": row["seconds"],
            },
        )


_STRINGS = pa.list_(pa.string())
_IDS = pa.list_(pa.int32())
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_RESPONSE = pa.struct([("text", pa.string()), ("model", pa.string()), ("temperature", pa.float64())])
COMPARISON_SCHEMA = pa.schema(
    {
        "prompt": _MESSAGES, "chosen": _RESPONSE, "rejected": _RESPONSE, "criterion": pa.string(),
        "rating": pa.string(), "safety": pa.string(), "batch": pa.int32(), "annotator": pa.string(),
        "id": pa.string(), "source": pa.string(),
        "metadata": pa.struct(
            [
                ("schema_version", pa.int32()), ("item", pa.string()), ("turn", pa.int32()),
                ("prompt_id", pa.string()), ("shown_first", pa.string()), ("reason", pa.string()),
                ("created_at", pa.string()), ("seconds", pa.float64()), ("revisions", _STRINGS),
                ("ended", pa.list_(pa.bool_())), ("prompt_token_ids", _IDS), ("chosen_token_ids", _IDS),
                ("rejected_token_ids", _IDS),
            ]
        ),
    }
)  # fmt: skip
DIALOGUE_SCHEMA = pa.schema(
    {
        "messages": _MESSAGES, "id": pa.string(), "source": pa.string(),
        "metadata": pa.struct(
            [
                ("schema_version", pa.int32()), ("item", pa.string()), ("annotator", pa.string()),
                ("batch", pa.int32()), ("criterion", pa.string()), ("review", pa.string()),
                ("created_at", pa.string()), ("seconds", pa.float64()),
            ]
        ),
    }
)  # fmt: skip


def _write_both(path: Path, records: Sequence[Comparison | Dialogue], schema: Any) -> int:
    """The same rows as JSON lines and as Parquet; returns how many."""
    rows = [to_json(record) for record in records]
    write_jsonl(path, rows)
    with atomic_file(path.with_suffix(".parquet")) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary)
    return len(rows)
