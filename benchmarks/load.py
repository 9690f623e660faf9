"""Load on servers that speak the OpenAI streaming API, and what their users notice of it.

Closed loop: so many users, each of whom asks again as soon as the last answer is complete; it tells how much a server
can do. Open loop: requests arrive at random (Poisson), whether or not earlier ones are answered; it tells how long
people wait, because a server that falls behind does not slow its users down.

The client shares its processor with the server. While load runs it only notes when bytes arrive, and reads them
afterwards; every request has a connection of its own.
"""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import h11
import psutil

TIMEOUT_SECONDS = 120.0
REFUSALS = (429, 503)


@dataclass(frozen=True)
class Target:
    """A server. `pid`: the process whose processor time counts as the server's."""

    host: str
    port: int
    path: str = "/v1/completions"
    pid: int | None = None


@dataclass(frozen=True)
class Request:
    body: bytes
    new_tokens: int
    """The number that the answer must have."""


@dataclass
class Exchange:
    """One request with the bytes of its answer, as they arrived."""

    request: Request
    due: float
    """When it was to be sent; waiting times count from here."""
    sent: float = 0.0
    packets: list[tuple[float, bytes]] = field(default_factory=list)
    failure: str | None = None


@dataclass
class Answer:
    """One answer, read. Times are those of `time.perf_counter`."""

    due: float
    status: int = 0
    text_at: list[float] = field(default_factory=list)
    """When each event that carried text arrived."""
    tokens: int = 0
    finish_reason: str | None = None
    failure: str | None = None

    @property
    def first_token_seconds(self) -> float:
        return self.text_at[0] - self.due

    @property
    def seconds_per_token(self) -> float:
        """Mean over all tokens but the first."""
        return (self.text_at[-1] - self.text_at[0]) / (self.tokens - 1)


@dataclass
class Load:
    """Answers to all requests of a run, and the part of it that counts: `start` to `end`."""

    answers: list[Answer]
    start: float
    end: float
    client_share: float
    """Processor time of the client, in cores."""
    server_share: float | None
    latest: float
    """Most seconds by which a request was sent too late."""

    def counted(self) -> list[Answer]:
        """The answers to requests that came in the part that counts."""
        return [answer for answer in self.answers if self.start <= answer.due < self.end]

    def tokens_per_second(self) -> float:
        """Tokens that arrived in the part that counts, whenever they were asked for."""
        tokens = 0.0
        for answer in self.answers:
            if answer.text_at:
                inside = sum(self.start <= moment < self.end for moment in answer.text_at)
                tokens += answer.tokens * inside / len(answer.text_at)
        return tokens / (self.end - self.start)


class _Connection(asyncio.Protocol):
    def __init__(self, exchange: Exchange, message: bytes) -> None:
        self.exchange = exchange
        self.message = message
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.exchange.sent = time.perf_counter()
        transport.write(self.message)

    def data_received(self, data: bytes) -> None:
        self.exchange.packets.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


