"""The guard over a real socket, in front of an application that would answer everything."""

import asyncio
import json
import socket
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
from tests.apps.raw_http import Reply, Site, exchange, read_reply, request, running

from groundup.web import guard as guard_module
from groundup.web.guard import MAX_HEADERS, SECURITY_HEADERS, Guard, error_body, keys_match, local_hosts

LIMIT = 1000


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers any request with what it got; /fail fails, /cut fails after it has begun to answer."""
    if scope["type"] == "lifespan":
        assert (await receive())["type"] == "lifespan.startup"
        await send({"type": "lifespan.startup.complete"})
        assert (await receive())["type"] == "lifespan.shutdown"
        await send({"type": "lifespan.shutdown.complete"})
        return
    event = await receive()
    if scope["path"] == "/fail":
        raise RuntimeError(f"the prompt was {event['body']!r}")
    assert not event["more_body"]
    body = json.dumps({"path": scope["path"], "bytes": len(event["body"])}).encode()
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", b"application/json"), (b"content-security-policy", b"default-src *")],
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": scope["path"] == "/cut"})
    if scope["path"] == "/cut":
        raise RuntimeError(f"the prompt was {event['body']!r}")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with running(Guard(echo, hosts=local_hosts("127.0.0.1"), max_body_bytes=LIMIT, body_seconds=0.3)) as site:
        yield site


@pytest.fixture(scope="module")
def locked() -> Iterator[Site]:
    guard = Guard(
        echo,
        hosts=local_hosts("127.0.0.1"),
        max_body_bytes=LIMIT,
        keys=["other-key", "sk-key"],
        public=["/", "/health", "/page.js"],
    )
    with running(guard) as site:
        yield site


def assert_refused(reply: Reply, status: int) -> None:
    """An error in the usual shape, with the security headers."""
    assert reply.status == status, reply
    assert set(reply.json()) == {"error"}
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert_guarded(reply)


def assert_guarded(reply: Reply) -> None:
    for name, value in SECURITY_HEADERS.items():
        assert reply.headers[name.decode()] == value.decode().lower()


def test_lets_through_with_headers(site: Site) -> None:
    reply = exchange(site, request(site, "POST", "/x", body=b"{}"))
    assert (reply.status, reply.json()) == (200, {"path": "/x", "bytes": 2})
    assert_guarded(reply)
    assert "server" not in reply.headers
    policy = SECURITY_HEADERS[b"content-security-policy"]
    assert b"default-src 'self'" in policy
    assert b"frame-ancestors 'none'" in policy
    assert b"unsafe" not in policy


# ---- keys


def test_keys_match() -> None:
    assert keys_match("b", ["a", "b"])
    assert keys_match("ключ", ["ключ"])
    assert keys_match("\udcff", ["\udcff"])
    for given in ("", "c", "a ", "ab", "A", "a\0"):
        assert not keys_match(given, ["a", "b"])
    assert not keys_match("", [])


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys are compared, whichever matches, in the one function that takes equal time."""
    compared = []
    real = guard_module.hmac.compare_digest

    def counted(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr(guard_module.hmac, "compare_digest", counted)
    for given in ("first", "second", "third", "nothing at all like a key", ""):
        compared.clear()
        keys_match(given, ["first", "second", "third"])
        assert compared == [(32, 32)] * 3


def test_key_is_required(locked: Site) -> None:
    assert (
        exchange(locked, request(locked, target="/v1/models", headers={"Authorization": "Bearer sk-key"})).status == 200
    )
    assert exchange(locked, request(locked, target="/x", headers={"Authorization": "bearer  other-key"})).status == 200
    for value in (
        None, "", "Bearer", "Bearer ", "Bearer wrong", "Bearer sk-key2", "Bearer sk-ke", "Bearer SK-KEY", "sk-key",
        "Basic sk-key", "Bearer sk-key other-key", "Bearer sk-key, other-key", "Bearer\tsk-key\xa0", "Bearer \xe9",
        "Bearer " + "a" * 9000, "Bearer None", "Bearer null", "Bearer undefined", "Token sk-key", "Bearer:sk-key",
    ):  # fmt: skip
        reply = exchange(locked, request(locked, target="/v1/models", headers={"Authorization": value}))
        assert_refused(reply, 401)
        assert reply.headers["www-authenticate"] == "bearer"
        assert reply.json()["error"]["code"] == "invalid_api_key"
    twice = f"GET / HTTP/1.1\r\nHost: {locked.name}\r\nAuthorization: Bearer sk-key\r\nAuthorization: Bearer x\r\n\r\n"
    assert_refused(exchange(locked, twice.encode()), 400)


def test_public_paths_are_exact(locked: Site) -> None:
    for path in ("/", "/health", "/page.js", "/health?x=1"):
        assert exchange(locked, request(locked, target=path)).status == 200
        assert_refused(exchange(locked, request(locked, "POST", path, body=b"{}")), 401)
    assert_refused(exchange(locked, request(locked, "OPTIONS", "/health")), 401)


PATHS = ["/v1/models", "/v1/chat/completions", "/metrics", "/docs", "/openapi.json"]
TRICKS = [
    "{path}", "/{path}", "//{path}", "{path}/", "{path}//", "/.{path}", "/health/..{path}", "/health{path}",
    "/page.js{path}", "/health%2f..{path}", "/%2e%2e{path}", "/health;{path}", "{path};/health", "{path}?/health",
    "{path}%3f/health", "{path}%23/health", "{path}%00", "/health%00{path}", "{path}%20", "%20{path}",
    "/health%20{path}", "/HEALTH{path}", "/\\{path}", "/health/%2e%2e/{path}", "{path}/../health",
    "{path}%2f..%2fhealth", "/%68ealth{path}", "/health%0d%0a{path}", "http://localhost/health{path}",
    "/health/.{path}", "/./health{path}", "/health/", "/HEALTH", "/health.", "//health", "/%2fhealth", "/health%2f",
    "/health#x",
]  # fmt: skip
HEADERS: list[dict[str, str | None]] = [
    {},
    {
        "X-Forwarded-For": "127.0.0.1",
        "X-Forwarded-Host": "localhost",
        "X-Original-URL": "/health",
        "X-Rewrite-URL": "/",
    },
    {"X-HTTP-Method-Override": "GET", "Forwarded": "for=127.0.0.1;host=localhost", "X-Real-IP": "127.0.0.1"},
]


def test_two_hundred_path_tricks_reach_nothing(locked: Site) -> None:
    """No spelling of a path and no forwarding header gets past the key."""
    tricks = [(path, trick, extra) for path, trick, extra in product(PATHS, TRICKS, HEADERS[:2])]
    assert len(tricks) >= 200
    for path, trick, extra in tricks:
        target = trick.format(path=path)
        reply = exchange(locked, request(locked, target=target, headers=extra))
        assert reply.status in (400, 401), (target, reply)
    for method, extra in product(
        ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "get", "X"], HEADERS
    ):
        assert exchange(locked, request(locked, method, "/v1/models", extra)).status == 401


