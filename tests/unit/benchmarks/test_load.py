"""The load generator of benchmarks/, against servers that answer in known ways."""

import asyncio
import contextlib
import importlib.util
import itertools
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOKEN_SECONDS = 0.01


@pytest.fixture(scope="module")
def load(root: Path) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("load", root / "benchmarks" / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["load"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["load"]


def chunk(text: str, finish: str | None = None, **fields: Any) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice], **fields})}\n\n".encode()


def usage(tokens: int) -> bytes:
    return f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': tokens}})}\n\n".encode()


DONE = b"data: [DONE]\n\n"


def http(body: bytes, status: str = "200 OK", size: int = 40) -> bytes:
    """A chunked answer, in chunks that do not end where events do."""
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    chunks = b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts)
    head = f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    return head.encode() + chunks + b"0\r\n\r\n"


def read(load: ModuleType, data: bytes, asked: int = 3, split: int = 7) -> Any:
    """Read an answer whose n-th packet, of `split` bytes, arrived at second n."""
    exchange = load.Exchange(load.Request(b"", asked), due=-1.0)
    starts = range(0, len(data), split)
    exchange.packets = [(float(number), data[start : start + split]) for number, start in enumerate(starts)]
    return load.read(exchange)


@pytest.mark.parametrize("split", [1, 7, 64, 100_000])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_an_answer_is_read_however_its_bytes_are_cut(load: ModuleType, split: int, newline: bytes) -> None:
    body = chunk("") + chunk("a") + chunk("b") + chunk("c", "length") + usage(3) + DONE
    data = http(body.replace(b"\n", newline))
    answer = read(load, data, split=split)
    assert (answer.failure, answer.status, answer.tokens, answer.finish_reason) == (None, 200, 3, "length")
    assert len(answer.text_at) == 3
    assert answer.text_at == sorted(answer.text_at)
    if split == 1:  # then the n-th byte came at second n, so that the event's last byte tells when it was complete
        ends = [data.index(b'"text": "%c"' % letter) for letter in b"abc"]
        assert all(0 < moment - end < 100 for moment, end in zip(answer.text_at, ends, strict=True))


def test_times_are_those_of_the_first_and_last_text(load: ModuleType) -> None:
    exchange = load.Exchange(load.Request(b"", 3), due=10.0)
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    exchange.packets = [
        (11.0, head + chunk("")), (12.0, chunk("a")), (13.0, chunk("")), (14.0, chunk("b")),
        (16.0, chunk("c", "length")), (20.0, usage(3) + DONE),
    ]  # fmt: skip
    answer = load.read(exchange)
    assert answer.first_token_seconds == 2.0
    assert answer.seconds_per_token == 2.0  # 3 tokens, from 12 to 16


