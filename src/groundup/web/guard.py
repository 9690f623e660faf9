"""What stands between the network and both applications: every request passes here before any route sees it.

A server on a laptop is reachable by every web page that its user opens, through a name that resolves to 127.0.0.1 (DNS
rebinding) and through requests from other origins. So the Host must be one of ours, and an Origin must be the Host's.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import socket
import traceback
from collections.abc import Awaitable, Callable, Collection, MutableMapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import psutil

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 * 1024
DRAIN_SECONDS = 2.0
"""How long the rest of a refused body is read and thrown away."""

SECURITY_HEADERS = {
    b"content-security-policy": b"default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    b"object-src 'none'",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    # Not no-referrer: browsers then send `Origin: null` with the forms of our own pages.
    b"referrer-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
}
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[0-9a-z._-]+)(?::[0-9]{1,5})?", re.ASCII)
_BEARER = re.compile(rb"bearer +([\x21-\x7e]+) *", re.IGNORECASE)
_SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}

_logger = logging.getLogger(__name__)


def keys_match(given: str, allowed: Sequence[str]) -> bool:
    """Whether `given` is one of the keys, in a time that depends on neither.

    Why: digests are compared, so that not even a key's length shows; all keys are, so that no place in the list does.
    """
    digest = _digest(given)
    return sum(hmac.compare_digest(digest, _digest(key)) for key in allowed) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def local_hosts(host: str) -> tuple[str, ...]:
    """The Host names under which a server bound to `host` is known: loopback, and the address itself; for 0.0.0.0 and
    :: this machine's name and all its addresses."""
    try:
        is_everywhere = ip_address(host).is_unspecified
    except ValueError:
        is_everywhere = False
    if not is_everywhere:
        return tuple(dict.fromkeys((*LOOPBACK_HOSTS, host.lower())))
    addresses = [
        address.address.partition("%")[0]
        for interface in psutil.net_if_addrs().values()
        for address in interface
        if address.family in (socket.AF_INET, socket.AF_INET6)
    ]
    return tuple(dict.fromkeys((*LOOPBACK_HOSTS, socket.gethostname().lower(), *addresses)))


@dataclass
class _Refusal(Exception):
    status: int
    message: str
    code: str | None = None