@pytest.mark.parametrize("target", ["*", "localhost:80", "http://localhost/x", "http://127.0.0.1/health", "x", "?"])
def test_targets_that_are_no_paths(locked: Site, target: str) -> None:
    assert_refused(exchange(locked, request(locked, target=target, headers={"Authorization": "Bearer sk-key"})), 400)


# ---- hosts and origins


def test_local_hosts() -> None:
    assert local_hosts("127.0.0.1") == ("localhost", "127.0.0.1", "::1")
    assert local_hosts("Example.lan") == ("localhost", "127.0.0.1", "::1", "example.lan")
    everywhere = local_hosts("0.0.0.0")
    assert socket.gethostname().lower() in everywhere
    assert "0.0.0.0" not in everywhere
    assert local_hosts("::") == everywhere


def test_hosts_that_are_ours(site: Site) -> None:
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1", f"127.0.0.1:{site.port}", "[::1]:8000", "[::1]"):
        assert exchange(site, request(site, headers={"Host": host})).status == 200


BAD_HOSTS = [
    "evil.example", "evil.example:8000", "localhost.evil.example", "evil-localhost", "127.0.0.1.nip.io", "127.1",
    "0.0.0.0", "2130706433", "0x7f000001", "127.0.0.2", "10.0.0.1", "[::]", "[::ffff:127.0.0.1]", "localhost.",
    "localhost:", "localhost:x", "localhost:80:80", "a@localhost", "localhost@evil.example", "localhost/evil",
    "localhost\\evil", "localhost,evil.example", "localhost evil", "", " ", "::1", "[::1", "ｌocalhost", "loc%61lhost",
    "localhost#", "http://localhost",
]  # fmt: skip


