"""Bytes in and out: strict JSON bodies, errors in OpenAI's shape, server-sent events, and clients that go away."""

import asyncio
import json
import math
import re
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from itertools import islice
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from groundup.base.errors import UserError
from groundup.serve.backend import Cancelled, NotImplementedByEngine, Overloaded, RequestFailed, Unavailable
from groundup.serve.config import MAX_JSON_BRACKETS, MAX_JSON_DEPTH, MAX_JSON_KEYS, MAX_JSON_STRINGS
from groundup.serve.isolation import log_failure

T = TypeVar("T")
# Possessive, and right where a string never ends: a pattern that could fail would be tried again from each quote.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
DONE = b"data: [DONE]\n\n"
CLIENT_GONE = 499
"""What others write, too, for a client that closed its connection before the answer was complete."""
STATUS = "groundup.status"
"""Where a request's scope holds the status for the log when it differs from the one that was sent."""


class ApiError(Exception):
    """An answer with a status of 400 or more, in the shape that the official clients turn into exceptions."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_seconds = retry_after_seconds

    @property
    def body(self) -> dict[str, Any]:
        kinds = {429: "rate_limit_error", 503: "service_unavailable_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {}
        if self.retry_after_seconds is not None:
            headers["Retry-After"] = str(math.ceil(self.retry_after_seconds))
        return JsonResponse(self.body, self.status, headers)


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


class JsonResponse(Response):
    """Why orjson: it writes a chunk in a tenth of the time of the standard library, and no NaN."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


def as_api_error(error: Exception, param: str | None = None) -> ApiError:
    """What a client is told of an exception; nothing about those that nobody foresaw."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, "; ".join(filter(None, (error.message, error.remedy))), param=param)
    if isinstance(error, NotImplementedByEngine):
        return ApiError(400, str(error), param=param, code="not_supported")
    if isinstance(error, Overloaded):
        return ApiError(429, str(error), code="queue_full", retry_after_seconds=error.retry_after_seconds)
    if isinstance(error, Unavailable):
        return ApiError(503, str(error), code="unavailable", retry_after_seconds=error.retry_after_seconds)
    if isinstance(error, RequestFailed):
        return ApiError(500, str(error), code="request_failed")
    log_failure("an answer", error)
    return ApiError(500, "the server failed on this request; its log says where")


def parse_json(body: bytes) -> dict[str, Any]:
    """The object in a request's body.

    Why: what the standard library lets pass is refused before anything reads the values: deep nesting (it would end in
    a RecursionError), keys that come twice (parsers disagree on which counts), NaN, infinite numbers, and lone
    surrogates, which no UTF-8 answer could repeat.
    Raises: ApiError 400.
    """
    _check_nesting(body)
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_float=_finite,
            parse_constant=_finite,
        )
        # Only where it can matter: written out, a body of many small values takes several times its own size.
        if _SURROGATE.search(body):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8 text") from None
    except UnicodeEncodeError:
        raise ApiError(400, "the body has half of a surrogate pair in a string") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:  # NaN, infinity, numbers of thousands of digits
        raise ApiError(400, f"the body has a number that cannot be used: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


def _check_nesting(body: bytes) -> None:
    # Counted before they are cut out, which would keep every piece between them.
    if sum(1 for _ in islice(_STRING.finditer(body), MAX_JSON_STRINGS + 1)) > MAX_JSON_STRINGS:
        raise ApiError(400, f"the body has more than {MAX_JSON_STRINGS} strings")
    brackets = _STRING.sub(b"", body).translate(None, _NOT_BRACKETS)
    if len(brackets) > 2 * MAX_JSON_BRACKETS:
        raise ApiError(400, f"the body has more than {MAX_JSON_BRACKETS} objects and lists")
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_JSON_DEPTH:
            raise ApiError(400, f"the body is nested deeper than {MAX_JSON_DEPTH} levels")


def _finite(text: str) -> float:
    """Raises: ValueError for NaN, Infinity, and numbers beyond the largest."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not finite")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_JSON_KEYS:
        raise ApiError(400, f"an object in the body has more than {MAX_JSON_KEYS} keys")
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ApiError(400, f"the key {twice[:100]!r} appears twice in one object")
    return found


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away.

    Why: Starlette watches the connection of streams only, so that an answer nobody waits for would be finished. The web
    server cancels requests when its time to drain is over; their clients are still there and are to be told.
    Raises: ClientGone, Cancelled.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    except asyncio.CancelledError:
        raise Cancelled from None
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, ended by [DONE]; the first event exists already, so that early errors have a status.

    Whatever goes wrong later is told in a last event. The events are closed in every case.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._rest = first, rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await until_disconnect(receive, self._send_events(send))
            last = b""
        except ClientGone:
            scope[STATUS] = CLIENT_GONE
            return
        except Exception as error:
            last = event_bytes(as_api_error(error).body)
        finally:
            await close_iterator(self._rest)
        await send({"type": "http.response.body", "body": last + DONE, "more_body": False})

    async def _send_events(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for event in self._rest:
            await send({"type": "http.response.body", "body": event, "more_body": True})


async def close_iterator(iterator: AsyncIterator[Any]) -> None:
    """Close an iterator that can be closed: generators and engines' streams end their work then."""
    close = getattr(iterator, "aclose", None)
    if close is not None:
        await close()


def event_bytes(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"
