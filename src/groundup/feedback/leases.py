"""Places at items: who may take one, who holds one, and how many are taken.

The rule that all of this keeps: an item is never given to more than `overlap` people at once, nor twice to one person.
SQLite has one writer at a time. On PostgreSQL, locks are taken in this order: the project's row (claims alone, so those
of a project queue for a few milliseconds), then the item's row, of a reviewed item before that of its review.

Why not SKIP LOCKED: an item has several places, so that one which is locked for a moment may still have a free one;
who skips it is told that there is no work left.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Select, and_, exists, func, or_, select
from sqlalchemy.orm import Session

from groundup.base.seeds import derive_seed
from groundup.feedback.contents import ItemContent
from groundup.feedback.database import find
from groundup.feedback.errors import Conflict, NotFound
from groundup.feedback.tables import Assignment, Batch, Item, ItemKind, Project, Review, Submission, User

IDLE_SECONDS = 120.0
"""A longer silence is a break, of which this much counts as work."""


@dataclass(frozen=True)
class Place:
    """What somebody is at work on; its item is locked until the transaction ends."""

    assignment: Assignment
    item: Item
    project: Project

    @property
    def content(self) -> ItemContent:
        """What the item asks."""
        return ItemContent.model_validate(self.item.content)


def claim_place(session: Session, user: User, project: Project, kind: ItemKind, now: datetime) -> Place | None:
    """The place that this person has here and may still use, else the next free one."""
    session.execute(select(Project.id).where(Project.id == project.id).with_for_update(key_share=True))
    for assignment in _own(session, user.id, project.id, kind, now):
        item = lock_item(session, assignment.item_id)
        if is_usable(session, assignment, item, now):
            return renew(Place(assignment, item, project), now)
    wants_gold = _draws_gold(session, user.id, project)
    for is_gold in (True, False) if wants_gold else (False,):
        while (item_id := session.scalar(free_items(user.id, project.id, kind, is_gold, now).limit(1))) is not None:
            item = lock_item(session, item_id)
            if not item.is_done and _has_room(session, item, user.id, now):
                return _lease(session, user.id, item, project, now)
    return None


def free_items(user_id: int, project_id: int, kind: ItemKind, is_gold: bool, now: datetime) -> Select[int]:
    """Ids of items of which this person could get a place, in the order in which they are given out."""
    taken = select(func.count()).where(Assignment.item_id == Item.id, _is_taken(now)).correlate(Item).scalar_subquery()
    had = exists().where(Assignment.item_id == Item.id, Assignment.user_id == user_id)
    own_work = exists().where(
        Review.item_id == Item.id, Submission.id == Review.submission_id, Submission.user_id == user_id
    )
    return (
        select(Item.id)
        .join(Batch, Batch.id == Item.batch_id)
        .where(
            Item.project_id == project_id,
            Item.kind == kind,
            Item.is_done.is_(False),
            Item.is_gold.is_(is_gold),
            Batch.is_open,
            ~had,
            ~own_work,
            or_(Item.overlap.is_(None), taken < Item.overlap),
        )
        .order_by(Item.id)
    )


def lock_item(session: Session, item_id: int) -> Item:
    """The item as it is now, and nobody else's until the transaction ends."""
    query = select(Item).where(Item.id == item_id).with_for_update(key_share=True)
    return session.scalars(query.execution_options(populate_existing=True)).one()


def own_place(session: Session, user_id: int, assignment_id: int) -> Place:
    """One's own assignment, whatever its state, as it is now. Raises: NotFound, also for somebody else's."""
    assignment = find(session, Assignment, assignment_id)
    if assignment is None or assignment.user_id != user_id:
        raise NotFound("there is no such task of yours")
    item = session.get_one(Item, assignment.item_id)
    if item.kind == "review":
        lock_item(session, reviewed(session, item).item_id)
    item = lock_item(session, item.id)
    session.refresh(assignment)
    return Place(assignment, item, session.get_one(Project, item.project_id))


def usable_place(
    session: Session, user_id: int, assignment_id: int, now: datetime, version: int | None = None
) -> Place:
    """One's own leased place, with its lease renewed. Raises: NotFound, Conflict (as `require_usable`)."""
    place = own_place(session, user_id, assignment_id)
    require_usable(session, place, now, version)
    return renew(place, now)


