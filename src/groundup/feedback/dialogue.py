"""Talking with models within an assignment: who answers, in which order, and what was said of it.

The page asks for a turn, the server streams what `Generation` says, and stores it by `finish_turn` before it can be
judged: an annotator can neither choose the models nor write their responses. `Generation` never goes to a page.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from groundup.feedback.answers import given_messages, messages_to, pair_judgement, turns_of
from groundup.feedback.clock import Clock, utc_now
from groundup.feedback.contents import GivenResponse, Planned, RiskLabel, Turn, Written, parse
from groundup.feedback.database import Database
from groundup.feedback.errors import Conflict, Invalid, NotFound
from groundup.feedback.leases import Place, usable_place
from groundup.feedback.tables import Endpoint, ProjectEndpoint
from groundup.feedback.tables import Turn as TurnRow
from groundup.feedback.tasks import Task, show

_LOAD_AGAIN = "load the page again"


@dataclass(frozen=True)
class Generation:
    """One response to be generated; `position` is its place on the page."""

    position: int
    endpoint_id: int
    base_url: str
    model: str
    revision: str
    api_key: str = field(repr=False)
    temperature: float
    max_new_tokens: int
    seed: int
    messages: tuple[Turn, ...]
    """The system prompt included."""


class Dialogues:
    """As `Work`: one transaction a method, one's own assignments only."""

    def __init__(self, database: Database, clock: Clock = utc_now) -> None:
        self._database = database
        self._clock = clock

    def begin_turn(
        self, user_id: int, assignment_id: int, version: int, prompt: str
    ) -> tuple[int, tuple[Generation, ...]]:
        """The next turn's number, and what to generate, in the order of the page (2 for preferences, 1 in red teams).

        A turn without responses is begun again: with the same plan for the same prompt, else with a new one.
        Raises: Invalid; Conflict while the last turn is not judged, after the last allowed turn, for an old version.
        """
        prompt = parse(Written, {"text": prompt}).text
        with self._database.write() as session:
            place = self._talk(session, user_id, assignment_id, version)
            turns = turns_of(session, assignment_id)
            last = turns[-1] if turns else None
            if last is None or last.responses is not None:
                last = _new_turn(session, place, turns, self._clock())
            if last.prompt != prompt:
                last.prompt = prompt
                last.plan = [planned.model_dump() for planned in _draw_plan(session, place)]
                last.is_swapped = random.SystemRandom().random() < 0.5
                session.flush()
            messages = messages_to(place, [turn for turn in turns if turn.number < last.number], prompt)
            return last.number, _generations(session, _plan(last), last.is_swapped, messages)

    def finish_turn(self, user_id: int, assignment_id: int, number: int, responses: Sequence[GivenResponse]) -> Task:
        """Store what was generated, in the order of the page. The first to finish a turn wins.

        Raises: Conflict where these are not the responses to the turn's prompt as it is now (by their seeds).
        """
        with self._database.write() as session:
            place = self._talk(session, user_id, assignment_id)
            turn = _turn(session, assignment_id, number)
            if turn.responses is None:
                turn.responses = _stored(_plan(turn), turn.is_swapped, responses)
                place.assignment.version += 1
            return show(session, place)

    def judge_turn(
        self, user_id: int, assignment_id: int, version: int, number: int, judgement: Mapping[str, Any]
    ) -> Task:
        """Say which is better (`contents.PairJudgement`) or what it is (`contents.RiskLabel`), in the page's terms.

        May be changed until the next turn begins or the item is submitted. Raises: Invalid, Conflict.
        """
        with self._database.write() as session:
            place = self._talk(session, user_id, assignment_id, version)
            turn = _last_turn(session, assignment_id, number)
            if turn.responses is None:
                raise Conflict("the responses are not there yet", _LOAD_AGAIN)
            if place.item.kind == "redteam":
                checked = parse(RiskLabel, judgement).model_dump(mode="json")
            else:
                checked = pair_judgement(place.project.criterion, turn.is_swapped, judgement).model_dump(mode="json")
            turn.judgement, turn.judged_at = checked, self._clock()
            place.assignment.version += 1
            session.flush()
            return show(session, place)

    def drop_turn(self, user_id: int, assignment_id: int, version: int, number: int) -> Task:
        """Take back the last turn."""
        with self._database.write() as session:
            place = self._talk(session, user_id, assignment_id, version)
            session.delete(_last_turn(session, assignment_id, number))
            place.assignment.version += 1
            session.flush()
            return show(session, place)

    def comparison_generations(self, user_id: int, assignment_id: int) -> tuple[Generation, ...] | None:
        """What a comparison item still needs (`position`: place on the page); None: it has its responses."""
        with self._database.write() as session:
            place = self._comparison(session, user_id, assignment_id)
            if place.content.responses is not None:
                return None
            plan, is_swapped = _comparison_plan(session, place), place.assignment.is_swapped
            return _generations(session, plan, is_swapped, given_messages(place))

    def set_comparison(self, user_id: int, assignment_id: int, responses: Sequence[GivenResponse]) -> Task:
        """Store a comparison's two responses, in the order of the page, for all of its raters; the first come wins."""
        with self._database.write() as session:
            place = self._comparison(session, user_id, assignment_id)
            if place.content.responses is None:
                plan = _comparison_plan(session, place)
                stored = _stored(plan, place.assignment.is_swapped, responses)
                place.item.content = place.item.content | {"responses": stored}
                place.assignment.version += 1
            return show(session, place)

    def _talk(self, session: Session, user_id: int, assignment_id: int, version: int | None = None) -> Place:
        place = usable_place(session, user_id, assignment_id, self._clock(), version)
        is_dialogue = place.item.kind in ("redteam", "preference")
        if not is_dialogue or place.content.responses is not None:
            raise Invalid("there is no model to talk to in this task")
        return place

    def _comparison(self, session: Session, user_id: int, assignment_id: int) -> Place:
        place = usable_place(session, user_id, assignment_id, self._clock())
        if place.item.kind != "comparison":
            raise Invalid("this task is no comparison of models")
        return place