WRONG = {
    "cut off": (http(chunk("a") + chunk("b", "length") + usage(3)), "cut off"),
    "no end": (http(chunk("a") + DONE)[:-20], "cut off"),
    "nothing": (b"", "status 0"),
    "too short": (http(chunk("a", "length") + usage(2) + DONE), "2 tokens instead of 3"),
    "stopped": (http(chunk("a", "stop") + usage(3) + DONE), "finish reason stop"),
    "no usage": (http(chunk("a", "length") + DONE), "0 tokens instead of 3"),
    "full": (http(b'{"error": {}}', "429 Too Many Requests"), "refused"),
    "busy": (http(b'{"error": {}}', "503 Service Unavailable"), "refused"),
    "wrong": (http(b'{"error": {}}', "400 Bad Request"), "status 400"),
    "late error": (http(chunk("a") + b'data: {"error": {"message": "broken"}}\n\n' + DONE), "broken"),
    "no JSON": (http(b"data: {\n\n" + DONE), "JSONDecodeError"),
    "no HTTP": (b"SSH-2.0-OpenSSH\r\n\r\n", "RemoteProtocolError"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_what_is_no_whole_answer_is_a_failure(load: ModuleType, case: str) -> None:
    data, expected = WRONG[case]
    failure = read(load, data).failure
    assert failure is not None
    assert expected in failure


class Counting:
    """A server on a thread of its own that writes tokens at a fixed pace and counts who is there."""

    def __init__(self) -> None:
        self.now = self.most = self.total = 0
        self.requests: list[bytes] = []
        self.port = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.now, self.total = self.now + 1, self.total + 1
        self.most = max(self.most, self.now)
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        body = await reader.readexactly(size)
        self.requests.append(body)
        tokens = json.loads(body)["max_tokens"]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for number in range(tokens):
            await asyncio.sleep(TOKEN_SECONDS)
            writer.write(chunk("a", "length" if number == tokens - 1 else None))
        writer.write(usage(tokens) + DONE)
        self.now -= 1
        writer.close()

    def __enter__(self) -> "Counting":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        with contextlib.suppress(RuntimeError):
            self._loop.close()


def requests(load: ModuleType, tokens: int) -> Iterator[Any]:
    return (load.Request(json.dumps({"max_tokens": tokens, "n": n}).encode(), tokens) for n in itertools.count())


def test_a_closed_loop_keeps_so_many_users_and_counts_its_window(load: ModuleType) -> None:
    with Counting() as server:
        found = load.closed_loop(load.Target("127.0.0.1", server.port), requests(load, 4), 3, 0.2, 0.6)
    assert server.most == 3
    assert len(found.answers) == server.total >= 6
    assert [answer.failure for answer in found.answers] == [None] * server.total
    assert len(set(server.requests)) == server.total, "a request was sent twice"
    assert found.end - found.start == pytest.approx(0.6)
    inside = [moment for answer in found.answers for moment in answer.text_at if found.start <= moment < found.end]
    assert found.tokens_per_second() == pytest.approx(len(inside) / 0.6)
    assert len(inside) < 4 * server.total, "nothing came before or after the window"
    assert all(found.start <= answer.due < found.end for answer in found.counted())
    assert 0 < len(found.counted()) < server.total


def test_an_open_loop_sends_at_its_moments_whatever_is_unanswered(load: ModuleType) -> None:
    """120 tokens take at least 1.2 s, so all requests that come within 0.6 s are under way together."""
    with Counting() as server:
        target = load.Target("127.0.0.1", server.port)
        first = load.open_loop(target, requests(load, 120), 20, 0.2, 0.4, seed=1)
        again = load.open_loop(target, requests(load, 120), 20, 0.2, 0.4, seed=1)
    assert len(first.answers) == len(again.answers) > 3
    assert server.most == len(first.answers)
    offsets = [[answer.due - found.start for answer in found.answers] for found in (first, again)]
    assert offsets[0] == pytest.approx(offsets[1], abs=1e-6)
    assert all(answer.first_token_seconds > TOKEN_SECONDS / 2 for answer in first.answers)


def test_arrivals_are_poisson(load: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaps have the mean 1 / rate and the same standard deviation."""
    dues: list[float] = []

    async def note(target: object, request: object, due: float) -> Any:
        dues.append(due)
        return load.Exchange(request, due)

    async def no_sleep(seconds: float) -> None:
        pass

    monkeypatch.setattr(load, "send", note)
    monkeypatch.setattr(load.asyncio, "sleep", no_sleep)
    load.open_loop(load.Target("127.0.0.1", 1), requests(load, 1), 50, 0, 100, seed=3)
    gaps = [b - a for a, b in itertools.pairwise(sorted(dues))]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 50, rel=0.05)
    assert deviation == pytest.approx(1 / 50, rel=0.06)


def test_a_server_that_is_not_there_is_a_failure(load: ModuleType) -> None:
    found = load.closed_loop(load.Target("127.0.0.1", 1), iter(list(itertools.islice(requests(load, 1), 1))), 1, 0, 0)
    assert found.answers == []
    started = time.perf_counter()
    exchange = asyncio.run(load.send(load.Target("127.0.0.1", 1), load.Request(b"{}", 1), started))
    assert load.read(exchange).failure.startswith("ConnectionRefusedError")
