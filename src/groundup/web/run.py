"""Running an application: the listening socket, time-outs, the end."""

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from groundup.base.errors import UserError
from groundup.web.guard import MAX_HEADER_BYTES, SECURITY_HEADERS, App, Receive, Scope, Send, error_body

HEAD_SECONDS = 10.0
"""Longest time from a connection's opening, or from a request's first byte, to the end of its headers."""
UNREAD_SECONDS = 60.0
"""A client that takes nothing of its answer for so long has gone."""
KEEP_ALIVE_SECONDS = 20
"""Of an idle connection. Why longer than the 5 s after which OpenAI's client uses none again: a request would now and
then meet the very moment of closing."""
DRAIN_SECONDS = 8
"""What open requests get to end when the server stops; the application's own end comes after."""
MAX_CONNECTIONS = 900
"""Requests on further ones are answered 503."""
FULL_RETRY_SECONDS = 2


def serve_app(
    app: App, host: str, port: int, *, is_protected: bool = False, on_started: Callable[[str], None] | None = None
) -> None:
    """Serve until SIGINT or SIGTERM, which let open requests end; a second signal ends the process at once.

    Port 0 takes a free one. `on_started` gets the address once requests are answered; without it, it is printed.
    `is_protected` says that the application asks for keys or passwords.
    Raises: UserError when the address cannot be had, or is not loopback and the application is not protected.
    """
    make_server(app, host, port, is_protected=is_protected, on_started=on_started).run()


def make_server(
    app: App, host: str, port: int, *, is_protected: bool = False, on_started: Callable[[str], None] | None = None
) -> "Server":
    """As `serve_app`, not running yet; `should_exit = True` ends it as a signal does."""
    listener = _listen(host, port, is_protected)
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        loop="asyncio",
        log_config=None,
        # The log of requests is the application's: it knows what is private in a path.
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )
    return Server(config, listener, on_started or (lambda url: print(f"Serving at {url}", flush=True)))


def _listen(host: str, port: int, is_protected: bool) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"host = {host!r} cannot be resolved ({error})", "use 127.0.0.1") from None
    if not is_protected and not ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise UserError(
            f"host = {host!r} can be reached from other machines, and nothing asks who is there",
            "configure an API key or accounts, or use 127.0.0.1",
        )
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(f"cannot listen on {host}:{port}: {error}", "use another port; 0 takes a free one") from None
    return listener


class Server(uvicorn.Server):
    """uvicorn's, on a socket that is open already; it returns after a signal, and ends at once after a second one."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket, on_started: Callable[[str], None]) -> None:
        super().__init__(config)
        self._listener = listener
        self._on_started = on_started
        host, port = listener.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run([self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started(self.url)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Why: uvicorn's raises the signal again at the end, and the process dies before its caller has cleaned up."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in handlers.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True


class _Protocol(H11Protocol):
    """uvicorn's, with time-outs for a request's head and for clients that do not read, and errors in our shape."""

    _head_timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Not the configuration's, which another logging set-up in the same process can undo.
        self.access_log = False
        self._time_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()

    def handle_events(self) -> None:
        """Why not uvicorn's own limit: it answers with plain text, and not when to come again."""
        self.app = _answer_full if len(self.connections) > MAX_CONNECTIONS else self.config.loaded_app
        super().handle_events()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_unread_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_timer = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_unread_timer()

    def _time_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_unread_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def send_400_response(self, msg: str) -> None:
        """Why: uvicorn's answer is plain text, and fails when the broken bytes are the body of an open request."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = error_body(400, msg)
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
                *SECURITY_HEADERS.items(),
            ]
            head = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


async def _answer_full(scope: Scope, receive: Receive, send: Send) -> None:
    body = error_body(503, "too many connections are open; try again later", "too_many_connections")
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", str(FULL_RETRY_SECONDS).encode()),
        (b"connection", b"close"),
        *SECURITY_HEADERS.items(),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
