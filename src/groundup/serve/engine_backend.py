"""The project's own engine behind the API: a thread of its own that steps, and streams that the event loop reads.

Nobody polls: the thread sleeps on a condition while there is nothing to do, takes what was asked for between two steps,
and hands all that a step gave to the event loop in one call. After a second without work it ends; the next request
starts another.
"""

import asyncio
import dataclasses
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from groundup.base.errors import UserError
from groundup.base.generation import Delta, EngineStats, PromptScores, SamplingParams
from groundup.infer.engine import Engine
from groundup.serve.backend import Cancelled, Overloaded, RequestFailed, Unavailable
from groundup.serve.isolation import IsolatedConstraint, log_failure
from groundup.text.chat import ChatFormat
from groundup.text.tokenizer import Tokenizer

STEP_SECONDS = 120.0
"""A step that takes longer counts as hanging; the longest honest one computes a chunk of a prompt."""
WATCH_SECONDS = 1.0
MOST_FAILED_STEPS = 3
"""So many failed steps in a row end the engine."""
JOIN_SECONDS = 5.0
IDLE_SECONDS = 1.0
"""After so long without work the thread ends. Why: OpenMP keeps helpers for every thread, and once all of them together
are more than the cores, none may spin any more while it waits: another model's steps would take half as long again."""
RETRY_SECONDS = (1.0, 60.0)
_RATE_OVER = 64
"""Responses over which the rate of finishing is measured."""


class _Stream(AsyncIterator[Delta]):
    """What one request has got and its reader has not taken yet; lives in the event loop."""

    def __init__(self, leave: Callable[["_Stream"], None], num_samples: int) -> None:
        self.unfinished = num_samples
        self.request_id = -1
        """The engine's number, from when its thread has taken the request; that thread's business."""
        self.to_come = num_samples
        """Responses that the engine has not finished; its thread's business."""
        self.cached_tokens: int | None = None
        """Set by the engine's thread before the first delta."""
        self._leave = leave
        self._arrived: deque[Delta] = deque()
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    async def __anext__(self) -> Delta:
        while not self._arrived:
            if self._error is not None:
                raise self._error
            if not self.unfinished:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._arrived.popleft()

    async def aclose(self) -> None:
        """Cancel what is unfinished."""
        self._leave(self)
        self.unfinished = 0
        self._changed.set()

    def put(self, delta: Delta) -> None:
        self._arrived.append(delta)
        self.unfinished -= delta.finish_reason is not None
        self._changed.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._changed.set()


class _Call:
    """Work beside the responses (scores, embeddings), done a chunk at a time between two steps."""

    def __init__(self, chunks: Callable[[], Iterator[Any]], result: "asyncio.Future[Any]") -> None:
        self._make = chunks
        self._chunks: Iterator[Any] | None = None
        self.result = result

    def advance(self) -> Any:
        """Do one chunk; None until the last, which gives what was asked for."""
        if self._chunks is None:
            self._chunks = self._make()
        return next(self._chunks)


