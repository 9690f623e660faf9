"""Giving out work and taking it back: leases, drafts, submissions, undo, and how far it has come.

Everything is named by the person who asks and by their own assignments, so that nobody can reach another's work.
"""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from groundup.base.files import sha256_json
from groundup.base.records import Criterion
from groundup.feedback.answers import stored_answer
from groundup.feedback.clock import Clock, utc_now
from groundup.feedback.contents import StoredReview
from groundup.feedback.database import Database, find
from groundup.feedback.errors import Conflict, Forbidden, Invalid, NotFound
from groundup.feedback.leases import (
    Place,
    claim_place,
    count_done,
    free_items,
    own_place,
    renew,
    reopen,
    require_usable,
    usable_place,
)
from groundup.feedback.reviews import apply_review, request_review, revoke_review, withdraw_review
from groundup.feedback.tables import Assignment, Item, ItemKind, Project, ProjectKind, Submission, User
from groundup.feedback.tasks import Task, show

MAX_DRAFT_BYTES = 500_000
KEY_CHARACTERS = (16, 64)
"""Shortest and longest idempotency key."""
_PACE_OVER = 20
"""Submissions from which the pace is told."""


@dataclass(frozen=True)
class Submitted:
    """What became of a submission."""

    submission_id: int
    is_replay: bool
    """The same key was there already; nothing was written."""


@dataclass(frozen=True)
class Offer:
    """A project as somebody who may work sees it."""

    project_id: int
    name: str
    kind: ProjectKind
    criterion: Criterion
    guidelines: str
    blocked_by: str
    """"": it may be worked at; else why not, e.g. the entrance test to be passed first."""
    available: int
    """Items that this person could get now."""
    reviews_available: int
    """Answers that this person could review now."""


@dataclass(frozen=True)
class Progress:
    """How far somebody, and the whole project, has come."""

    submitted: int
    """By this person, in this project."""
    submitted_today: int
    seconds_each: float | None
    """Median over this person's last 20."""
    items_done: int
    items: int
    can_undo: bool


@dataclass(frozen=True)
class EntranceResult:
    """Of an entrance test, once every question is answered."""

    right: int
    questions: int
    is_passed: bool