def reviewed(session: Session, item: Item) -> Submission:
    """What a review item is about, as it is now."""
    query = select(Submission).join(Review, Review.submission_id == Submission.id).where(Review.item_id == item.id)
    return session.scalars(query.execution_options(populate_existing=True)).one()


def require_usable(session: Session, place: Place, now: datetime, version: int | None = None) -> None:
    """Raises: Conflict where the place is lost, or `version` is not the assignment's any more."""
    assignment = place.assignment
    if assignment.state != "leased":
        raise Conflict(f"this task was {assignment.state} already", "go on with the next one")
    if not is_usable(session, assignment, place.item, now):
        raise Conflict("your time for this task ran out, and it went to somebody else", "go on with the next one")
    if version is not None and version != assignment.version:
        raise Conflict("this task was changed in another tab", "load the page again")


def is_usable(session: Session, assignment: Assignment, item: Item, now: datetime) -> bool:
    """Whether its holder may go on: in time, or late with the place still free. The item must be locked."""
    if item.is_done:
        return False
    return assignment.lease_expires_at > now or _has_room(session, item, assignment.user_id, now)


def renew(place: Place, now: datetime) -> Place:
    """Count the time since the last sign of life, and start the lease anew."""
    assignment = place.assignment
    silence = max(0.0, (now - assignment.seen_at).total_seconds())
    assignment.active_seconds += min(silence, IDLE_SECONDS)
    assignment.seen_at = now
    assignment.lease_expires_at = now + timedelta(seconds=place.project.lease_seconds)
    return place


def reopen(place: Place, now: datetime) -> None:
    """Make a submitted place a leased one again, from now on."""
    place.assignment.state = "leased"
    place.assignment.seen_at = now
    place.assignment.version += 1
    renew(place, now)


def count_done(session: Session, item: Item) -> None:
    """Set whether the item has all of its submissions. The item must be locked."""
    session.flush()
    standing = select(func.count()).where(Submission.item_id == item.id, Submission.superseded_at.is_(None))
    item.is_done = item.overlap is not None and (session.scalar(standing) or 0) >= item.overlap


def _is_taken(now: datetime) -> ColumnElement[bool]:
    return or_(Assignment.state == "submitted", and_(Assignment.state == "leased", Assignment.lease_expires_at > now))


def _has_room(session: Session, item: Item, user_id: int, now: datetime) -> bool:
    """Whether others leave a place. Counted after the lock, by a statement of its own: it sees all that came before."""
    others = select(func.count()).where(Assignment.item_id == item.id, Assignment.user_id != user_id, _is_taken(now))
    return item.overlap is None or (session.scalar(others) or 0) < item.overlap


def _own(session: Session, user_id: int, project_id: int, kind: ItemKind, now: datetime) -> list[Assignment]:
    """Leases of this person, the one last seen first."""
    return list(
        session.scalars(
            select(Assignment)
            .join(Item, Item.id == Assignment.item_id)
            .where(
                Assignment.user_id == user_id,
                Assignment.state == "leased",
                Item.project_id == project_id,
                Item.kind == kind,
                Item.is_done.is_(False),
            )
            .order_by(Assignment.seen_at.desc())
        )
    )


def _draws_gold(session: Session, user_id: int, project: Project) -> bool:
    """Whether the next item is to be a gold one: by a draw for each of the items that this person has had."""
    if not project.gold_share:
        return False
    had = session.scalar(
        select(func.count())
        .join(Item, Item.id == Assignment.item_id)
        .where(Assignment.user_id == user_id, Item.project_id == project.id)
        .select_from(Assignment)
    )
    return derive_seed(project.id, "gold", user_id, had or 0) < project.gold_share * 2**63


def _lease(session: Session, user_id: int, item: Item, project: Project, now: datetime) -> Place:
    order_seed = ItemContent.model_validate(item.content).order_seed
    if order_seed is None:
        order_seed = derive_seed(item.id, "order", user_id)
    assignment = Assignment(
        item_id=item.id,
        user_id=user_id,
        state="leased",
        lease_expires_at=now + timedelta(seconds=project.lease_seconds),
        is_swapped=order_seed % 2 == 1,
        version=1,
        feedback="",
        started_at=now,
        seen_at=now,
        active_seconds=0.0,
    )
    session.add(assignment)
    session.flush()
    return Place(assignment, item, project)
