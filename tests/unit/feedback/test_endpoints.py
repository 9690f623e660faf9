"""Asking models over the OpenAI-compatible API: what goes out, what is taken, and every way in which it can fail."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from groundup.feedback import endpoints
from groundup.feedback.contents import MAX_CHARACTERS, GivenResponse, Turn
from groundup.feedback.dialogue import Generation
from groundup.feedback.endpoints import EndpointFailed, Event, Exchange, Exchanges, new_client, stream
from groundup.feedback.errors import Conflict

SECRET = "sk-secret"
GENERATION = Generation(
    position=0,
    endpoint_id=7,
    base_url="http://models.invalid/v1/",
    model="alpha-7b",
    revision="abc",
    api_key=SECRET,
    temperature=0.8,
    max_new_tokens=64,
    seed=11,
    messages=(Turn(role="system", content="Be brief."), Turn(role="user", content="Why?")),
)
Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "RETRY_SECONDS", (0.0, 0.0))


def chunk(text: str | None = None, **fields: Any) -> bytes:
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, **fields}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def says(*parts: bytes, done: bool = True) -> httpx.Response:
    return httpx.Response(200, content=b"".join(parts) + (b"data: [DONE]\n\n" if done else b""))


def asks(handler: Handler) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.MockTransport(handler))


def run(handler: Handler, *generations: Generation) -> tuple[list[Event], list[GivenResponse]]:
    """One exchange from beginning to end: what a page hears, what is stored."""
    stored: list[GivenResponse] = []

    async def store(responses: list[GivenResponse]) -> None:
        stored.extend(responses)

    async def go() -> list[Event]:
        async with asks(handler) as client:
            exchange = Exchange(client, generations or (GENERATION,))
            exchange.start(store)
            return [event async for event in exchange.watch()]

    return asyncio.run(go()), stored


def shown(events: list[Event], position: int = 0) -> str:
    """What a page shows in the end."""
    text = ""
    for event in events:
        if event.get("position") == position:
            text = event["text"] if "text" in event else text + event.get("more", "")
    return text


def test_what_goes_out_and_what_is_kept() -> None:
    requests: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        first = b'data: {"prompt_token_ids": [1, 2], "choices": []}\n\n'
        return says(
            first, chunk("It ", token_ids=[5]), chunk("rains.", token_ids=[6, 2]), chunk(finish_reason="length")
        )

    events, stored = run(handler)
    assert str(requests[0].url) == "http://models.invalid/v1/chat/completions"
    assert requests[0].headers["authorization"] == f"Bearer {SECRET}"
    assert json.loads(requests[0].content) == {
        "model": "alpha-7b",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
        "temperature": 0.8,
        "max_tokens": 64,
        "seed": 11,
        "stream": True,
        "return_token_ids": True,
    }
    assert stored == [
        GivenResponse(
            text="It rains.",
            model="alpha-7b",
            revision="abc",
            endpoint_id=7,
            temperature=0.8,
            seed=11,
            prompt_token_ids=[1, 2],
            token_ids=[5, 6, 2],
            finish_reason="length",
        )
    ]
    assert shown(events) == "It rains."
    assert events[-2:] == [{"position": 0, "finish": "length"}, {"end": True, "message": ""}]
    assert SECRET not in str(events) + repr(GENERATION)
    assert "alpha" not in str(events)


def test_a_server_that_does_not_know_our_extension_is_asked_without() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(400) if b"return_token_ids" in request.content else says(chunk("Yes."))

    _, stored = run(handler)
    assert stored[0].text == "Yes."
    assert stored[0].token_ids is None


def error_in_stream() -> httpx.Response:
    return says(chunk("It "), b'data: {"error": {"message": "CUDA out of memory at alpha-7b"}}\n\n')


HALF_A_CHARACTER = b'data: {"choices": [{"delta": {"content": "\\ud800"}}]}\n\n'
FAILURES: dict[str, tuple[Callable[[], httpx.Response], str]] = {
    "refused": (lambda: httpx.Response(401, text="bad key sk-secret"), "refused (status 401)"),
    "redirect": (lambda: httpx.Response(307, headers={"location": "http://other.invalid"}), "refused (status 307)"),
    "busy": (lambda: httpx.Response(503), "refused (status 503)"),
    "cut off": (lambda: says(chunk("It "), done=False), "cut off"),
    "nothing": (lambda: says(chunk("  ")), "answered with nothing"),
    "error told": (error_in_stream, "failed while it answered"),
    "no JSON": (lambda: says(b"data: <html>\n\n"), "no stream of text"),
    "other JSON": (lambda: says(b'data: {"choices": [{"delta": 5}]}\n\n'), "no stream of text"),
    "half a character": (
        lambda: says(b'data: {"choices": [{"delta": {"content": "\\ud800"}}]}\n\n'),
        "no stream of text",
    ),
    "too long": (lambda: says(chunk("x" * (MAX_CHARACTERS + 1))), "longer than"),
    "endless": (lambda: says(*[b": keep-alive\n" + b"x" * (1 << 20)] * 17), "does not stop"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_told_without_names(name: str) -> None:
    answer, words = FAILURES[name]
    events, stored = run(lambda request: answer())
    assert stored == []
    [failed] = [event["failed"] for event in events if "failed" in event]
    assert words in failed
    for secret in ("alpha", "models.invalid", SECRET, "CUDA"):
        assert secret not in failed
    assert events[-1] == {"end": False, "message": ""}


def unreachable(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("connection to models.invalid refused", request=request)


def test_a_busy_server_is_asked_again() -> None:
    answers = [httpx.Response(503), httpx.Response(429), says(chunk("Yes."))]
    _, stored = run(lambda request: answers.pop(0))
    assert stored[0].text == "Yes."
    events, _ = run(unreachable)
    assert [event["failed"] for event in events if "failed" in event] == ["The model cannot be reached."]


def test_only_what_failed_is_asked_again() -> None:
    pair = (GENERATION, replace(GENERATION, position=1, model="beta-13b", seed=12))
    asked: list[str] = []
    broken = {"beta-13b"}
    stored: list[GivenResponse] = []

    def handler(request: httpx.Request) -> httpx.Response:
        model = json.loads(request.content)["model"]
        asked.append(model)
        return httpx.Response(401) if model in broken else says(chunk(f"I am {asked.count(model)}."))

    async def store(responses: list[GivenResponse]) -> None:
        stored.extend(responses)

    async def go() -> None:
        async with asks(handler) as client:
            exchanges = Exchanges(client)
            key = ("turn", 1, 1)
            first = exchanges.start(key, pair, store)
            assert exchanges.start(key, pair, store) is first, "two tabs watch one exchange"
            events = [event async for event in first.watch()]
            assert events[-1]["end"] is False
            broken.clear()
            again = exchanges.start(key, pair, store)
            events = [event async for event in again.watch()]
            assert shown(events, 0) == "I am 1."
            assert shown(events, 1) == "I am 2."
            assert events[-1]["end"] is True
            other = exchanges.start(key, (replace(GENERATION, seed=99),), store)
            assert other is not again, "another question is another exchange"
            await exchanges.close()
            assert not other.is_running

    asyncio.run(go())
    assert asked[:3] == ["alpha-7b", "beta-13b", "beta-13b"]
    assert [response.text for response in stored] == ["I am 1.", "I am 2."]


def test_a_refusal_to_store_is_told() -> None:
    async def refuse(responses: list[GivenResponse]) -> None:
        raise Conflict("your time ran out", "go on")

    async def fail(responses: list[GivenResponse]) -> None:
        raise OSError("disk full at /secret/path")

    async def go(store: endpoints.Store) -> Event:
        async with asks(lambda request: says(chunk("Yes."))) as client:
            exchange = Exchange(client, [GENERATION])
            exchange.start(store)
            return [event async for event in exchange.watch()][-1]

    assert asyncio.run(go(refuse)) == {"end": False, "message": "Your time ran out. Go on."}
    assert asyncio.run(go(fail)) == {"end": False, "message": "The answers could not be stored. Try again."}


def test_everybody_who_watches_sees_all_of_it() -> None:
    """One comes at once, one in the middle, one goes away; the exchange needs none of them."""
    gate = asyncio.Event()

    class Slowly(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield chunk("It ")
            await gate.wait()
            yield chunk("rains.") + b"data: [DONE]\n\n"

    stored: list[GivenResponse] = []

    async def store(responses: list[GivenResponse]) -> None:
        stored.extend(responses)

    async def go() -> tuple[list[Event], list[Event]]:
        async with asks(lambda request: httpx.Response(200, stream=Slowly())) as client:
            exchange = Exchange(client, [GENERATION])
            exchange.start(store)
            early = asyncio.create_task(collect(exchange))
            gone = asyncio.create_task(collect(exchange))
            while not exchange.answers[0].text:
                await asyncio.sleep(0)
            gone.cancel()
            late = asyncio.create_task(collect(exchange))
            await asyncio.sleep(0)
            gate.set()
            return await early, await late

    early, late = asyncio.run(go())
    assert shown(early) == shown(late) == stored[0].text == "It rains."
    assert late[0] == {"position": 0, "text": "It "}


async def collect(exchange: Exchange) -> list[Event]:
    return [event async for event in exchange.watch()]


def test_the_client_follows_nobody() -> None:
    """No redirects to other addresses, no proxies out of the environment, and never without a time-out."""

    async def go() -> None:
        async with new_client() as client:
            assert not client.follow_redirects
            assert not client.trust_env
            assert None not in client.timeout.as_dict().values()

    asyncio.run(go())


def test_stream_ends_at_done() -> None:
    async def go() -> list[str | None]:
        async with asks(lambda request: says(chunk("a"), b"data: [DONE]\n\n", chunk("b"))) as client:
            return [piece.choices[0].delta.content async for piece in stream(client, GENERATION)]

    assert asyncio.run(go()) == ["a"]
    with pytest.raises(EndpointFailed):
        asyncio.run(unreachable_stream())


async def unreachable_stream() -> None:
    async with asks(unreachable) as client:
        async for _ in stream(client, GENERATION):
            raise AssertionError