class Work:
    """Every method is one transaction: when it returns, it is on the disk. `user_id` is who asks."""

    def __init__(self, database: Database, clock: Clock = utc_now) -> None:
        self._database = database
        self._clock = clock

    def offers(self, user_id: int) -> list[Offer]:
        """Open projects, those that are blocked included."""
        now = self._clock()
        with self._database.read() as session:
            user = _worker(session, user_id)
            projects = session.scalars(select(Project).where(Project.is_open).order_by(Project.name)).all()
            return [_offer(session, user, project, now) for project in projects]

    def claim(self, user_id: int, project_id: int, *, review: bool = False) -> Task | None:
        """The item that this person has here, else the next one that is free; None: nothing left for them now.

        Asking again gives the same one. Raises: NotFound, Forbidden (closed, entrance test, no reviewer).
        """
        with self._database.write() as session:
            user = _worker(session, user_id)
            project = _project(session, project_id)
            if blocked := _blocked_by(session, user, project, review):
                raise Forbidden(blocked)
            place = claim_place(session, user, project, "review" if review else project.kind, self._clock())
            return None if place is None else show(session, place)

    def task(self, user_id: int, assignment_id: int) -> Task:
        """One's own leased item.

        Raises: NotFound, also for somebody else's; Conflict where it was submitted or lost.
        """
        with self._database.write() as session:
            return show(session, usable_place(session, user_id, assignment_id, self._clock()))

    def save_draft(self, user_id: int, assignment_id: int, version: int, draft: Mapping[str, Any]) -> int:
        """Keep the form and renew the lease; returns the new version.

        Raises: Conflict for an old version or a lost lease; Invalid for a draft of unreasonable size.
        """
        try:
            if len(json.dumps(draft, allow_nan=False, ensure_ascii=False).encode()) > MAX_DRAFT_BYTES:
                raise Invalid("this is too long to be kept")
        except ValueError:
            raise Invalid("this has characters or numbers that cannot be stored") from None
        with self._database.write() as session:
            assignment = usable_place(session, user_id, assignment_id, self._clock(), version).assignment
            assignment.draft = dict(draft)
            assignment.version += 1
            return assignment.version

    def heartbeat(self, user_id: int, assignment_id: int) -> datetime:
        """Still there: renews the lease, counts the time; returns when it now expires. Raises: as `task`."""
        with self._database.write() as session:
            return usable_place(session, user_id, assignment_id, self._clock()).assignment.lease_expires_at

    def skip(self, user_id: int, assignment_id: int, reason: str) -> None:
        """Give the place to somebody else for good."""
        with self._database.write() as session:
            place = usable_place(session, user_id, assignment_id, self._clock())
            if place.item.kind == "entrance":
                raise Invalid("questions of an entrance test cannot be skipped")
            place.assignment.state = "skipped"
            place.assignment.feedback = reason[:4000]
            place.assignment.version += 1

    def submit(
        self, user_id: int, assignment_id: int, version: int, idempotency_key: str, answer: Mapping[str, Any]
    ) -> Submitted:
        """Take an answer (a form of `contents.py`, in the terms of the page).

        The same key and answer again are answered as the first time. Raises: Invalid; Conflict for an old version, a
        lease that ran out with the place taken, a second answer, or a key that stands for another answer.
        """
        if not (KEY_CHARACTERS[0] <= len(idempotency_key) <= KEY_CHARACTERS[1] and idempotency_key.isascii()):
            raise Invalid(f"an idempotency key has {KEY_CHARACTERS[0]} to {KEY_CHARACTERS[1]} ASCII characters")
        request = sha256_json({"assignment": assignment_id, "answer": answer})
        now = self._clock()
        with self._database.write() as session:
            place = own_place(session, user_id, assignment_id)
            earlier = session.scalar(
                select(Submission).where(Submission.user_id == user_id, Submission.idempotency_key == idempotency_key)
            )
            if earlier is not None:
                if earlier.request_sha256 != request:
                    raise Conflict("this key stands for another answer already", "load the page again")
                return Submitted(earlier.id, True)
            require_usable(session, place, now, version)
            submission = _submission(session, place, answer, now)
            submission.idempotency_key, submission.request_sha256 = idempotency_key, request
            session.add(submission)
            try:
                session.flush()
            except IntegrityError:  # the same key at the same moment for another task
                raise Conflict("this key stands for another answer already", "load the page again") from None
            place.assignment.state = "submitted"
            place.assignment.draft = dict(answer)
            place.assignment.version += 1
            count_done(session, place.item)
            if place.item.kind == "review":
                apply_review(session, place, StoredReview.model_validate(submission.answer), now)
            request_review(session, place, submission, now)
            return Submitted(submission.id, False)

    def undo(self, user_id: int, project_id: int) -> Task:
        """Take back one's last submission here; its answers are in the draft. Raises: Conflict where it is too late."""
        now = self._clock()
        with self._database.write() as session:
            _project(session, project_id)
            last = session.scalar(_last_submission(user_id, project_id))
            if last is None:
                raise Conflict("there is nothing to take back")
            place = own_place(session, user_id, last.assignment_id)
            session.refresh(last)
            if reason := _cannot_undo(last):
                raise Conflict(reason)
            if place.item.kind == "review":
                revoke_review(session, place)
            withdraw_review(session, last)
            last.superseded_at, last.superseded_because = now, "undone"
            reopen(place, now)
            count_done(session, place.item)
            return show(session, place)

    def progress(self, user_id: int, project_id: int) -> Progress:
        """For the head of the page."""
        midnight = self._clock().replace(hour=0, minute=0, second=0, microsecond=0)
        with self._database.read() as session:
            _project(session, project_id)
            standing = (Submission.superseded_at.is_(None), Submission.project_id == project_id)
            mine = select(func.count()).where(*standing, Submission.user_id == user_id)
            seconds = session.scalars(
                select(Submission.seconds)
                .where(*standing, Submission.user_id == user_id)
                .order_by(Submission.id.desc())
                .limit(_PACE_OVER)
            ).all()
            items = select(func.count()).where(
                Item.project_id == project_id, Item.is_gold.is_(False), Item.kind != "review"
            )
            last = session.scalar(_last_submission(user_id, project_id))
            return Progress(
                submitted=session.scalar(mine) or 0,
                submitted_today=session.scalar(mine.where(Submission.created_at >= midnight)) or 0,
                seconds_each=statistics.median(seconds) if seconds else None,
                items_done=session.scalar(items.where(Item.is_done)) or 0,
                items=session.scalar(items) or 0,
                can_undo=last is not None and not _cannot_undo(last),
            )

    def test_result(self, user_id: int, project_id: int) -> EntranceResult | None:
        """None: questions are left. Raises: NotFound where there is no such entrance test."""
        with self._database.read() as session:
            project = _project(session, project_id)
            if project.kind != "entrance":
                raise NotFound("there is no such entrance test")
            return _test_result(session, user_id, project)


