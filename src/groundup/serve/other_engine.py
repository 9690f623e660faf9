"""What engines that are not ours have in common behind the API.

They get token ids and give token ids: text, stop strings, limits and the bounded queue stay ours, so that every engine
answers a request in the same form.
"""

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Hashable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groundup.base.errors import UserError
from groundup.base.files import cache_folder, sha256_json
from groundup.base.generation import Delta, EngineStats, FinishReason, PromptScores, SamplingParams, TopLogps
from groundup.base.seeds import derive_seed
from groundup.infer.sampling import check_params
from groundup.infer.text import ResponseText
from groundup.serve.backend import Cancelled, NotImplementedByEngine, Overloaded, Unavailable
from groundup.text.chat import ChatFormat
from groundup.text.tokenizer import Tokenizer

RETRY_SECONDS = 2.0


@dataclass(frozen=True)
class Served:
    """What a backend needs to know of a checkpoint, without its weights."""

    name: str
    tokenizer: Tokenizer
    chat: ChatFormat
    generation: Mapping[str, Any]
    vocab_size: int
    max_tokens: int


@dataclass(frozen=True)
class Tokens:
    """What an engine added to one response; the lists of log-probabilities are empty when nobody asked for them."""

    token_ids: list[int]
    logps: list[float] = field(default_factory=list)
    top_logps: list[TopLogps] = field(default_factory=list)


