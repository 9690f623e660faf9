"""What annotators see of their work, and all they see: no names of models, no gold answers, nobody else's ratings."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from groundup.base.records import Criterion
from groundup.feedback.answers import kept_response, responses_of, turned, turns_of
from groundup.feedback.contents import ItemContent, PairJudgement, StoredSft, Turn
from groundup.feedback.leases import Place, reviewed
from groundup.feedback.tables import ItemKind


@dataclass(frozen=True)
class ShownTurn:
    """A turn of a dialogue with models, in the order of the page."""

    number: int
    prompt: str
    responses: tuple[str, ...] | None
    """None: still to be generated."""
    judgement: dict[str, Any] | None
    """What this person said of it, in the page's terms."""
    kept: str | None
    """The response with which the dialogue goes on; None: not judged yet."""


@dataclass(frozen=True)
class Task:
    """An item as its annotator sees it: blind."""

    assignment_id: int
    project_id: int
    kind: ItemKind
    criterion: Criterion
    version: int
    """To be given back with everything that is saved (If-Match)."""
    lease_expires_at: datetime
    instructions: str
    messages: tuple[Turn, ...]
    """The dialogue that the item gives, or (a review) the one that is answered.

    Where models answer, its last message is an offer, in whose place the prompt of the first turn stands.
    """
    responses: tuple[str, str] | None
    """Two given responses, in the order to be shown; None: none, or (comparison) still to be generated."""
    question: str
    choices: tuple[str, ...]
    turns: tuple[ShownTurn, ...]
    can_add_turn: bool
    draft: dict[str, Any] | None
    feedback: str
    """Of the reviewer who sent the last answer back."""
    review_of: str | None
    """The answer under review."""


def show(session: Session, place: Place) -> Task:
    """What the page may know."""
    assignment, project, content = place.assignment, place.project, place.content
    turns = turns_of(session, assignment.id)
    under_review = None
    if place.item.kind == "review":
        under_review = StoredSft.model_validate(reviewed(session, place.item).answer)
        content = ItemContent(messages=under_review.messages)
    responses = None
    if content.responses is not None:
        first, second = reversed(content.responses) if assignment.is_swapped else content.responses
        responses = (first.text, second.text)
    has_dialogue = place.item.kind == "redteam" or (place.item.kind == "preference" and content.responses is None)
    return Task(
        assignment_id=assignment.id,
        project_id=project.id,
        kind=place.item.kind,
        criterion=project.criterion,
        version=assignment.version,
        lease_expires_at=assignment.lease_expires_at,
        instructions=content.instructions,
        messages=tuple(content.messages),
        responses=responses,
        question=content.question,
        choices=tuple(content.choices),
        turns=tuple(
            ShownTurn(
                number=turn.number,
                prompt=turn.prompt,
                responses=tuple(response.text for response in _in_page_order(responses_of(turn), turn.is_swapped))
                or None,
                judgement=_shown_judgement(place.item.kind, turn.judgement, turn.is_swapped),
                kept=None if turn.judgement is None else kept_response(turn).text,
            )
            for turn in turns
        ),
        can_add_turn=has_dialogue
        and len(turns) < project.max_turns
        and all(turn.judgement is not None for turn in turns),
        draft=assignment.draft,
        feedback=assignment.feedback,
        review_of=None if under_review is None else under_review.response,
    )


def _in_page_order(responses: list[Any], is_swapped: bool) -> list[Any]:
    return responses[::-1] if is_swapped else responses


def _shown_judgement(kind: ItemKind, judgement: dict[str, Any] | None, is_swapped: bool) -> dict[str, Any] | None:
    if judgement is None or kind == "redteam" or not is_swapped:
        return judgement
    return turned(PairJudgement.model_validate(judgement)).model_dump(mode="json")
