"""Running an application on a loopback port, and talking to it in bytes that no client library would send."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from groundup.web.guard import App
from groundup.web.run import make_server


@dataclass(frozen=True)
class Site:
    """A running server."""

    host: str
    port: int

    @property
    def name(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.name}"


@contextmanager
def running(app: App) -> Iterator[Site]:
    started = threading.Event()
    server = make_server(app, "127.0.0.1", 0, on_started=lambda url: started.set())
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        assert started.wait(60), "the server did not start"
        yield Site("127.0.0.1", int(server.url.rpartition(":")[2]))
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


@dataclass(frozen=True)
class Reply:
    """What came back on a raw connection; `status` is 0 when the server only hung up."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def exchange(site: Site, data: bytes, *, seconds: float = 60.0, half_close: bool = False) -> Reply:
    """Send bytes, read one answer or until the server hangs up."""
    with socket.create_connection((site.host, site.port), timeout=seconds) as connection:
        try:
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it may answer before it has everything
        return read_reply(connection)


def read_reply(connection: socket.socket) -> Reply:
    received = b""
    while not _is_whole(received):
        try:
            more = connection.recv(65536)
        except ConnectionResetError:
            break
        if not more:
            break
        received += more
        if received.startswith(b"HTTP/1.1 100 "):
            received = received.partition(b"\r\n\r\n")[2]
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    if not lines[0].startswith("HTTP/"):
        return Reply(0, {}, received)
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    if headers.get("transfer-encoding") == "chunked":
        body = _unchunk(body)
    elif "content-length" in headers:
        body = body[: int(headers["content-length"])]  # an answer to what came after may follow
    return Reply(int(lines[0].split()[1]), headers, body)


def _is_whole(received: bytes) -> bool:
    head, gap, body = received.partition(b"\r\n\r\n")
    if not gap:
        return False
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(body) >= int(line.split(b":")[1])
        if line.startswith(b"transfer-encoding:"):
            return body.endswith(b"0\r\n\r\n")
    return False


def _unchunk(body: bytes) -> bytes:
    whole = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        count = int(size or b"0", 16)
        if count == 0:
            break
        whole, body = whole + rest[:count], rest[count + 2 :]
    return whole


def request(
    site: Site,
    method: str = "GET",
    target: str = "/",
    headers: dict[str, str | None] | None = None,
    body: bytes | None = None,
) -> bytes:
    """A well-formed request, but for what `headers` say; None leaves a header out."""
    given: dict[str, str | None] = {"Host": site.name}
    if body is not None:
        given |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    if method == "HEAD":
        given["Connection"] = "close"  # the answer's length is not its body's
    given |= headers or {}
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items() if value is not None)]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (body or b"")
