"""From what a page sends to what is kept: checked against the item, and about the item's own order of responses."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from groundup.base.config import Config
from groundup.base.records import Criterion
from groundup.feedback import contents
from groundup.feedback.contents import GivenResponse, PairJudgement, RiskLabel, parse
from groundup.feedback.errors import Conflict, Invalid
from groundup.feedback.leases import Place, reviewed
from groundup.feedback.tables import Turn


def stored_answer(session: Session, place: Place, sent: Mapping[str, Any]) -> tuple[Config, bool | None]:
    """The answer to be kept (`contents.STORED_ANSWERS[kind]`), and whether it is right where that is known.

    Raises: Invalid.
    """
    kind, content, is_swapped = place.item.kind, place.content, place.assignment.is_swapped
    if kind == "preference" and content.responses is not None:
        judgement = pair_judgement(place.project.criterion, is_swapped, sent)
        pair = contents.JudgedPair(
            **dict(judgement),
            messages=given_messages(place),
            responses=content.responses,
            shown_first=1 if is_swapped else 0,
        )
        return contents.StoredPreference(turns=[pair]), _is_right(place, judgement.winner)
    if kind == "preference":
        parse(contents.DialogueAnswer, sent)
        return contents.StoredPreference(turns=_judged_pairs(session, place)), None
    if kind == "redteam":
        answer = parse(contents.DialogueAnswer, sent)
        return contents.StoredRedTeam(turns=_labelled_turns(session, place), reason=answer.reason), None
    if kind == "comparison":
        return _comparison(place, parse(contents.ComparisonAnswer, sent))
    if kind == "sft":
        return _sft(place, parse(contents.SftAnswer, sent)), None
    if kind == "entrance":
        choice = parse(contents.EntranceAnswer, sent).answer
        if choice >= len(content.choices):
            raise Invalid("answer: there is no such choice")
        return contents.StoredEntrance(answer=choice), _is_right(place, choice)
    return _review(session, place, parse(contents.ReviewAnswer, sent)), None


def pair_judgement(criterion: Criterion, is_swapped: bool, sent: Mapping[str, Any]) -> PairJudgement:
    """A judgement in the order of the page, as one about the responses in their own order; or back. Raises: Invalid."""
    judgement = parse(PairJudgement, sent)
    if (judgement.winner is None) != (judgement.rating is None):
        raise Invalid("say which response is better and how much, or neither")
    if criterion == "safety" and judgement.winner is not None and judgement.is_safe is None:
        raise Invalid("say of each response whether it is safe")
    if criterion == "helpfulness" and judgement.is_safe is not None:
        raise Invalid("safety is labelled in safety projects alone")
    return turned(judgement) if is_swapped else judgement


def turned(judgement: PairJudgement) -> PairJudgement:
    """The same of the same two in the other order."""
    winner, is_safe = judgement.winner, judgement.is_safe
    return judgement.model_copy(
        update={
            "winner": None if winner is None else 1 - winner,
            "is_safe": None if is_safe is None else (is_safe[1], is_safe[0]),
        }
    )


def turns_of(session: Session, assignment_id: int) -> list[Turn]:
    """In order."""
    return list(session.scalars(select(Turn).where(Turn.assignment_id == assignment_id).order_by(Turn.number)))


def responses_of(turn: Turn) -> list[GivenResponse]:
    """Empty as long as there are none."""
    return [GivenResponse.model_validate(response) for response in turn.responses or ()]


def kept_response(turn: Turn) -> GivenResponse:
    """With which the dialogue goes on: the winner, or responses[0] where none was said to be better."""
    return responses_of(turn)[(turn.judgement or {}).get("winner") or 0]


def given_messages(place: Place) -> list[contents.Turn]:
    """The system prompt and the dialogue that the item gives."""
    system = place.project.system_prompt
    return [*([contents.Turn(role="system", content=system)] if system else []), *place.content.messages]


def messages_to(place: Place, turns: Sequence[Turn], prompt: str) -> list[contents.Turn]:
    """What models are given in a dialogue: what the item gives, each of `turns` with the response that won, `prompt`.

    The prompt with which a given dialogue ends is an offer, in whose place the first turn's stands.
    """
    messages = given_messages(place)
    if place.content.messages:
        messages.pop()
    for turn in turns:
        messages.append(contents.Turn(role="user", content=turn.prompt))
        messages.append(contents.Turn(role="assistant", content=kept_response(turn).text.strip() or NO_ANSWER))
    return [*messages, contents.Turn(role="user", content=prompt)]


NO_ANSWER = "(no answer)"
"""What stands in a dialogue for a model that said nothing."""


def _is_right(place: Place, answer: int | None) -> bool | None:
    return None if place.item.gold is None else answer in place.item.gold["answers"]


def _finished_turns(session: Session, place: Place) -> list[Turn]:
    turns = turns_of(session, place.assignment.id)
    if not turns:
        raise Invalid("talk with the model first")
    if any(turn.judgement is None for turn in turns):
        raise Invalid("the last turn is not judged yet", "judge it, or take it back")
    return turns


def _judged_pairs(session: Session, place: Place) -> list[contents.JudgedPair]:
    turns = _finished_turns(session, place)
    return [
        contents.JudgedPair(
            **(turn.judgement or {}),
            messages=messages_to(place, turns[: turn.number - 1], turn.prompt),
            responses=_pair(turn),
            shown_first=1 if turn.is_swapped else 0,
        )
        for turn in turns
    ]


def _pair(turn: Turn) -> tuple[GivenResponse, GivenResponse]:
    first, second = responses_of(turn)
    return first, second


def _labelled_turns(session: Session, place: Place) -> list[contents.LabelledTurn]:
    turns = _finished_turns(session, place)
    return [
        contents.LabelledTurn(
            **dict(RiskLabel.model_validate(turn.judgement)),
            messages=messages_to(place, turns[: turn.number - 1], turn.prompt),
            response=responses_of(turn)[0],
        )
        for turn in turns
    ]


def _comparison(place: Place, answer: contents.ComparisonAnswer) -> tuple[Config, bool | None]:
    responses = place.content.responses
    if responses is None:
        raise Invalid("the responses are not generated yet", "load the page again")
    is_swapped = place.assignment.is_swapped
    score = -answer.score if is_swapped else answer.score
    stored = contents.StoredComparison(
        messages=given_messages(place),
        responses=responses,
        shown_first=1 if is_swapped else 0,
        score=score,
        reason=answer.reason,
    )
    better = None if score == 0 else int(score > 0)
    return stored, _is_right(place, better)


def _sft(place: Place, answer: contents.SftAnswer) -> contents.StoredSft:
    is_given = bool(place.content.messages)
    if is_given != (answer.prompt is None):
        raise Invalid("prompt: it is given here" if is_given else "prompt: write one")
    messages = given_messages(place)
    if answer.prompt is not None:
        messages.append(contents.Turn(role="user", content=answer.prompt))
    return contents.StoredSft(messages=messages, response=answer.response)


def _review(session: Session, place: Place, answer: contents.ReviewAnswer) -> contents.StoredReview:
    submission = reviewed(session, place.item)
    if submission.superseded_at is not None:
        raise Conflict("its author has taken this answer back", "go on with the next one")
    under_review = contents.StoredSft.model_validate(submission.answer)
    messages, response = under_review.messages, under_review.response
    if answer.decision == "edit":
        if answer.response is None:
            raise Invalid("response: write the edited answer")
        response = answer.response
        if answer.prompt is not None:
            messages = [*messages[:-1], contents.Turn(role="user", content=answer.prompt)]
    elif answer.prompt is not None or answer.response is not None:
        raise Invalid("only an edit changes the text")
    if answer.decision == "reject" and not answer.feedback.strip():
        raise Invalid("feedback: tell the author what to change")
    return contents.StoredReview(
        submission_id=submission.id,
        decision=answer.decision,
        messages=messages,
        response=response,
        feedback=answer.feedback,
    )