class EngineBackend:
    """Serves an `Engine`, which from now on only this object's thread uses."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        tokenizer: Tokenizer,
        chat: ChatFormat,
        generation: Mapping[str, Any],
        *,
        queue: int = 256,
        step_seconds: float = STEP_SECONDS,
    ) -> None:
        self.name, self.tokenizer, self.chat, self.generation = name, tokenizer, chat, generation
        self.max_tokens = engine.max_tokens
        self._engine = engine
        self._slots, self._most_open = engine.max_slots, engine.max_slots + queue
        self._step_seconds = step_seconds
        # The event loop's:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: set[_Stream] = set()
        self._results: set[asyncio.Future[Any]] = set()
        self._finished_at: deque[float] = deque(maxlen=_RATE_OVER)
        self._is_closing = False
        self._watcher: asyncio.Task[None] | None = None
        # Guarded by the condition:
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        # Written by the engine's thread, read by the event loop:
        self._stats = engine.stats()
        self._busy_since: float | None = None
        self._death: str | None = None
        # The engine's thread's:
        self._streams: dict[int, _Stream] = {}
        self._calls: deque[_Call] = deque()
        self._failed_steps = 0
        self._is_stopped = False

    # ---- in the event loop

    def start(
        self, prompt: Sequence[int], params: SamplingParams, group: Hashable | None = None
    ) -> AsyncIterator[Delta]:
        self._admit(params.num_samples)
        make = params.constraint
        if make is not None:
            params = dataclasses.replace(params, constraint=lambda: IsolatedConstraint(make()))
        stream = _Stream(self._leave, params.num_samples)
        self._open.add(stream)
        self._command(lambda: self._submit(stream, list(prompt), params, group))
        return stream

    async def score(self, prompt: Sequence[int], top: int) -> PromptScores:
        scores = await self._call(lambda: self._engine.score_in_chunks(prompt, top))
        assert isinstance(scores, PromptScores)
        return scores

    async def embed(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        vectors = await self._call(lambda: self._engine.embed_in_chunks(rows))
        assert isinstance(vectors, Tensor)
        found: list[list[float]] = vectors.tolist()
        return found

    def health(self) -> str | None:
        return self._problem() or ("the server is shutting down" if self._is_closing else None)

    def stats(self) -> EngineStats:
        return self._stats

    async def close(self, grace_seconds: float) -> None:
        self._is_closing = True
        ends_at = time.monotonic() + grace_seconds
        while (self._open or self._results) and self._problem() is None and time.monotonic() < ends_at:
            await asyncio.sleep(0.02)
        self._fail_all(Cancelled())
        self._command(self._stop)
        assert self._thread is not None
        await asyncio.to_thread(self._thread.join, JOIN_SECONDS)

    def _problem(self) -> str | None:
        began = self._busy_since
        if self._death is None and began is not None and (seconds := time.monotonic() - began) > self._step_seconds:
            return f"the engine has been in one step for {seconds:.0f} s"
        return self._death

    def _admit(self, count: int) -> None:
        """Raises: Unavailable, Overloaded, UserError."""
        problem = self.health()
        if problem is not None:
            raise Unavailable(problem, RETRY_SECONDS[1])
        if count > self._most_open:
            raise UserError(f"{count} responses at a time are more than the {self._most_open} that this server holds")
        num_open = sum(stream.unfinished for stream in self._open) + len(self._results)
        if num_open + count > self._most_open:
            raise Overloaded(self._seconds_to_let_in(num_open - self._slots))
        self._loop = asyncio.get_running_loop()
        if self._watcher is None or self._watcher.done():
            self._watcher = self._loop.create_task(self._watch())

    def _seconds_to_let_in(self, waiting: int) -> float:
        """When those that wait now will have a slot, at the rate at which responses have finished lately."""
        least, most = RETRY_SECONDS
        if len(self._finished_at) < 2:
            return least
        seconds_each = (time.monotonic() - self._finished_at[0]) / len(self._finished_at)
        return min(max(waiting * seconds_each, least), most)

    async def _call(self, chunks: Callable[[], Iterator[Any]]) -> Any:
        self._admit(1)
        assert self._loop is not None
        result: asyncio.Future[Any] = self._loop.create_future()
        self._results.add(result)
        self._command(lambda: self._calls.append(_Call(chunks, result)))
        try:
            return await result
        finally:
            self._results.discard(result)

    def _leave(self, stream: _Stream) -> None:
        if stream in self._open:
            self._open.remove(stream)
            self._command(lambda: self._cancel(stream))

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"engine of {self.name}", daemon=True)
                self._thread.start()

    def _deliver(self, deltas: Sequence[tuple[_Stream, Delta]]) -> None:
        for stream, delta in deltas:
            if stream in self._open:
                stream.put(delta)
                if delta.finish_reason is not None:
                    self._finished_at.append(time.monotonic())
                if not stream.unfinished:
                    self._open.remove(stream)

    def _fail(self, streams: Sequence[_Stream], error: Exception) -> None:
        for stream in streams:
            self._leave(stream)
            stream.fail(error)

    def _fail_all(self, error: Exception) -> None:
        self._fail(list(self._open), error)
        for result in self._results:
            _settle(result, error)

    async def _watch(self) -> None:
        """Why: a thread that hangs or is dead cannot tell those who wait for it."""
        while self._open or self._results:
            await asyncio.sleep(min(WATCH_SECONDS, self._step_seconds))
            problem = self._problem()
            if problem is not None:
                self._fail_all(Unavailable(problem, RETRY_SECONDS[1]))

    # ---- in the engine's thread

    def _run(self) -> None:
        try:
            while not self._is_stopped:
                commands = self._next_commands()
                if commands is None:
                    return
                for command in commands:
                    command()
                if self._calls:
                    self._advance_call()
                if self._streams:
                    self._step()
                else:
                    self._stats = self._engine.stats()
            self._busy_since = None
        except BaseException as error:
            log_failure(f"the engine of {self.name}", error)
            self._death = f"the engine ended with {type(error).__name__}; the server has to be started again"
            self._busy_since = None

    def _next_commands(self) -> list[Callable[[], None]] | None:
        """What was asked for since the last step; waits while there is nothing to do at all, None after long enough."""
        with self._wake:
            while not (self._commands or self._streams or self._calls):
                self._busy_since = None
                if not self._wake.wait(IDLE_SECONDS) and not self._commands:
                    self._thread = None
                    return None
            commands = list(self._commands)
            self._commands.clear()
        self._busy_since = time.monotonic()
        return commands

    def _submit(self, stream: _Stream, prompt: list[int], params: SamplingParams, group: Hashable | None) -> None:
        try:
            stream.request_id = self._engine.submit(prompt, params, group)
            stream.cached_tokens = self._engine.slots.longest_prefix(prompt)[0]
        except UserError as error:
            self._post(self._fail, [stream], error)
        except Exception as error:  # of this request's own constraint
            log_failure(f"the engine of {self.name}", error)
            self._post(self._fail, [stream], RequestFailed("the engine failed to start this request"))
        else:
            self._streams[stream.request_id] = stream

    def _cancel(self, stream: _Stream) -> None:
        if self._streams.pop(stream.request_id, None) is not None:
            self._engine.cancel(stream.request_id)

    def _step(self) -> None:
        try:
            deltas = self._engine.step()
        except Exception as error:
            self._fail_step(error)
            return
        self._failed_steps = 0
        self._stats = self._engine.stats()  # before anyone hears of the step
        batch = []
        for delta in deltas:
            stream = self._streams[delta.request_id]
            batch.append((stream, delta))
            stream.to_come -= delta.finish_reason is not None
            if not stream.to_come:
                del self._streams[delta.request_id]
        if batch:
            self._post(self._deliver, batch)

    def _fail_step(self, error: Exception) -> None:
        """End every response that was in the step: which of them it failed on, nobody knows."""
        self._failed_steps += 1
        if self._failed_steps == MOST_FAILED_STEPS:
            raise error
        log_failure(f"the engine of {self.name}", error)
        failed = list(self._streams.values())
        for stream in failed:
            self._cancel(stream)
        # Prefixes whose keys and values may be half computed are forgotten, as at the start of every offline call.
        self._engine.generate([], [])
        self._post(self._fail, failed, RequestFailed("the engine failed on this request or on one beside it"))

    def _advance_call(self) -> None:
        call = self._calls[0]
        if call.result.done():  # cancelled: nobody waits for it
            self._calls.popleft()
            return
        try:
            found: Any = call.advance()
        except UserError as error:
            found = error
        except Exception as error:
            log_failure(f"the engine of {self.name}", error)
            found = RequestFailed("the engine failed on this request")
        if found is not None:
            self._calls.popleft()
            self._post(_settle, call.result, found)

    def _stop(self) -> None:
        self._is_stopped = True

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the event loop has ended, and with it everyone who could be told
            self._is_stopped = True


def _settle(result: "asyncio.Future[Any]", found: Any) -> None:
    if result.done():
        return
    if isinstance(found, Exception):
        result.set_exception(found)
    else:
        result.set_result(found)