class Guard:
    """ASGI middleware: refuses what no route should see, and adds the security headers to every answer.

    `hosts` are names without ports. `public` are the exact paths that may be read without a key; with `keys`, every
    other request needs one. A body is read whole before the application sees the request, within `max_body_bytes` and
    `body_seconds`.
    Why: one that is too large or too slow then never holds anything but its connection.
    """

    def __init__(
        self,
        app: App,
        *,
        hosts: Sequence[str],
        max_body_bytes: int,
        keys: Sequence[str] = (),
        public: Collection[str] = (),
        content_types: Collection[str] = ("application/json",),
        body_seconds: float = 30.0,
    ) -> None:
        self.app = app
        self.hosts = frozenset(host.lower() for host in hosts)
        self.max_body_bytes = max_body_bytes
        self.keys = tuple(keys)
        self.public = frozenset(public)
        self.content_types = frozenset(content_types)
        self.body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        answer = _Answer(send)
        try:
            headers = _headers(scope)
            self._check(scope, headers)
            body = await self._read_body(headers, receive)
        except _Refusal as refusal:
            await _refuse(answer.send, refusal, receive if _has_body(_raw_headers(scope)) else None)
            return
        if body is None:
            return
        try:
            await self.app(scope, _replay(body, receive), answer.send)
        except Exception as error:
            # Without the error's own message, which may quote what the user sent.
            frames = "".join(traceback.format_tb(error.__traceback__))
            _logger.error("%s in a request handler:\n%s", type(error).__name__, frames)
            if not answer.is_started:
                await _refuse(answer.send, _Refusal(500, "The server failed on this request."), None)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if not scope["path"].startswith("/"):
            raise _Refusal(400, "The request target must be a path.")
        host = headers.get(b"host", b"").decode("latin-1").lower()
        match = _HOST.fullmatch(host)
        if match is None or match[1].strip("[]") not in self.hosts:
            raise _Refusal(
                421, "This server is not known under the name in the Host header. Its owner can allow more names."
            )
        self._check_origin(scope, headers, host)
        if self.keys and not (scope["path"] in self.public and scope["method"] in ("GET", "HEAD")):
            bearer = _BEARER.fullmatch(headers.get(b"authorization", b""))
            if bearer is None or not keys_match(bearer[1].decode("latin-1"), self.keys):
                raise _Refusal(
                    401, "A valid API key is required: send the header 'Authorization: Bearer KEY'.", "invalid_api_key"
                )
        if _has_body(headers):
            self._check_body_headers(headers)

    def _check_origin(self, scope: Scope, headers: dict[bytes, bytes], host: str) -> None:
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower() not in (f"http://{host}", f"https://{host}"):
            raise _Refusal(403, "Requests from web pages of other origins are refused.")
        # Browsers that send no Origin (images, scripts, frames) say so here; opening a link to us is fine.
        site = headers.get(b"sec-fetch-site", b"none")
        is_link = (
            scope["method"] in _SAFE_METHODS
            and headers.get(b"sec-fetch-mode") == b"navigate"
            and headers.get(b"sec-fetch-dest") == b"document"
        )
        if site not in (b"none", b"same-origin") and not is_link:
            raise _Refusal(403, "Requests from web pages of other sites are refused.")

    def _check_body_headers(self, headers: dict[bytes, bytes]) -> None:
        content_type = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        if content_type not in self.content_types:
            raise _Refusal(415, f"The Content-Type must be {' or '.join(sorted(self.content_types))}.")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise _Refusal(415, "Compressed bodies are not accepted.")
        if int(headers.get(b"content-length", b"0")) > self.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> _Refusal:
        return _Refusal(413, f"The body may have at most {self.max_body_bytes} bytes.")

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body; None when the client has gone."""
        if not _has_body(headers):
            return b""
        body = bytearray()
        try:
            async with asyncio.timeout(self.body_seconds):
                while True:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        return None
                    body += event.get("body", b"")
                    if len(body) > self.max_body_bytes:
                        raise self._too_large()
                    if not event.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise _Refusal(408, f"The body did not arrive within {self.body_seconds:g} seconds.") from None


class _Answer:
    """Sends an answer with the security headers."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.is_started = False

    async def send(self, event: Event) -> None:
        if event["type"] == "http.response.start":
            self.is_started = True
            headers = [(name, value) for name, value in event.get("headers", []) if name not in SECURITY_HEADERS]
            event = {**event, "headers": [*headers, *SECURITY_HEADERS.items()]}
        await self._send(event)


def _raw_headers(scope: Scope) -> dict[bytes, bytes]:
    return {name.lower(): value for name, value in scope["headers"]}


def _headers(scope: Scope) -> dict[bytes, bytes]:
    """The headers by name; those that decide here may come only once."""
    pairs = scope["headers"]
    if len(pairs) > MAX_HEADERS or sum(len(name) + len(value) for name, value in pairs) > MAX_HEADER_BYTES:
        raise _Refusal(431, f"At most {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes together are accepted.")
    headers = _raw_headers(scope)
    deciding = {b"host", b"origin", b"authorization", b"content-type", b"content-length", b"content-encoding"}
    if sum(name.lower() in deciding for name, _ in pairs) > len(deciding & headers.keys()):
        raise _Refusal(400, "A header that may come only once came twice.")
    return headers


def _has_body(headers: dict[bytes, bytes]) -> bool:
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body in one event, then what comes after it: the client's going away."""
    first: list[Event] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Event:
        return first.pop() if first else await receive()

    return replay


def error_body(status: int, message: str, code: str | None = None) -> bytes:
    """An error in the shape that OpenAI's clients read."""
    kind = {503: "service_unavailable_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


async def _refuse(send: Send, refusal: _Refusal, receive: Receive | None) -> None:
    """Answer; `receive` where a body may still be on its way: it is read and dropped for a while, because a client that
    is still sending when the connection closes never sees the answer."""
    body = error_body(refusal.status, refusal.message, refusal.code)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if receive is not None:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": receive is not None})
    if receive is None:
        return
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            while (await receive()).get("more_body", False):
                pass
    except TimeoutError:
        pass  # it had its time
    await send({"type": "http.response.body", "body": b"", "more_body": False})
