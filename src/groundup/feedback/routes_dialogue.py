"""Talking with models inside an item. Pages get positions and text; who answers stays on the server."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from groundup.base.config import Config
from groundup.feedback.contents import MAX_CHARACTERS, GivenResponse
from groundup.feedback.endpoints import Event, Exchange, Exchanges
from groundup.feedback.errors import Conflict
from groundup.feedback.security import services, user_of
from groundup.feedback.tasks import Task
from groundup.feedback.views import markdown

router = APIRouter()


class Begin(Config):
    """A turn of the person."""

    version: int
    prompt: str


class Judge(Config):
    """What the person says of a turn, in the terms of the page."""

    version: int
    judgement: dict[str, Any]


class At(Config):
    """Which state of the item the page shows."""

    version: int


@router.post("/tasks/{assignment_id}/turns")
def begin_turn(request: Request, assignment_id: int, body: Begin) -> dict[str, int]:
    """Say something to the models; the answers are had by `stream`."""
    if len(body.prompt) > MAX_CHARACTERS:
        raise Conflict(f"a prompt may have at most {MAX_CHARACTERS} characters")
    number, _ = services(request).dialogues.begin_turn(user_of(request).id, assignment_id, body.version, body.prompt)
    return {"number": number}


@router.post("/tasks/{assignment_id}/turns/{number}/stream")
async def stream_turn(request: Request, assignment_id: int, number: int) -> StreamingResponse:
    """What the models say, as lines of JSON; asked for again, all of it again."""
    user_id, found = user_of(request).id, services(request)
    task = await run_in_threadpool(found.work.task, user_id, assignment_id)
    turn = next((turn for turn in task.turns if turn.number == number), None)
    if turn is None or turn.number != len(task.turns):
        raise Conflict("the dialogue has moved on in another tab", "load the page again")
    if turn.responses is not None:
        return _lines(_told(turn.responses, task))
    _, generations = await run_in_threadpool(
        found.dialogues.begin_turn, user_id, assignment_id, task.version, turn.prompt
    )

    async def store(responses: list[GivenResponse]) -> None:
        await run_in_threadpool(found.dialogues.finish_turn, user_id, assignment_id, number, responses)

    exchange = _exchanges(request).start(("turn", assignment_id, number), generations, store)
    return _lines(_followed(exchange, request, assignment_id))


@router.post("/tasks/{assignment_id}/responses/stream")
async def stream_comparison(request: Request, assignment_id: int) -> StreamingResponse:
    """The two responses of a comparison that has none yet: generated once, for all of its raters."""
    user_id, found = user_of(request).id, services(request)
    task = await run_in_threadpool(found.work.task, user_id, assignment_id)
    generations = await run_in_threadpool(found.dialogues.comparison_generations, user_id, assignment_id)
    if generations is None:
        return _lines(_told(task.responses or (), task))

    async def store(responses: list[GivenResponse]) -> None:
        await run_in_threadpool(found.dialogues.set_comparison, user_id, assignment_id, responses)

    exchange = _exchanges(request).start(("comparison", assignment_id, 0), generations, store)
    return _lines(_followed(exchange, request, assignment_id))


@router.post("/tasks/{assignment_id}/turns/{number}/judgement")
def judge_turn(request: Request, assignment_id: int, number: int, body: Judge) -> dict[str, Any]:
    """Say which response is better, or what it is; the page then goes on with the dialogue or hands it in."""
    task = services(request).dialogues.judge_turn(
        user_of(request).id, assignment_id, body.version, number, body.judgement
    )
    return {"version": task.version, "can_add_turn": task.can_add_turn}


@router.post("/tasks/{assignment_id}/turns/{number}/drop")
def drop_turn(request: Request, assignment_id: int, number: int, body: At) -> dict[str, int]:
    """Take back the last turn."""
    task = services(request).dialogues.drop_turn(user_of(request).id, assignment_id, body.version, number)
    return {"version": task.version}


def _exchanges(request: Request) -> Exchanges:
    found: Exchanges = request.app.state.exchanges
    return found


async def _told(responses: Sequence[str], task: Task) -> AsyncIterator[Event]:
    """Responses that are stored already."""
    yield _end(task, responses)


async def _followed(exchange: Exchange, request: Request, assignment_id: int) -> AsyncIterator[Event]:
    """An exchange under way; its end comes with the texts as they are to be shown from now on."""
    async for event in exchange.watch():
        if "end" not in event:
            yield event
            continue
        task = await run_in_threadpool(services(request).work.task, user_of(request).id, assignment_id)
        if event["end"]:
            yield _end(task, task.responses or task.turns[-1].responses or ())
        else:
            yield event | {"version": task.version}


def _end(task: Task, responses: Sequence[str]) -> Event:
    return {"end": True, "version": task.version, "html": [markdown(text) for text in responses]}


def _lines(events: AsyncIterator[Event]) -> StreamingResponse:
    async def encoded() -> AsyncIterator[bytes]:
        async for event in events:
            yield json.dumps(event).encode() + b"\n"

    return StreamingResponse(encoded(), media_type="application/x-ndjson", headers={"cache-control": "no-store"})