def _turn(session: Session, assignment_id: int, number: int) -> TurnRow:
    for turn in turns_of(session, assignment_id):
        if turn.number == number:
            return turn
    raise NotFound("there is no such turn")


def _last_turn(session: Session, assignment_id: int, number: int) -> TurnRow:
    turn = _turn(session, assignment_id, number)
    if turns_of(session, assignment_id)[-1].number != number:
        raise Conflict("the dialogue has gone on since", _LOAD_AGAIN)
    return turn


def _new_turn(session: Session, place: Place, turns: Sequence[TurnRow], now: datetime) -> TurnRow:
    if turns and turns[-1].judgement is None:
        raise Conflict("judge the last responses first")
    if len(turns) >= place.project.max_turns:
        raise Conflict("this dialogue is as long as it may be", "submit it")
    turn = TurnRow(
        assignment_id=place.assignment.id,
        number=len(turns) + 1,
        prompt="",
        plan=[],
        is_swapped=False,
        created_at=now,
    )
    session.add(turn)
    return turn


def _endpoints(session: Session, place: Place) -> list[Endpoint]:
    found = session.scalars(
        select(Endpoint)
        .join(ProjectEndpoint, ProjectEndpoint.endpoint_id == Endpoint.id)
        .where(ProjectEndpoint.project_id == place.project.id, Endpoint.is_active)
        .order_by(Endpoint.id)
    )
    if not (endpoints := list(found)):
        raise Conflict("no model answers in this project", "ask an administrator")
    return endpoints


def _planned(endpoint: Endpoint, draw: random.Random) -> Planned:
    temperature = round(draw.uniform(endpoint.min_temperature, endpoint.max_temperature), 3)
    return Planned(endpoint_id=endpoint.id, temperature=temperature, seed=draw.getrandbits(31))


def _draw_plan(session: Session, place: Place) -> list[Planned]:
    """Two different variants, each at a temperature of its own; a lone one twice. Source: section 3.2.1."""
    endpoints, draw = _endpoints(session, place), random.SystemRandom()
    count = 2 if place.item.kind == "preference" else 1
    chosen = draw.sample(endpoints, count) if len(endpoints) >= count else endpoints * count
    return [_planned(endpoint, draw) for endpoint in chosen]


def _comparison_plan(session: Session, place: Place) -> list[Planned]:
    """The project's first two models, the first one's as responses[0]; the same for everybody who asks."""
    endpoints = _endpoints(session, place)
    if len(endpoints) < 2:
        raise Conflict("two models are to be compared, and there is one", "ask an administrator")
    return [_planned(endpoint, random.Random(f"{place.item.id}/{endpoint.id}")) for endpoint in endpoints[:2]]


def _plan(turn: TurnRow) -> list[Planned]:
    return [Planned.model_validate(planned) for planned in turn.plan]


def _generations(
    session: Session, plan: list[Planned], is_swapped: bool, messages: list[Turn]
) -> tuple[Generation, ...]:
    generations = []
    for position, planned in enumerate(reversed(plan) if is_swapped else plan):
        endpoint = session.get_one(Endpoint, planned.endpoint_id)
        generations.append(
            Generation(
                position=position,
                endpoint_id=endpoint.id,
                base_url=endpoint.base_url,
                model=endpoint.model,
                revision=endpoint.revision,
                api_key=endpoint.api_key,
                temperature=planned.temperature,
                max_new_tokens=endpoint.max_new_tokens,
                seed=planned.seed,
                messages=tuple(messages),
            )
        )
    return tuple(generations)


def _stored(plan: list[Planned], is_swapped: bool, responses: Sequence[GivenResponse]) -> list[dict[str, Any]]:
    """From the order of the page to the plan's. Raises: Conflict where they were made by another plan."""
    in_order = list(reversed(responses) if is_swapped else responses)
    if [(response.endpoint_id, response.seed) for response in in_order] != [
        (planned.endpoint_id, planned.seed) for planned in plan
    ]:
        raise Conflict("these are the responses to another prompt", _LOAD_AGAIN)
    return [response.model_dump(mode="json", exclude_none=True) for response in in_order]
