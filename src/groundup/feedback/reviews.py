"""What a quality review does to the answer that it is about, and what undoing either does to the other."""

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from groundup.feedback.contents import StoredReview
from groundup.feedback.errors import Conflict
from groundup.feedback.leases import Place, count_done, lock_item, reopen, reviewed
from groundup.feedback.tables import Assignment, Item, Review, Submission


def request_review(session: Session, place: Place, submission: Submission, now: datetime) -> None:
    """Put a new SFT answer on the reviewers' list, where its project wants that."""
    if place.item.kind != "sft" or not place.project.is_reviewed:
        return
    submission.review_state = "pending"
    item = Item(
        project_id=place.project.id,
        batch_id=place.item.batch_id,
        kind="review",
        content={},
        overlap=1,
        is_gold=False,
        is_done=False,
        created_at=now,
    )
    session.add(item)
    session.flush()
    session.add(Review(item_id=item.id, submission_id=submission.id))


def apply_review(session: Session, place: Place, answer: StoredReview, now: datetime) -> None:
    """Approved or edited, the answer counts; rejected, it goes back to its author with the feedback."""
    submission = reviewed(session, place.item)
    if answer.decision != "reject":
        submission.review_state = "approved" if answer.decision == "approve" else "edited"
        return
    submission.review_state = "rejected"
    submission.superseded_at, submission.superseded_because = now, "rejected"
    authors = Place(
        session.get_one(Assignment, submission.assignment_id),
        session.get_one(Item, submission.item_id),  # locked by leases.own_place
        place.project,
    )
    authors.assignment.feedback = answer.feedback
    reopen(authors, now)
    count_done(session, authors.item)


def withdraw_review(session: Session, submission: Submission) -> None:
    """Take an answer that its author undoes from the reviewers' list. Raises: Conflict once it is reviewed."""
    if submission.review_state is None:
        return
    if submission.review_state != "pending":
        raise Conflict("this answer is reviewed already", "it can be taken back no more")
    review_id = session.scalars(select(Review.item_id).where(Review.submission_id == submission.id)).one()
    lock_item(session, review_id).is_done = True


def revoke_review(session: Session, place: Place) -> None:
    """Undo an approval or an edit. Raises: Conflict for a rejection: the author has it back."""
    submission = reviewed(session, place.item)
    if submission.review_state == "rejected":
        raise Conflict("the answer is back with its author already", "it can be taken back no more")
    submission.review_state = "pending"