class OtherEngine(ABC):
    """A `Backend` on `generate`: the tokens of one response, of which each sample of a request is one.

    Choice: log-probabilities are what these engines report: the model's own, at temperature 1 and without biases.
    """

    engine_name: str

    def __init__(self, served: Served, *, slots: int, queue: int) -> None:
        self.name, self.tokenizer, self.chat = served.name, served.tokenizer, served.chat
        self.generation, self.max_tokens = served.generation, served.max_tokens
        self.slots, self.queue = slots, queue
        self.vocab_size = served.vocab_size
        self._requests: set[_Request] = set()
        self._next_id = 0
        self._is_closing = False
        self._prefilled_tokens = 0
        self._generated_tokens = 0

    @abstractmethod
    def generate(self, prompt: list[int], params: SamplingParams, seed: int, limit: int) -> AsyncGenerator[Tokens]:
        """At most `limit` tokens of one response; ends early where the engine finds its end. Closing cancels it."""

    @abstractmethod
    def engine_problem(self) -> str | None:
        """What is wrong with the engine."""

    @abstractmethod
    async def shut_down(self) -> None:
        """Free what the engine holds."""

    def start(
        self, prompt: Sequence[int], params: SamplingParams, group: Hashable | None = None
    ) -> AsyncIterator[Delta]:
        self._check_open()
        check_params(params, self.vocab_size)
        if params.constraint is not None:
            raise NotImplementedByEngine(f"{self.engine_name} cannot hold answers to a schema here")
        ids = self._checked(prompt)
        if params.num_samples > self.slots + self.queue:
            raise UserError(
                f"{params.num_samples} responses at a time are more than the {self.slots + self.queue} that this "
                "server holds"
            )
        if self._num_running() + params.num_samples > self.slots + self.queue:
            raise Overloaded(RETRY_SECONDS)
        self._prefilled_tokens += len(ids)
        request, self._next_id = _Request(self, self._next_id, ids, params), self._next_id + 1
        self._requests.add(request)
        return request

    async def score(self, prompt: Sequence[int], top: int) -> PromptScores:
        raise NotImplementedByEngine(f"{self.engine_name} does not score prompts here; leave out echo with logprobs")

    async def embed(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        raise NotImplementedByEngine(f"{self.engine_name} makes no embeddings here")

    def health(self) -> str | None:
        return self.engine_problem() or ("the server is shutting down" if self._is_closing else None)

    def stats(self) -> EngineStats:
        running = self._num_running()
        return EngineStats(
            active=min(running, self.slots),
            waiting=max(running - self.slots, 0),
            slots=self.slots,
            cached_tokens=sum(request.num_tokens for request in self._requests),
            prefilled_tokens=self._prefilled_tokens,
            reused_tokens=0,
            generated_tokens=self._generated_tokens,
        )

    async def close(self, grace_seconds: float) -> None:
        self._is_closing = True
        tasks = [task for request in self._requests for task in request.tasks]
        if tasks:
            await asyncio.wait(tasks, timeout=grace_seconds)
        for request in list(self._requests):
            await request.end(Cancelled())
        await self.shut_down()

    def count(self, num_tokens: int) -> None:
        self._generated_tokens += num_tokens

    def forget(self, request: "_Request") -> None:
        self._requests.discard(request)

    def _num_running(self) -> int:
        return sum(not task.done() for request in self._requests for task in request.tasks)

    def _check_open(self) -> None:
        problem = self.health()
        if problem is not None:
            raise Unavailable(problem)

    def _checked(self, prompt: Sequence[int]) -> list[int]:
        ids = [int(token) for token in prompt]
        if not ids:
            raise UserError("the prompt has no tokens", "begin it with the tokenizer's BOS id")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise UserError(f"the prompt has a token id outside 0..{self.vocab_size - 1}")
        if len(ids) >= self.max_tokens:
            raise UserError(
                f"the prompt has {len(ids)} tokens, but the context holds {self.max_tokens}, new tokens included",
                "shorten the prompt",
            )
        return ids


class _Request(AsyncIterator[Delta]):
    """One request: a task for each of its responses, and what they have given so far."""

    def __init__(self, engine: OtherEngine, request_id: int, prompt: list[int], params: SamplingParams) -> None:
        self._engine, self._id, self._prompt, self._params = engine, request_id, prompt, params
        self._limit = min(params.max_new_tokens, engine.max_tokens - len(prompt))
        seed = int.from_bytes(os.urandom(8)) >> 1 if params.seed is None else params.seed
        self._arrived: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        self._unfinished = params.num_samples
        self.num_tokens = len(prompt)
        seeds = [derive_seed(seed, "sample", sample) for sample in range(params.num_samples)]
        self.tasks = [asyncio.create_task(self._respond(sample, seed)) for sample, seed in enumerate(seeds)]
        for task in self.tasks:
            task.add_done_callback(self._on_done)

    async def __anext__(self) -> Delta:
        if not self._unfinished:
            raise StopAsyncIteration
        arrived = await self._arrived.get()
        if isinstance(arrived, Exception):
            await self.aclose()
            raise arrived
        self._unfinished -= arrived.finish_reason is not None
        return arrived

    async def aclose(self) -> None:
        """Cancel what is unfinished."""
        self._unfinished = 0
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def end(self, error: Exception) -> None:
        """Cancel, and tell the reader why."""
        unfinished = self._unfinished
        await self.aclose()
        self._unfinished = unfinished
        self._arrived.put_nowait(error)

    def _on_done(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._arrived.put_nowait(error if isinstance(error, Exception) else Unavailable("the engine ended"))
        if all(task.done() for task in self.tasks):
            self._engine.forget(self)

    async def _respond(self, sample: int, seed: int) -> None:
        text = ResponseText(self._engine.tokenizer.stream_decoder(), self._params.stop)
        count = 0
        async with aclosing(self._engine.generate(self._prompt, self._params, seed, self._limit)) as arriving:
            async for tokens in arriving:
                for place, token in enumerate(tokens.token_ids):
                    count += 1
                    self.num_tokens += 1
                    self._engine.count(1)
                    is_stop = token in self._params.stop_ids
                    piece = "" if is_stop else text.push(token)
                    reason: FinishReason | None = None
                    if is_stop or text.is_stopped:
                        reason = "stop"
                    elif count == self._limit:
                        reason = "length"
                    if reason is not None:
                        piece += text.finish()
                        reason = "stop" if text.is_stopped else reason
                    logps, top = tokens.logps[place : place + 1], tokens.top_logps[place : place + 1]
                    self._arrived.put_nowait(Delta(self._id, sample, piece, [token], logps, reason, top))
                    if reason is not None:
                        return
        self._arrived.put_nowait(Delta(self._id, sample, text.finish(), [], [], "stop"))


def truncation(params: SamplingParams) -> tuple[int, float]:
    """top-k (0: all) and top-p as these engines want them, above 0.

    Why: with top-p 0 the most likely token is left, which is top-k 1.
    """
    return (params.top_k, params.top_p) if params.top_p > 0 else (1, 1.0)


def cached_path(source: Path, folder: str, suffix: str) -> Path:
    """Where a model converted from `source` is kept: in the cache, under a name that changes when its files do."""
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    stats = [(str(file.relative_to(source.parent)), file.stat()) for file in files if file.is_file()]
    key = sha256_json([str(source.resolve()), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]])
    return cache_folder() / folder / f"{source.name}-{key[:16]}{suffix}"