def _submission(session: Session, place: Place, answer: Mapping[str, Any], now: datetime) -> Submission:
    stored, is_right = stored_answer(session, place, answer)
    renew(place, now)
    return Submission(
        assignment_id=place.assignment.id,
        item_id=place.item.id,
        user_id=place.assignment.user_id,
        project_id=place.project.id,
        batch_id=place.item.batch_id,
        kind=place.item.kind,
        answer=stored.model_dump(mode="json"),
        seconds=place.assignment.active_seconds,
        gold_correct=is_right,
        created_at=now,
    )


def _last_submission(user_id: int, project_id: int) -> Select[Submission]:
    return (
        select(Submission)
        .where(Submission.user_id == user_id, Submission.project_id == project_id)
        .order_by(Submission.id.desc())
        .limit(1)
    )


def _cannot_undo(last: Submission) -> str:
    """ "": it can, as far as the submission itself tells."""
    if last.superseded_at is not None:
        return "your last answer is open again already"
    if last.kind == "entrance":
        return "answers of an entrance test are final"
    if last.review_state not in (None, "pending"):
        return "this answer is reviewed already"
    return ""


def _worker(session: Session, user_id: int) -> User:
    user = find(session, User, user_id)
    if user is None or not user.is_active:
        raise NotFound("there is no such account")
    return user


def _project(session: Session, project_id: int) -> Project:
    project = find(session, Project, project_id)
    if project is None:
        raise NotFound("there is no such project")
    return project


def _blocked_by(session: Session, user: User, project: Project, review: bool) -> str:
    """Why somebody may not work here, as a sentence; "": they may."""
    if not project.is_open:
        return "this project is closed"
    if review:
        return "" if user.role in ("reviewer", "admin") else "only reviewers review"
    if project.entrance_id is None:
        return ""
    entrance = _project(session, project.entrance_id)
    result = _test_result(session, user.id, entrance)
    if result is None:
        return f"the entrance test {entrance.name!r} comes first"
    return "" if result.is_passed else f"the entrance test {entrance.name!r} was not passed"


def _test_result(session: Session, user_id: int, project: Project) -> EntranceResult | None:
    questions = session.scalar(
        select(func.count()).where(Item.project_id == project.id, Item.kind == "entrance").select_from(Item)
    )
    answers = session.scalars(
        select(Submission.gold_correct).where(
            Submission.project_id == project.id, Submission.user_id == user_id, Submission.superseded_at.is_(None)
        )
    ).all()
    if not questions or len(answers) < questions:
        return None
    right = sum(bool(answer) for answer in answers)
    return EntranceResult(right, questions, right >= project.pass_mark * questions - 1e-9)


def _offer(session: Session, user: User, project: Project, now: datetime) -> Offer:
    def available(kind: ItemKind) -> int:
        held = select(func.count()).where(
            Assignment.user_id == user.id,
            Assignment.state == "leased",
            Item.id == Assignment.item_id,
            Item.project_id == project.id,
            Item.kind == kind,
            Item.is_done.is_(False),
        )
        free = free_items(user.id, project.id, kind, False, now).order_by(None).subquery()
        return (session.scalar(held) or 0) + (session.scalar(select(func.count()).select_from(free)) or 0)

    blocked_by = _blocked_by(session, user, project, False)
    may_review = not _blocked_by(session, user, project, True)
    return Offer(
        project_id=project.id,
        name=project.name,
        kind=project.kind,
        criterion=project.criterion,
        guidelines=project.guidelines,
        blocked_by=blocked_by,
        available=0 if blocked_by else available(project.kind),
        reviews_available=available("review") if may_review else 0,
    )
