"""What refusals, overload and expensive schemas cost the server and its other users.

The numbers are printed (`pytest -s`) and depend on the machine; what is asserted does not.
"""

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tests.apps.raw_http import Site, exchange, request
from tests.apps.small_model import save_small_model
from tests.apps.test_serve_load import CHAT, NEW_TOKENS, SteadyEngine, body, program, serving
from tests.apps.test_serve_security import BOUNDS
from tests.apps.test_serve_security_schemas import bomb

from groundup.model.checkpoint import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SLOTS, QUEUE = 8, 16
MANY = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[psutil.Process, Site]]:
    """In a process of its own, so that neither its time nor its memory is its clients'."""
    with program(folder, tmp_path_factory.mktemp("log") / "log") as (process, site):
        yield psutil.Process(process.pid), site


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def in_words(seconds: Sequence[float]) -> str:
    p50, p99 = (1000 * quantile(seconds, share) for share in (0.5, 0.99))
    return f"{len(seconds)} times, p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {1000 * max(seconds):.1f} ms"


def post(site: Site, path: str, data: bytes) -> int:
    return exchange(site, request(site, "POST", path, None, data)).status


# ---- row 19: refusals are cheap


def test_refusals_cost_little(server: tuple[psutil.Process, Site]) -> None:
    """Far above each limit: refused, again and again, without memory that stays; aim: 50 ms and 16 MB."""
    process, site = server
    good = json.dumps(body("the dog")).encode()
    assert post(site, CHAT, good) == 200
    print()
    for name, (path, limit, make) in BOUNDS.items():
        asked = make(max(MANY, limit * 2))
        if asked["model"] == "fake":
            asked["model"] = "small"
        data = json.dumps(asked).encode()
        before = process.memory_info().rss
        seconds, peak = [], before
        for _ in range(20):
            started = time.perf_counter()
            assert 400 <= post(site, path, data) < 500, name
            seconds.append(time.perf_counter() - started)
            peak = max(peak, process.memory_info().rss)
        grown = (peak - before) / 2**20
        print(f"{name:22} {len(data):8} bytes: {in_words(seconds)}; memory +{grown:.1f} MB")
        assert grown <= 16, name
        assert post(site, CHAT, good) == 200


# ---- row 30: goodput at overload


async def load(site: Site, requests_per_second: float, count: int) -> tuple[list[tuple[int, float]], float]:
    """Open loop with Poisson arrivals: nobody waits for another's answer. Statuses with their seconds, and the time
    from the first request to the last answer."""
    rng = random.Random(int(requests_per_second))
    arrivals = [0.0]
    while len(arrivals) < count:
        arrivals.append(arrivals[-1] - math.log(1 - rng.random()) / requests_per_second)

    async def one(client: httpx.AsyncClient, at: float, started: float) -> tuple[int, float]:
        await asyncio.sleep(started + at - time.perf_counter())
        began = time.perf_counter()
        reply = await client.post(site.url + CHAT, json=body("the dog"))
        if reply.status_code == 200:
            assert reply.json()["usage"]["completion_tokens"] == NEW_TOKENS
        else:
            assert int(reply.headers["retry-after"]) >= 1
        return reply.status_code, time.perf_counter() - began

    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        started = time.perf_counter()
        answers = asyncio.gather(*(one(client, at, started) for at in arrivals))
        while not answers.done():
            assert (await client.get(site.url + "/health")).status_code == 200
            await asyncio.sleep(0.2)
        return await answers, time.perf_counter() - started


def test_goodput_at_four_times_the_capacity(folder: Path) -> None:
    """Whoever is let in gets a whole answer; the others are told at once when to come again. Aim: 80 % of the peak."""
    checkpoint = load_checkpoint(folder)
    engine = SteadyEngine(checkpoint.model, checkpoint.tokenizer, max_slots=SLOTS)
    engine.step_seconds = 0.02
    with serving(checkpoint, engine, QUEUE) as running:
        # As many at once as slots and queue hold, four times over: nobody is refused, and no slot is ever free.
        at_once, seconds = [], 0.0
        for _ in range(4):
            answers, took = asyncio.run(load(running.site, 10_000, SLOTS + QUEUE))
            at_once += answers
            seconds += took
        assert {status for status, _ in at_once} == {200}
        peak = len(at_once) / seconds
        answers, seconds = asyncio.run(load(running.site, 4 * peak, 600))
    counts = Counter(status for status, _ in answers)
    assert set(counts) == {200, 429}
    goodput = counts[200] / seconds
    print(f"\npeak: {peak:.1f} answers a second")
    print(f"offered {4 * peak:.1f}: {goodput:.1f} a second, {goodput / peak:.0%} of the peak")
    for status in (200, 429):
        print(f"{status}: {in_words([each for got, each in answers if got == status])}")


# ---- row 33: schemas made to be expensive, and those beside them


async def listen(client: httpx.AsyncClient, site: Site, gaps: list[float]) -> str:
    """One streamed answer; the times between its events are added to `gaps`."""
    said = ""
    async with client.stream("POST", site.url + CHAT, json=body("the green river", stream=True)) as reply:
        assert reply.status_code == 200
        last = time.perf_counter()
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                gaps.append(time.perf_counter() - last)
                last = time.perf_counter()
                [choice] = json.loads(line.removeprefix("data: "))["choices"]
                said += choice["delta"].get("content", "")
    assert line == "" or line == "data: [DONE]"
    return said


async def with_bombs(site: Site, bombs: Sequence[Any], gaps: list[float]) -> tuple[set[str], Counter[int]]:
    """One user sends bombs, one after another; four others stream until it is over, and at least five times."""
    statuses: Counter[int] = Counter()

    async def explode(client: httpx.AsyncClient) -> None:
        for schema in bombs:
            form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
            reply = await client.post(site.url + CHAT, json=body("dog", max_tokens=8, response_format=form))
            statuses[reply.status_code] += 1

    async def other(client: httpx.AsyncClient, exploding: "asyncio.Task[None]") -> set[str]:
        texts, count = set(), 0
        while count < 5 or not exploding.done():
            texts.add(await listen(client, site, gaps))
            count += 1
        return texts

    async with httpx.AsyncClient(timeout=600) as client:
        exploding = asyncio.create_task(explode(client))
        found = await asyncio.gather(*(other(client, exploding) for _ in range(4)))
        await exploding
    return set().union(*found), statuses


def test_others_beside_expensive_schemas(server: tuple[psutil.Process, Site]) -> None:
    """Nobody else fails or gets another text. Aim: a p99 between two tokens that is at most a tenth longer."""
    _, site = server
    rng = random.Random(5)
    quiet: list[float] = []
    busy: list[float] = []
    for _ in range(10):
        texts, _ = asyncio.run(with_bombs(site, [], quiet))
    with_them, statuses = asyncio.run(with_bombs(site, [bomb(rng) for _ in range(60)], busy))
    assert len(texts) == 1
    assert with_them == texts
    assert statuses.total() == 60
    assert set(statuses) <= {200, 400, 500, 503}
    assert statuses[400] > 0
    print(f"\nbetween two tokens, alone:      {in_words(quiet)}\nbetween two tokens, with bombs: {in_words(busy)}")
    print(f"answers to the bombs: {dict(statuses)}")