@pytest.mark.parametrize("host", BAD_HOSTS)
def test_foreign_hosts_are_refused(site: Site, host: str) -> None:
    for method, body in (("GET", None), ("POST", b"{}")):
        data = request(site, method, "/v1/models", {"Host": "HERE"}, body).replace(b"HERE", host.encode())
        assert exchange(site, data).status in (400, 421)


def test_host_must_be_there_once(site: Site) -> None:
    for head in ("GET / HTTP/1.0\r\n", "GET / HTTP/1.1\r\n", f"GET / HTTP/1.1\r\nHost: {site.name}\r\nHost: evil\r\n"):
        assert exchange(site, head.encode() + b"\r\n").status in (400, 421)
    assert exchange(site, f"GET / HTTP/1.0\r\nHost: {site.name}\r\n\r\n".encode()).status == 200


BAD_ORIGINS = [
    "http://evil.example", "https://evil.example", "null", "NULL", "", "file://", "http://localhost", "http://127.0.0.1:1",
    "http://localhost:PORT", "http://127.0.0.1:PORT.evil.example", "http://evil.example/127.0.0.1:PORT",
    "http://127.0.0.1:PORT@evil.example", "ftp://127.0.0.1:PORT", "127.0.0.1:PORT", "http://127.0.0.1:PORT/",
    "http://127.0.0.1:PORT http://evil.example", "moz-extension://x", "http://[::1]:PORT", "*",
]  # fmt: skip


@pytest.mark.parametrize("origin", BAD_ORIGINS)
def test_foreign_origins_are_refused(site: Site, origin: str) -> None:
    headers: dict[str, str | None] = {"Origin": origin.replace("PORT", str(site.port))}
    for method, body in (("GET", None), ("OPTIONS", None), ("POST", b"{}"), ("DELETE", None)):
        reply = exchange(site, request(site, method, "/v1/models", headers, body))
        assert_refused(reply, 403)
        assert not [name for name in reply.headers if name.startswith("access-control")]


def test_own_origin(site: Site) -> None:
    for scheme in ("http", "https"):  # https: behind a proxy that ends TLS
        headers: dict[str, str | None] = {"Origin": f"{scheme}://{site.name}", "Sec-Fetch-Site": "same-origin"}
        assert exchange(site, request(site, "POST", headers=headers, body=b"{}")).status == 200


def test_other_sites_may_only_link(site: Site) -> None:
    link: dict[str, str | None] = {
        "Sec-Fetch-Site": "cross-site",
        "Sec-Fetch-Mode": "navigate",
        "Sec-Fetch-Dest": "document",
    }
    assert exchange(site, request(site, headers=link)).status == 200
    assert exchange(site, request(site, "POST", headers=link, body=b"{}")).status == 403
    for change in ({"Sec-Fetch-Dest": "iframe"}, {"Sec-Fetch-Mode": "no-cors"}, {"Sec-Fetch-Dest": None}):
        for who in ("cross-site", "same-site", "anything"):
            assert exchange(site, request(site, headers={**link, **change, "Sec-Fetch-Site": who})).status == 403


# ---- bodies and headers


def chunked(site: Site, *chunks: bytes) -> bytes:
    head = request(site, "POST", headers={"Content-Type": "application/json", "Transfer-Encoding": "chunked"})
    return head + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)


