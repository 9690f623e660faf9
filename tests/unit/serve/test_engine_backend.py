"""The engine's thread and the event loop: order, bounds, cancellation, failures and the end, with an engine that does
what each test needs."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any

import pytest
import torch

from groundup.base.errors import UserError
from groundup.base.generation import Delta, EngineStats, PromptScores, SamplingParams
from groundup.serve import engine_backend
from groundup.serve.backend import Cancelled, Overloaded, RequestFailed, Unavailable, cached_tokens_of
from groundup.serve.engine_backend import MOST_FAILED_STEPS, EngineBackend

SLOTS = 2


class Engine:
    """Gives every request token 1, 2, 3 ... in turn, a step each, for all of them at once."""

    max_slots, max_tokens = SLOTS, 100
    slots: "Engine"

    def __init__(self) -> None:
        self.requests: dict[int, tuple[SamplingParams, list[int]]] = {}
        self.cancelled: list[int] = []
        self.groups: list[Any] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.errors: list[BaseException] = []
        self.num_resets = 0
        self.slots = self

    def longest_prefix(self, prompt: Sequence[int]) -> tuple[int, None]:
        return len(prompt) // 2, None

    def submit(self, prompt: Sequence[int], params: SamplingParams, group: Any = None) -> int:
        if 99 in prompt:
            raise UserError("99 is refused")
        if 98 in prompt:
            raise KeyError("a constraint's own fault")
        self.groups.append(group)
        number = len(self.groups)
        self.requests[number] = (params, [0] * params.num_samples)
        return number

    def step(self) -> list[Delta]:
        self.gate.wait(30)
        self.threads.add(threading.current_thread().name)
        if self.errors:
            raise self.errors.pop()
        deltas = []
        for number, (params, counts) in list(self.requests.items()):
            for sample in range(params.num_samples):
                counts[sample] += 1
                is_last = counts[sample] == params.max_new_tokens
                reason: Any = "length" if is_last else None
                deltas.append(Delta(number, sample, f"{counts[sample]} ", [counts[sample]], [], reason))
            if is_last:
                del self.requests[number]
        return deltas

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)
        self.requests.pop(number, None)

    def generate(self, prompts: Sequence[Sequence[int]], params: Any) -> list[Any]:
        assert not prompts
        self.num_resets += 1
        return []

    def stats(self) -> EngineStats:
        return EngineStats(len(self.requests), 0, SLOTS, 0, 0, 0, 0)

    def score_in_chunks(self, prompt: Sequence[int], top: int) -> Iterator[PromptScores | None]:
        if 99 in prompt:
            raise UserError("99 is refused")
        for token in prompt:
            self.gate.wait(30)
            if token == 98:
                raise RuntimeError("broken")
            yield None
        yield PromptScores([-1.0] * (len(prompt) - 1), [])

    def embed_in_chunks(self, rows: Sequence[Sequence[int]]) -> Iterator[torch.Tensor | None]:
        yield None
        yield torch.tensor(rows, dtype=torch.float32)


def run(test: Callable[[Engine, EngineBackend], Coroutine[Any, Any, None]], **options: Any) -> None:
    engine = Engine()
    backend = EngineBackend("fake", engine, None, None, {}, **{"queue": 2, **options})  # type: ignore[arg-type]

    async def main() -> None:
        try:
            async with asyncio.timeout(60):
                await test(engine, backend)
        finally:
            engine.gate.set()
            await backend.close(0)
            assert backend._thread is not None
            assert not backend._thread.is_alive()

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


async def texts(stream: AsyncIterator[Delta]) -> dict[int, str]:
    found: dict[int, str] = {}
    async for delta in stream:
        found[delta.sample] = found.get(delta.sample, "") + delta.text
    return found


def test_deltas_arrive_in_order_from_one_thread() -> None:
    async def test(engine: Engine, backend: EngineBackend) -> None:
        streams = [backend.start([1], SamplingParams(count), group=count) for count in (3, 5)]
        assert await asyncio.gather(*map(texts, streams)) == [{0: "1 2 3 "}, {0: "1 2 3 4 5 "}]
        assert await texts(backend.start([1], SamplingParams(2, num_samples=3))) == dict.fromkeys(range(3), "1 2 ")
        assert engine.threads == {"engine of fake"}
        assert engine.groups == [3, 5, None]
        assert engine.cancelled == []
        assert backend.stats().active == 0

    run(test)


def test_a_thread_without_work_ends_and_the_next_request_starts_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_backend, "IDLE_SECONDS", 0.01)

    async def test(engine: Engine, backend: EngineBackend) -> None:
        names = set()
        for count in range(1, 4):
            assert await texts(backend.start([1], SamplingParams(count))) == {0: " ".join("123"[:count]) + " "}
            thread = backend._thread
            await until(lambda: backend._thread is None)
            if thread is not None:  # else it had ended already
                thread.join(30)
                names.add(thread.name)
            assert backend.health() is None
        assert names <= {"engine of fake"}
        assert await backend.score([1, 2], 0) == PromptScores([-1.0], [])

    run(test)


def test_what_the_cache_held_of_a_prompt_is_known_with_the_first_delta() -> None:
    async def test(engine: Engine, backend: EngineBackend) -> None:
        stream = backend.start([1, 2, 3, 4], SamplingParams(max_new_tokens=1))
        await anext(stream)
        assert cached_tokens_of(stream) == 2

    run(test)


def test_no_more_are_let_in_than_slots_and_queue_hold() -> None:
    async def test(engine: Engine, backend: EngineBackend) -> None:
        engine.gate.clear()
        streams = [backend.start([1], SamplingParams(3, num_samples=count)) for count in (1, 3)]
        with pytest.raises(Overloaded) as caught:
            backend.start([1], SamplingParams(3))
        assert caught.value.retry_after_seconds is not None
        assert caught.value.retry_after_seconds >= 1
        with pytest.raises(Overloaded):
            await backend.score([1], 0)
        with pytest.raises(UserError, match="5 responses"):
            backend.start([1], SamplingParams(3, num_samples=5))
        engine.gate.set()
        await asyncio.gather(*map(texts, streams))
        assert await texts(backend.start([1], SamplingParams(1, num_samples=4))) == dict.fromkeys(range(4), "1 ")

    run(test)


def test_the_time_to_come_again_follows_the_rate() -> None:
    async def test(engine: Engine, backend: EngineBackend) -> None:
        assert backend._seconds_to_let_in(2) == 1.0  # nothing is known yet
        now = time.monotonic()
        backend._finished_at.extend([now - 20, now - 10])
        assert backend._seconds_to_let_in(3) == pytest.approx(30, rel=0.05)
        assert backend._seconds_to_let_in(1000) == 60.0

    run(test)


def test_closing_a_stream_frees_its_place_before_the_next_step() -> None:
    async def test(engine: Engine, backend: EngineBackend) -> None:
        stream = backend.start([1], SamplingParams(10**9, num_samples=4))
        assert (await anext(stream)).text == "1 "
        await stream.aclose()  # type: ignore[attr-defined]
        await until(lambda: engine.cancelled == [1])
        assert await texts(backend.start([1], SamplingParams(2))) == {0: "1 2 "}
        await stream.aclose()  # type: ignore[attr-defined]
        assert engine.cancelled == [1]

    run(test)


def test_a_request_that_is_closed_before_the_engine_saw_it_costs_nothing() -> None:
    async def test(engine: Engine, backend: EngineBackend) -> None:
        engine.gate.clear()
        first = backend.start([1], SamplingParams(2))
        await until(lambda: backend.stats().active == 0 and len(engine.groups) == 1)
        second = backend.start([1], SamplingParams(10**9))
        await second.aclose()  # type: ignore[attr-defined]
        engine.gate.set()
        assert await texts(first) == {0: "1 2 "}
        await until(lambda: not engine.requests)

    run(test)


@pytest.mark.parametrize(("token", "error"), [(99, UserError), (98, RequestFailed)])
def test_a_request_that_the_engine_refuses_fails_alone(token: int, error: type[Exception]) -> None:
    async def test(engine: Engine, backend: EngineBackend) -> None:
        good, bad = backend.start([1], SamplingParams(4)), backend.start([token], SamplingParams(4))
        with pytest.raises(error):
            await anext(bad)
        assert await texts(good) == {0: "1 2 3 4 "}
        assert backend.health() is None
        assert not backend._open

    run(test)


def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async def test(engine: Engine, backend: EngineBackend) -> None:
        for _ in range(2 * MOST_FAILED_STEPS):
            engine.errors = [RuntimeError("a secret prompt")]
            with pytest.raises(RequestFailed):
                await texts(backend.start([1], SamplingParams(4)))
            assert await texts(backend.start([1], SamplingParams(2))) == {0: "1 2 "}
        assert engine.num_resets == 2 * MOST_FAILED_STEPS
        assert backend.health() is None

    run(test)
    assert "RuntimeError" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("errors", [[MemoryError()] * MOST_FAILED_STEPS, [SystemExit(3)]])
def test_an_engine_that_died_says_so_and_nobody_waits(errors: list[BaseException]) -> None:
    async def test(engine: Engine, backend: EngineBackend) -> None:
        engine.errors = list(errors)
        outcomes: list[Exception] = []
        while backend.health() is None:
            try:
                await texts(backend.start([1], SamplingParams(4)))
            except (RequestFailed, Unavailable) as error:
                outcomes.append(error)
        assert isinstance(outcomes[-1], Unavailable)
        problem = backend.health()
        assert problem is not None
        assert type(errors[0]).__name__ in problem
        with pytest.raises(Unavailable, match="started again"):
            backend.start([1], SamplingParams(4))

    run(test)


def test_a_step_that_hangs_fails_those_who_wait_and_is_told() -> None:
    async def test(engine: Engine, backend: EngineBackend) -> None:
        engine.gate.clear()
        waiting = [asyncio.ensure_future(texts(backend.start([1], SamplingParams(4)))) for _ in range(2)]
        scores = asyncio.ensure_future(backend.score([1, 2], 0))
        for task in (*waiting, scores):
            with pytest.raises(Unavailable, match="in one step"):
                await task
        assert "in one step" in str(backend.health())
        with pytest.raises(Unavailable):
            backend.start([1], SamplingParams(4))
        engine.gate.set()
        await until(lambda: backend.health() is None)
        assert await texts(backend.start([1], SamplingParams(2))) == {0: "1 2 "}

    run(test, step_seconds=0.2)


def test_work_beside_the_responses() -> None:
    async def test(engine: Engine, backend: EngineBackend) -> None:
        stream = backend.start([1], SamplingParams(50))
        scores, vectors = await asyncio.gather(backend.score([1, 2, 3], 2), backend.embed([[1, 2], [3, 4]]))
        assert scores.logps == [-1.0, -1.0]
        assert vectors == [[1.0, 2.0], [3.0, 4.0]]
        with pytest.raises(UserError):
            await backend.score([99], 0)
        with pytest.raises(RequestFailed):
            await backend.score([1, 98], 0)
        assert len((await texts(stream))[0].split()) == 50
        assert not backend._results

    run(test)


def test_work_that_nobody_waits_for_is_left() -> None:
    async def test(engine: Engine, backend: EngineBackend) -> None:
        engine.gate.clear()
        task = asyncio.ensure_future(backend.score([1] * 10**6, 0))
        await until(lambda: bool(backend._calls))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine.gate.set()
        await until(lambda: not backend._calls)

    run(test)


def test_the_end_lets_running_requests_finish_and_refuses_new_ones() -> None:
    async def test(engine: Engine, backend: EngineBackend) -> None:
        engine.gate.clear()
        running = asyncio.ensure_future(texts(backend.start([1], SamplingParams(5))))
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(backend.close(30))
        await asyncio.sleep(0)
        assert backend.health() == "the server is shutting down"
        with pytest.raises(Unavailable, match="shutting down"):
            backend.start([1], SamplingParams(5))
        engine.gate.set()
        assert await running == {0: "1 2 3 4 5 "}
        await closing

    run(test)


def test_the_end_tells_those_who_take_too_long() -> None:
    async def test(engine: Engine, backend: EngineBackend) -> None:
        running = asyncio.ensure_future(texts(backend.start([1], SamplingParams(10**9))))
        await until(lambda: backend.stats().active == 1)
        await backend.close(0.01)
        with pytest.raises(Cancelled):
            await running
        assert engine.requests == {} or engine.cancelled

    run(test)
