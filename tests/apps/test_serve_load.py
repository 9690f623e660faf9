"""The server under load: clients that leave, more of them than fit, an engine that hangs, hours of both."""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from tests.apps.raw_http import Site, exchange, request, running
from tests.apps.small_model import save_small_model

from groundup.base.generation import Delta
from groundup.infer.engine import Engine
from groundup.model.checkpoint import Checkpoint, load_checkpoint
from groundup.serve.app import create_app
from groundup.serve.config import ServeConfig
from groundup.serve.engine_backend import EngineBackend

CHAT = "/v1/chat/completions"
QUESTIONS = ["the dog", "the green river", "a song", "quiet king and the old house", "forest", "near", "the the", "and"]
NEW_TOKENS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return load_checkpoint(folder)


@dataclass
class Server:
    site: Site
    engine: Engine
    backend: EngineBackend


@contextmanager
def serving(checkpoint: Checkpoint, engine: Engine, queue: int, **options: Any) -> Iterator[Server]:
    backend = EngineBackend("small", engine, checkpoint.tokenizer, checkpoint.chat, {}, queue=queue, **options)
    with running(create_app({"small": backend}, ServeConfig(drain_seconds=1))) as site:
        yield Server(site, engine, backend)


def body(question: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    # The end-of-sequence token is ruled out, so that every answer is long.
    sampling = {"temperature": 0, "max_tokens": NEW_TOKENS, "logit_bias": {"2": -100}}
    return {"model": "small", "messages": messages, **sampling, **fields}


def ask(site: Site, question: str) -> str:
    reply = exchange(site, request(site, "POST", CHAT, None, json.dumps(body(question)).encode()))
    assert reply.status == 200, reply
    return str(reply.json()["choices"][0]["message"]["content"])


def wait_until(is_done: Callable[[], bool], what: str) -> None:
    for _ in range(3000):
        if is_done():
            return
        time.sleep(0.02)
    raise AssertionError(f"waited in vain until {what}")


async def read_answer(site: Site, question: str, is_stream: bool, leave_after: float | None) -> str | None:
    """The text of the answer; None for a client that left after so much of it (0: before its first byte)."""
    data = json.dumps(body(question, stream=is_stream)).encode()
    reader, writer = await asyncio.open_connection(site.host, site.port)
    try:
        writer.write(request(site, "POST", CHAT, {"Connection": "close"}, data))
        await writer.drain()
        if leave_after is not None:
            if leave_after == 0 or not is_stream:
                await asyncio.sleep(random.Random(question).random() * 0.05)
            for _ in range(int(leave_after * NEW_TOKENS) if is_stream else 0):
                await reader.readline()
            return None
        received = await reader.read()
    finally:
        writer.close()
    head, _, rest = received.partition(b"\r\n\r\n")
    assert b" 200 " in head.split(b"\r\n")[0], received[:500]
    if not is_stream:
        return str(json.loads(rest)["choices"][0]["message"]["content"])
    events = [json.loads(event) for event in re.findall(rb"data: (\{.*\})\n", rest)]
    assert rest.count(b"data: [DONE]") == 1
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


def disconnect_round(server: Server, expected: dict[str, str], seed: int) -> None:
    """200 clients at once, streaming and not, of which 3 in 10 leave: before, at the start or in the midst."""
    rng = random.Random(seed)
    plan = [
        (rng.choice(QUESTIONS), rng.random() < 0.6, rng.choice([0.0, 0.1, 0.5, 0.9]) if rng.random() < 0.3 else None)
        for _ in range(200)
    ]
    assert sum(leave is not None for _, _, leave in plan) > 40

    async def all_at_once() -> list[str | None]:
        return await asyncio.gather(*(read_answer(server.site, *client) for client in plan))

    for (question, _, leave), text in zip(plan, asyncio.run(all_at_once()), strict=True):
        assert text == (expected[question] if leave is None else None)
    wait_until(lambda: not server.backend.stats().active, "all slots are free")
    assert (server.engine.num_active, server.engine.num_waiting) == (0, 0)
    assert not any(slot.is_taken for slot in server.engine.slots._slots)
    assert not server.backend._open
    assert not server.backend._streams
    assert ask(server.site, QUESTIONS[0]) == expected[QUESTIONS[0]]


def disconnect_rounds(checkpoint: Checkpoint, rounds: int) -> None:
    with serving(checkpoint, Engine(checkpoint.model, checkpoint.tokenizer, max_slots=8), queue=256) as server:
        expected = {question: ask(server.site, question) for question in QUESTIONS}
        assert len(set(expected.values())) == len(QUESTIONS)
        for seed in range(rounds):
            disconnect_round(server, expected, seed)


def test_two_hundred_streams_with_disconnects(checkpoint: Checkpoint) -> None:
    disconnect_rounds(checkpoint, 1)


@pytest.mark.slow
def test_twenty_rounds_of_disconnects(checkpoint: Checkpoint) -> None:
    disconnect_rounds(checkpoint, 20)


class SteadyEngine(Engine):
    """Takes a while for each step, as one with a large model does."""

    step_seconds = 0.005
    gate: threading.Event | None = None

    def step(self) -> list[Delta]:
        time.sleep(self.step_seconds)
        if self.gate is not None:
            self.gate.wait(60)
        return super().step()


def test_four_times_as_many_as_fit(checkpoint: Checkpoint) -> None:
    """Those who are let in get their whole answer; the others are told at once, and when to come again."""
    slots, queue = 2, 6
    engine = SteadyEngine(checkpoint.model, checkpoint.tokenizer, max_slots=slots)
    with serving(checkpoint, engine, queue) as server:
        expected = ask(server.site, QUESTIONS[0])
        engine.gate = threading.Event()

        async def clients() -> list[httpx.Response]:
            async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
                url = server.site.url + CHAT
                waiting = [asyncio.ensure_future(client.post(url, json=body(QUESTIONS[0]))) for _ in range(32)]
                # As long as the engine stands still, exactly those who do not fit are answered.
                while sum(task.done() for task in waiting) < 32 - slots - queue:
                    await asyncio.sleep(0.01)
                health = await client.get(server.site.url + "/health")
                assert health.status_code == 200
                engine.gate.set()  # type: ignore[union-attr]
                return await asyncio.gather(*waiting)

        replies = asyncio.run(clients())
        assert Counter(reply.status_code for reply in replies) == {200: slots + queue, 429: 32 - slots - queue}
        for reply in replies:
            if reply.status_code == 200:
                assert reply.json()["choices"][0]["message"]["content"] == expected
            else:
                assert int(reply.headers["retry-after"]) >= 1
                assert reply.json()["error"]["type"] == "rate_limit_error"
        assert ask(server.site, QUESTIONS[0]) == expected


def test_health_tells_of_an_engine_that_hangs(checkpoint: Checkpoint) -> None:
    engine = SteadyEngine(checkpoint.model, checkpoint.tokenizer, max_slots=2)
    with serving(checkpoint, engine, 4, step_seconds=0.3) as server:
        assert exchange(server.site, request(server.site, "GET", "/health")).status == 200
        engine.gate = threading.Event()
        try:
            data = json.dumps(body("the dog")).encode()
            reply = exchange(server.site, request(server.site, "POST", CHAT, None, data))
            assert reply.status == 503
            assert reply.json()["error"]["message"]
            assert exchange(server.site, request(server.site, "GET", "/health")).status == 503
        finally:
            engine.gate.set()
        wait_until(lambda: server.backend.health() is None, "the engine is well again")
        assert exchange(server.site, request(server.site, "GET", "/health")).status == 200
        assert ask(server.site, "the dog")


# ---- the whole program


@contextmanager
def program(folder: Path, log: Path) -> Iterator[tuple["subprocess.Popen[str]", Site]]:
    command = [sys.executable, "-m", "groundup.cli", "serve", str(folder), "--port", "0", "--slots", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", line):
                break
        else:
            raise AssertionError(log.read_text())
        yield process, Site("127.0.0.1", int(found[1]))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_program_ends_well(folder: Path, tmp_path: Path) -> None:
    """After SIGTERM a stream that has begun is finished; the log has a line for it, and not what it said."""
    log = tmp_path / "log"
    question = "quiet king and the old house"
    with program(folder, log) as (process, site):
        with httpx.stream("POST", site.url + CHAT, json=body(question, stream=True), timeout=120) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(240) == 0
    text = log.read_text()
    assert f"POST {CHAT} 200" in text
    assert question not in text
    assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_soak(folder: Path, tmp_path: Path) -> None:
    """Minutes of mixed traffic with errors and clients that leave: memory, files and threads stay as they are."""
    minutes = float(os.environ.get("GROUNDUP_SOAK_MINUTES", "4"))
    log = tmp_path / "log"
    samples: list[tuple[float, float, int, int]] = []
    with program(folder, log) as (process, site):
        server = psutil.Process(process.pid)
        name = httpx.get(site.url + "/v1/models").json()["data"][0]["id"]
        started = time.monotonic()
        rng = random.Random(0)
        while (elapsed := time.monotonic() - started) < minutes * 60:
            asyncio.run(_mixed_traffic(site, name, rng))
            if elapsed > minutes * 20:  # after the warm-up
                memory = server.memory_info().rss / 2**20
                samples.append((elapsed / 60, memory, server.num_fds(), server.num_threads()))
        times, megabytes, files, threads = (np.array(column) for column in zip(*samples))
        slope = np.polyfit(times, megabytes, 1)[0]
        assert slope <= 1.0, f"memory grows by {slope:.2f} MB a minute"
        assert files.max() - files.min() <= 20
        assert files[-5:].min() <= files[:5].max()
        assert threads.max() - threads.min() <= 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(240) == 0
    assert "Traceback" not in log.read_text()
    assert not any(question in log.read_text() for question in QUESTIONS if " " in question)


async def _mixed_traffic(site: Site, name: str, rng: random.Random) -> None:
    async def one(client: httpx.AsyncClient) -> None:
        kind = rng.random()
        fields = {"model": name, "stream": rng.random() < 0.5, "temperature": 1, "n": rng.choice([1, 1, 3])}
        if kind < 0.2:
            reply = await client.post(site.url + CHAT, json=body("x", n=10**6, model=name))
            assert reply.status_code == 400
        elif kind < 0.4:
            # A client that leaves: its own time is over.
            with suppress(httpx.TimeoutException):
                await client.post(site.url + CHAT, json=body(rng.choice(QUESTIONS), **fields), timeout=0.02)
        else:
            reply = await client.post(site.url + CHAT, json=body(rng.choice(QUESTIONS), **fields))
            assert reply.status_code == 200

    async with httpx.AsyncClient(timeout=120) as client:
        await asyncio.gather(*(one(client) for _ in range(20)))
