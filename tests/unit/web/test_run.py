"""The socket, the time-outs and the end, with real processes and signals where these matter."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import Any

import openai
import pytest
from tests.apps.raw_http import Site, exchange, read_reply, request, running

from groundup.base.errors import UserError
from groundup.web import run as run_module
from groundup.web.guard import Guard, local_hosts
from groundup.web.run import make_server

# Says when a request has begun, then answers it slowly; says when it is told to end.
SLOW_APP = """
import asyncio, sys
from groundup.web.run import serve_app

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        print("closing", flush=True)
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"ab", "more_body": True})
    await asyncio.sleep(float(sys.argv[1]))
    await send({"type": "http.response.body", "body": b"cd"})

serve_app(app, "127.0.0.1", 0)
print("returned", flush=True)
"""


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    if scope["path"] == "/large":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(2000):
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
        large_is_sent.set()
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


large_is_sent = threading.Event()


def test_refuses_to_be_open_to_all() -> None:
    for host in ("0.0.0.0", "::", "10.1.2.3"):
        with pytest.raises(UserError, match="API key or accounts"):
            make_server(app, host, 0)


def test_an_open_address_with_a_key() -> None:
    server = make_server(app, "0.0.0.0", 0, is_protected=True)
    assert server.url.startswith("http://0.0.0.0:")
    server._listener.close()


def test_addresses_that_cannot_be_had() -> None:
    with pytest.raises(UserError, match="cannot be resolved"):
        make_server(app, "no-such-host.invalid", 0)
    taken = make_server(app, "127.0.0.1", 0)
    port = int(taken.url.rpartition(":")[2])
    with pytest.raises(UserError, match=f"127.0.0.1:{port}.*\n.*another port"):
        make_server(app, "127.0.0.1", port)
    taken._listener.close()


def test_slow_heads_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a second request's on a connection that was kept, and one that sends a byte now and then."""
    monkeypatch.setattr(run_module, "HEAD_SECONDS", 0.3)
    with running(app) as site:
        with socket.create_connection((site.host, site.port), timeout=60) as connection:
            assert connection.recv(1) == b""
        with socket.create_connection((site.host, site.port), timeout=60) as connection:
            connection.sendall(request(site))
            assert read_reply(connection).status == 200
            with pytest.raises(OSError):
                for _ in range(10_000):
                    connection.sendall(b"G")
                    connection.settimeout(0.02)
                    try:
                        if connection.recv(1) == b"":
                            raise ConnectionResetError
                    except TimeoutError:
                        pass
        # A request that takes longer than that to be answered is not its head's fault.
        assert exchange(site, request(site)).status == 200


def test_idle_connections_live_longer_than_clients_use_them() -> None:
    """Else a request sometimes meets the moment in which its connection closes."""
    assert openai.DEFAULT_CONNECTION_LIMITS.keepalive_expiry is not None
    assert openai.DEFAULT_CONNECTION_LIMITS.keepalive_expiry < run_module.KEEP_ALIVE_SECONDS


def test_clients_that_do_not_read_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the application would wait for ever to send its next piece."""
    monkeypatch.setattr(run_module, "UNREAD_SECONDS", 0.3)
    large_is_sent.clear()
    with running(app) as site, socket.create_connection((site.host, site.port), timeout=60) as connection:
        connection.sendall(request(site, target="/large"))
        assert large_is_sent.wait(60)
        assert exchange(site, request(site)).status == 200


def test_requests_on_too_many_connections_are_told_when_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "MAX_CONNECTIONS", 2)
    with running(app) as site, contextlib.ExitStack() as opened:
        connections = [
            opened.enter_context(socket.create_connection((site.host, site.port), timeout=60)) for _ in range(2)
        ]
        for connection in connections:
            connection.sendall(request(site))
            assert read_reply(connection).status == 200
        for _ in range(3):
            refusal = exchange(site, request(site, "POST", "/", None, b"{}"))
            assert refusal.status == 503
            assert int(refusal.headers["retry-after"]) >= 1
            assert refusal.json()["error"]["type"] == "service_unavailable_error"
            assert refusal.headers["connection"] == "close"
            assert "content-security-policy" in refusal.headers
        connections[0].close()
        while exchange(site, request(site)).status != 200:  # until the server has seen that there is room
            pass


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 1000,
        b"x" * 100_000,
        b"\r\n" * 50_000,
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\n\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET / HTTP/1.1\r\nA\0: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    ],
    ids=range(13),
)
def test_garbage_is_answered_in_our_shape(garbage: bytes) -> None:
    with running(Guard(app, hosts=local_hosts("127.0.0.1"), max_body_bytes=10)) as site:
        reply = exchange(site, garbage, half_close=True)
        assert reply.status in (0, 400, 421)
        if reply.status:
            assert reply.json()["error"]["type"] == "invalid_request_error"
            assert "content-security-policy" in reply.headers
        assert exchange(site, request(site)).status == 200


def start(seconds: float) -> tuple["subprocess.Popen[str]", Site]:
    process = subprocess.Popen([sys.executable, "-c", SLOW_APP, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("Serving at http://127.0.0.1:")
    return process, Site("127.0.0.1", int(line.rpartition(":")[2]))


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_end(sig: signal.Signals) -> None:
    process, site = start(1.5)
    with socket.create_connection((site.host, site.port), timeout=60) as connection:
        connection.sendall(request(site))
        received = connection.recv(1000)
        process.send_signal(sig)
        while b"abcd" not in received:
            more = connection.recv(1000)
            assert more, received
            received += more
    assert process.wait(60) == 0
    assert process.stdout is not None
    assert process.stdout.read() == "closing\nreturned\n"


def test_a_second_signal_ends_at_once() -> None:
    process, site = start(10_000)
    with socket.create_connection((site.host, site.port), timeout=60) as connection:
        connection.sendall(request(site))
        assert connection.recv(1000)
        process.send_signal(signal.SIGTERM)
        # uvicorn stops listening once it has seen the first signal.
        while _listens(site):
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert process.stdout is not None
    assert process.stdout.read() == ""


def _listens(site: Site) -> bool:
    try:
        os.close(socket.create_connection((site.host, site.port), timeout=5).detach())
    except OSError:
        return False
    return True
