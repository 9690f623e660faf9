"""Strict JSON, errors, events, and clients that go away."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from groundup.base.errors import UserError
from groundup.serve.backend import Cancelled, NotImplementedByEngine, Overloaded, RequestFailed, Unavailable
from groundup.serve.config import MAX_JSON_BRACKETS, MAX_JSON_DEPTH
from groundup.serve.wire import (
    CLIENT_GONE,
    STATUS,
    ApiError,
    ClientGone,
    EventStream,
    as_api_error,
    event_bytes,
    parse_json,
    until_disconnect,
)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": [1, 2.5, None, True, "text"]},
        {"brackets in text": '[[[["}}' * 1000, "\\": '\\"[', "é": "👩‍👩‍👧"},
        {"deep": json.loads("[" * (MAX_JSON_DEPTH - 1) + "]" * (MAX_JSON_DEPTH - 1))},
    ],
)
@pytest.mark.parametrize("is_ascii", [True, False])
def test_good_bodies(value: dict[str, Any], is_ascii: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=is_ascii).encode()) == value


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"b": {"a": 1, "a": 1}}', "'a' appears twice"),
        (b'{"a": NaN}', "number"),
        (b'{"a": -Infinity}', "number"),
        (b'{"a": 1e999}', "number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "number"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udc00x": 1}', "surrogate"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": "\x01"}', "not valid JSON"),
        (b'{"a": ' + b"[" * MAX_JSON_DEPTH + b"]" * MAX_JSON_DEPTH + b"}", "nested deeper"),
        (b'{"a": ' * 10_000, "nested deeper"),
        (b'{"a": ' * 100_000, "strings"),
        (b'{"a": [' + b"[]," * (MAX_JSON_BRACKETS + 1) + b"]}", "objects and lists"),
        (b'{"a": "' + b"[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_bodies(body: bytes, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_json(body)
    assert caught.value.status == 400
    assert words in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry_after"),
    [
        (UserError("wrong", "do this"), 400, "invalid_request_error", None),
        (NotImplementedByEngine("no scores here"), 400, "invalid_request_error", None),
        (Overloaded(2.3), 429, "rate_limit_error", "3"),
        (Unavailable("loading", 5), 503, "service_unavailable_error", "5"),
        (Cancelled(), 503, "service_unavailable_error", None),
        (RequestFailed("no"), 500, "server_error", None),
        (ApiError(404, "no such model", param="model"), 404, "invalid_request_error", None),
    ],
)
def test_errors_on_the_wire(error: Exception, status: int, kind: str, retry_after: str | None) -> None:
    response = as_api_error(error).response()
    assert (response.status_code, response.headers.get("retry-after")) == (status, retry_after)
    body = json.loads(bytes(response.body))["error"]
    assert body["type"] == kind
    assert set(body) == {"message", "type", "param", "code"}
    assert body["message"]


def test_errors_that_nobody_foresaw_keep_their_words_to_themselves(caplog: pytest.LogCaptureFixture) -> None:
    said = "what the user said"
    try:
        raise KeyError(said)
    except KeyError as error:
        told = as_api_error(error)
    assert told.status == 500
    assert said not in json.dumps(told.body) + caplog.text
    assert "KeyError" in caplog.text
    assert "test_wire.py" in caplog.text


class Connection:
    """What ASGI gives an application; the client goes when `gone` is set."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.sent: list[Any] = []

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        await asyncio.sleep(0)

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])


def test_work_goes_on_as_long_as_the_client_is_there() -> None:
    async def main() -> None:
        connection = Connection()
        assert await until_disconnect(connection.receive, asyncio.sleep(0.01, "done")) == "done"

        async def fail() -> None:
            raise UserError("wrong")

        with pytest.raises(UserError):
            await until_disconnect(connection.receive, fail())

    asyncio.run(main())


def test_work_is_cancelled_when_the_client_goes() -> None:
    async def main() -> None:
        connection, is_closed = Connection(), asyncio.Event()

        async def work() -> None:
            try:
                connection.gone.set()
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.01)  # closing may take a while, and is waited for
                is_closed.set()

        with pytest.raises(ClientGone):
            await until_disconnect(connection.receive, work())
        assert is_closed.is_set()

    asyncio.run(main())


def test_the_servers_own_end_is_told_apart_from_the_clients() -> None:
    async def main() -> None:
        connection = Connection()
        task = asyncio.ensure_future(until_disconnect(connection.receive, asyncio.sleep(60)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(Cancelled):
            await task

    asyncio.run(main())


class Events:
    """Events of a stream, which may end with an error or wait for ever."""

    def __init__(self, end: Callable[[], Any]) -> None:
        self.end, self.is_closed = end, False

    async def __call__(self) -> AsyncIterator[bytes]:
        try:
            yield event_bytes({"n": 2})
            end = self.end()
            if asyncio.isfuture(end) or asyncio.iscoroutine(end):
                await end
        finally:
            self.is_closed = True


def fail() -> None:
    raise RequestFailed("the engine failed")


def test_a_stream_from_its_first_event_to_its_end() -> None:
    async def main() -> None:
        connection, events = Connection(), Events(lambda: None)
        await EventStream(event_bytes({"n": 1}), events())({}, connection.receive, connection.send)
        assert connection.body == b'data: {"n":1}\n\ndata: {"n":2}\n\ndata: [DONE]\n\n'
        assert dict(connection.sent[0]["headers"])[b"content-type"].startswith(b"text/event-stream")
        assert b"content-length" not in dict(connection.sent[0]["headers"])
        assert [message.get("more_body") for message in connection.sent[1:]] == [True, True, False]
        assert events.is_closed

    asyncio.run(main())


def test_an_error_in_the_middle_is_an_event_and_the_stream_still_ends() -> None:
    async def main() -> None:
        connection, events = Connection(), Events(fail)
        await EventStream(event_bytes({"n": 1}), events())({}, connection.receive, connection.send)
        *_, error, done, rest = connection.body.split(b"\n\n")
        assert json.loads(error.removeprefix(b"data: "))["error"]["message"] == "the engine failed"
        assert (done, rest) == (b"data: [DONE]", b"")
        assert connection.sent[-1]["more_body"] is False
        assert events.is_closed

    asyncio.run(main())


def test_a_stream_whose_client_went_is_closed_and_says_so_to_the_log() -> None:
    async def main() -> None:
        connection, events = Connection(), Events(lambda: asyncio.sleep(60))
        scope: dict[str, Any] = {}
        stream = EventStream(event_bytes({"n": 1}), events())
        task = asyncio.ensure_future(stream(scope, connection.receive, connection.send))
        await asyncio.sleep(0.01)
        connection.gone.set()
        await task
        assert events.is_closed
        assert scope[STATUS] == CLIENT_GONE
        assert b"DONE" not in connection.body

    asyncio.run(main())


def test_a_stream_that_the_server_ends_is_told() -> None:
    async def main() -> None:
        connection, events = Connection(), Events(lambda: asyncio.sleep(60))
        stream = EventStream(event_bytes({"n": 1}), events())
        task = asyncio.ensure_future(stream({}, connection.receive, connection.send))
        await asyncio.sleep(0.01)
        task.cancel()
        await task
        assert b"shutting down" in connection.body
        assert connection.body.endswith(b"data: [DONE]\n\n")
        assert events.is_closed

    asyncio.run(main())