def test_body_limit(site: Site) -> None:
    for size, status in ((LIMIT - 1, 200), (LIMIT, 200), (LIMIT + 1, 413), (100 * LIMIT, 413)):
        assert exchange(site, request(site, "POST", body=b"x" * size)).status == status
        pieces = [b"x" * 100] * (size // 100) + ([b"x" * (size % 100)] if size % 100 else [])
        assert exchange(site, chunked(site, *pieces, b"")).status == status


@pytest.mark.parametrize("declared", [LIMIT + 1, 10**9, 10**19])
def test_declared_size_is_refused_before_the_body_comes(site: Site, declared: int) -> None:
    reply = exchange(site, request(site, "POST", headers={"Content-Length": str(declared)}, body=b"x"))
    assert_refused(reply, 413)
    assert reply.headers["connection"] == "close"


def test_endless_body(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer comes at once, and the connection ends although the client would send for ever."""
    monkeypatch.setattr(guard_module, "DRAIN_SECONDS", 0.2)
    with socket.create_connection((site.host, site.port), timeout=60) as connection:
        connection.sendall(chunked(site, b"x" * (LIMIT + 1)))
        assert read_reply(connection).status == 413
        with pytest.raises(OSError):
            for _ in range(100_000):
                connection.sendall(b"%x\r\n%s\r\n" % (1000, b"x" * 1000))


def test_slow_body(site: Site) -> None:
    with socket.create_connection((site.host, site.port), timeout=60) as connection:
        connection.sendall(request(site, "POST", headers={"Content-Length": "100"}, body=b"x"))
        assert_refused(read_reply(connection), 408)


def test_bad_lengths(site: Site) -> None:
    for length in ("-1", "+1", "1e3", "0x10", "", " ", "1 1", "9" * 30, "1, 2"):
        data = request(site, "POST", headers={"Content-Length": length}, body=b"{}")
        assert exchange(site, data).status in (400, 413)
    broken = request(site, "POST", headers={"Content-Type": "application/json", "Transfer-Encoding": "chunked"})
    for chunk in (b"zz\r\n", b"-1\r\nx\r\n", b"ffffffffffffffffffffff\r\n", b"2\r\nxxxx\r\n0\r\n\r\n"):
        reply = exchange(site, broken + chunk)
        assert reply.status in (0, 400)


def test_content_types(site: Site) -> None:
    for good in ("application/json", "Application/JSON; charset=utf-8"):
        assert exchange(site, request(site, "POST", headers={"Content-Type": good}, body=b"{}")).status == 200
    for bad in (
        None, "", "text/plain", "text/plain; application/json", "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded", "application/jsonx", "application/json, text/plain",
        "application/json\x0b",
    ):  # fmt: skip
        assert exchange(site, request(site, "POST", headers={"Content-Type": bad}, body=b"{}")).status in (400, 415)
    for coding in ("gzip", "deflate", "br", "zstd", "gzip, identity"):
        assert_refused(exchange(site, request(site, "POST", headers={"Content-Encoding": coding}, body=b"{}")), 415)


def test_header_limits(site: Site) -> None:
    few: dict[str, str | None] = {f"X-{i}": "y" for i in range(MAX_HEADERS - 1)}
    assert exchange(site, request(site, headers=few)).status == 200
    assert_refused(exchange(site, request(site, headers={**few, "X-more": "y"})), 431)
    assert exchange(site, request(site, headers={"X": "y" * 30_000})).status == 200
    for size in (40_000, 200_000, 2_000_000):
        assert exchange(site, request(site, headers={"X": "y" * size})).status in (0, 400, 431)
    assert exchange(site, request(site, target="/" + "a" * 2_000_000)).status in (0, 400, 414, 431)


# ---- the rest


def test_failures_do_not_quote_the_request(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    reply = exchange(site, request(site, "POST", "/fail", body=b"my secret"))
    assert_refused(reply, 500)
    assert b"secret" not in reply.body
    reply = exchange(site, request(site, "POST", "/cut", body=b"my secret"))
    assert reply.status == 200
    assert "RuntimeError in a request handler" in caplog.text
    assert "test_guard.py" in caplog.text
    assert "my secret" not in caplog.text


def test_websockets_are_closed() -> None:
    sent = []

    async def send(event: Any) -> None:
        sent.append(event)

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    guard = Guard(echo, hosts=["localhost"], max_body_bytes=LIMIT)
    asyncio.run(guard({"type": "websocket", "path": "/", "headers": [(b"host", b"localhost")]}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_client_that_leaves_before_its_body_is_whole(site: Site) -> None:
    for _ in range(20):
        with socket.create_connection((site.host, site.port)) as connection:
            connection.sendall(request(site, "POST", headers={"Content-Length": "100"}, body=b"x"))
    assert exchange(site, request(site)).status == 200


def test_error_body() -> None:
    assert json.loads(error_body(400, 'a "b"\n'))["error"]["message"] == 'a "b"\n'
    assert json.loads(error_body(500, "x"))["error"]["type"] == "server_error"
    assert json.loads(error_body(503, "x"))["error"]["type"] == "service_unavailable_error"
