"""Single items and answers, for administrators' eyes: what was asked, who said what, with the models' names."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select

from groundup.feedback.database import Database
from groundup.feedback.errors import NotFound
from groundup.feedback.export import item_key
from groundup.feedback.tables import Batch, Item, ItemKind, Submission, User

PAGE_ITEMS = 50
EXCERPT_CHARACTERS = 140


@dataclass(frozen=True)
class ItemLine:
    """An item in a list."""

    id: int
    key: str
    kind: ItemKind
    batch: int
    excerpt: str
    is_gold: bool
    is_done: bool
    overlap: int | None
    submissions: int


@dataclass(frozen=True)
class ShownAnswer:
    """A submission; `answer` is of the item's form in contents.STORED_ANSWERS."""

    annotator: str
    at: datetime
    seconds: float
    is_right: bool | None
    state: str
    """ "counts", or why it does not, or its review's."""
    answer: dict[str, Any]


@dataclass(frozen=True)
class ItemPage:
    """One item and all that was said of it, also what was taken back."""

    line: ItemLine
    project_id: int
    content: dict[str, Any]
    gold: dict[str, Any] | None
    answers: list[ShownAnswer]


def list_items(database: Database, project_id: int, page: int) -> tuple[list[ItemLine], int]:
    """The items of a page (from 1), and how many pages there are."""
    with database.read() as session:
        everything = Item.project_id == project_id
        count = session.scalar(select(func.count()).select_from(Item).where(everything)) or 0
        standing = (
            select(func.count())
            .where(Submission.item_id == Item.id, Submission.superseded_at.is_(None))
            .correlate(Item)
            .scalar_subquery()
        )
        rows = session.execute(
            select(Item, Batch.number, standing)
            .join(Batch, Batch.id == Item.batch_id)
            .where(everything)
            .order_by(Item.id)
            .offset((page - 1) * PAGE_ITEMS)
            .limit(PAGE_ITEMS)
        )
        return [_line(*row) for row in rows], max(1, -(-count // PAGE_ITEMS))


def show_item(database: Database, item_id: int) -> ItemPage:
    """Raises: NotFound."""
    with database.read() as session:
        found = session.execute(
            select(Item, Batch.number).join(Batch, Batch.id == Item.batch_id).where(Item.id == item_id)
        ).first()
        if found is None:
            raise NotFound("there is no such item")
        item, number = found
        rows = session.execute(
            select(Submission, User.pseudonym)
            .join(User, User.id == Submission.user_id)
            .where(Submission.item_id == item_id)
            .order_by(Submission.id)
        )
        answers = [
            ShownAnswer(
                pseudonym, submission.created_at, submission.seconds, submission.gold_correct, _state(submission),
                submission.answer,
            )
            for submission, pseudonym in rows
        ]  # fmt: skip
    line = _line(item, number, sum(answer.state not in ("undone", "rejected") for answer in answers))
    return ItemPage(line, item.project_id, item.content, item.gold, answers)


def _line(item: Item, batch: int, submissions: int) -> ItemLine:
    return ItemLine(
        item.id, item_key(item), item.kind, batch, _excerpt(item), item.is_gold, item.is_done, item.overlap,
        submissions,
    )  # fmt: skip


def _excerpt(item: Item) -> str:
    messages = item.content.get("messages") or [{"content": ""}]
    text = item.content.get("question") or messages[-1]["content"] or item.content.get("instructions") or ""
    if not text:
        return "a review of an answer" if item.kind == "review" else "the annotator writes the prompt"
    text = " ".join(text.split())
    return text if len(text) <= EXCERPT_CHARACTERS else text[: EXCERPT_CHARACTERS - 1] + "…"


def _state(submission: Submission) -> str:
    return str(submission.superseded_because or submission.review_state or "counts")