def message(target: Target, body: bytes) -> bytes:
    head = (
        f"POST {target.path} HTTP/1.1\r\nHost: {target.host}:{target.port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def send(target: Target, request: Request, due: float) -> Exchange:
    exchange = Exchange(request, due)
    try:
        transport, connection = await asyncio.get_running_loop().create_connection(
            lambda: _Connection(exchange, message(target, request.body)), target.host, target.port
        )
        try:
            await asyncio.wait_for(connection.closed, TIMEOUT_SECONDS)
        finally:
            transport.abort()
    except (OSError, TimeoutError) as error:
        exchange.failure = f"{type(error).__name__}: {error}"
    return exchange


def read(exchange: Exchange) -> Answer:
    """The answer in the bytes of an exchange, with what is wrong with it."""
    answer = Answer(exchange.due, failure=exchange.failure)
    http = h11.Connection(h11.CLIENT)
    http.send(h11.Request(method="POST", target="/", headers=[("Host", "server"), ("Content-Length", "0")]))
    http.send(h11.EndOfMessage())
    rest, is_complete = b"", False
    try:
        for moment, data in exchange.packets:
            http.receive_data(data)
            while (event := http.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                if isinstance(event, h11.Response):
                    answer.status = event.status_code
                elif isinstance(event, h11.Data):
                    *events, rest = (rest + bytes(event.data)).replace(b"\r\n", b"\n").split(b"\n\n")
                    for one in events:
                        is_complete |= _read_event(answer, one, moment)
                else:
                    break
    except (h11.RemoteProtocolError, ValueError) as error:
        answer.failure = answer.failure or f"{type(error).__name__}: {error}"
    if answer.failure is None:
        answer.failure = _fault(answer, exchange.request, is_complete, rest)
    return answer


def _read_event(answer: Answer, event: bytes, moment: float) -> bool:
    """Take over what a server-sent event says; True for the last."""
    for line in event.splitlines():
        if not line.startswith(b"data:"):
            continue
        content = line[5:].strip()
        if content == b"[DONE]":
            return True
        chunk = json.loads(content)
        if "error" in chunk:
            answer.failure = str(chunk["error"])
            continue
        answer.tokens = (chunk.get("usage") or {}).get("completion_tokens", answer.tokens)
        for choice in chunk["choices"]:
            if choice.get("text") or (choice.get("delta") or {}).get("content"):
                answer.text_at.append(moment)
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    return False


def _fault(answer: Answer, request: Request, is_complete: bool, rest: bytes) -> str | None:
    if answer.status in REFUSALS:
        return "refused"
    if answer.status != 200:
        return f"status {answer.status}: {rest[:200].decode(errors='replace')}"
    if not is_complete or not answer.text_at:
        return "the answer was cut off"
    if answer.tokens != request.new_tokens or answer.finish_reason != "length":
        return f"{answer.tokens} tokens instead of {request.new_tokens}, finish reason {answer.finish_reason}"
    return None


# ---- two ways to ask


def closed_loop(target: Target, requests: Iterator[Request], users: int, ramp: float, seconds: float) -> Load:
    """`ramp` seconds to get going, then `seconds` that count, then the answers under way are waited for."""

    async def run(started: float) -> list[Exchange]:
        async def user() -> list[Exchange]:
            exchanges = []
            while (now := time.perf_counter()) < started + ramp + seconds:
                exchanges.append(await send(target, next(requests), now))
            return exchanges

        found = await asyncio.gather(*(user() for _ in range(users)))
        return [exchange for exchanges in found for exchange in exchanges]

    return _measure(target, run, ramp, seconds)


def open_loop(target: Target, requests: Iterator[Request], rate: float, ramp: float, seconds: float, seed: int) -> Load:
    """`rate` requests a second on average; those that come in the first `ramp` seconds do not count."""
    draw, moment = random.Random(seed), 0.0
    arrivals = []
    while (moment := moment + draw.expovariate(rate)) < ramp + seconds:
        arrivals.append((moment, next(requests)))

    async def run(started: float) -> list[Exchange]:
        tasks = []
        for moment, request in arrivals:
            await asyncio.sleep(started + moment - time.perf_counter())
            tasks.append(asyncio.create_task(send(target, request, started + moment)))
        return await asyncio.gather(*tasks)

    return _measure(target, run, ramp, seconds)


def _measure(
    target: Target, run: Callable[[float], Awaitable[Sequence[Exchange]]], ramp: float, seconds: float
) -> Load:
    async def whole() -> Sequence[Exchange]:
        return await run(started)

    client, server = time.process_time(), _cpu_seconds(target)
    started = time.perf_counter()
    exchanges = asyncio.run(whole())
    wall = time.perf_counter() - started
    client_share = (time.process_time() - client) / wall
    after = _cpu_seconds(target)
    server_share = None if server is None or after is None else (after - server) / wall
    latest = max((exchange.sent - exchange.due for exchange in exchanges if exchange.sent), default=0.0)
    answers = [read(exchange) for exchange in exchanges]
    return Load(answers, started + ramp, started + ramp + seconds, client_share, server_share, latest)


def _cpu_seconds(target: Target) -> float | None:
    if target.pid is None:
        return None
    process = psutil.Process(target.pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))
