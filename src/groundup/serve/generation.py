"""From a request to sampling parameters, and from an engine's deltas to numbered choices."""

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from groundup.base.errors import UserError
from groundup.base.generation import Constraint, Delta, SamplingParams
from groundup.infer.grammar import Grammars
from groundup.serve import config as limits
from groundup.serve.backend import Backend, RequestFailed, cached_tokens_of
from groundup.serve.first_space import FirstSpace
from groundup.serve.metrics import Metrics
from groundup.serve.schemas import SamplingFields
from groundup.serve.wire import ApiError, as_api_error, close_iterator
from groundup.text.tokenizer import Tokenizer

_VERSION = version("groundup")
USAGE = "groundup.usage"
"""Where a request's scope holds its `Usage`, for the log."""


@dataclass
class Service:
    """What the routes share."""

    models: Mapping[str, Backend]
    metrics: Metrics
    grammars: Mapping[str, Grammars]
    """By the names of the backends."""
    created: int = field(default_factory=lambda: int(time.time()))

    def model(self, name: str) -> Backend:
        """Raises: ApiError 404."""
        if name not in self.models:
            known = ", ".join(self.models)
            message = f"the model {name[:100]!r} does not exist; this server has {known}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.models[name]


def fingerprint(backend: Backend) -> str:
    """What an answer to a given seed depends on, as far as it can be told from outside: version, engine and model."""
    parts = (
        _VERSION,
        type(backend).__name__,
        backend.name,
        backend.tokenizer.vocab_size,
        backend.max_tokens,
    )
    return "gu_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def default_sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Temperature, top-p and top-k of requests that name none.

    Choice: the model's own (generation_config.json) where they are usable, else those of Meta's chat example.
    """
    found: dict[str, Any] = {"temperature": limits.DEFAULT_TEMPERATURE, "top_p": limits.DEFAULT_TOP_P, "top_k": 0}
    for name, most in (("temperature", 2.0), ("top_p", 1.0), ("top_k", limits.MAX_TOP_K)):
        value = generation.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most:
            found[name] = int(value) if name == "top_k" else float(value)
    return found


def sampling_params(
    request: SamplingFields,
    backend: Backend,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    logprobs: int | None,
    constraint: Callable[[], Constraint] | None,
) -> SamplingParams:
    """`logprobs`: how many alternatives to report at every place; None: no log-probabilities at all."""
    sampling = default_sampling(backend.generation)
    sampling |= {name: getattr(request, name) for name in sampling if getattr(request, name) is not None}
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        num_samples=request.n or 1,
        seed=request.seed,
        stop=tuple(dict.fromkeys(request.stop or ())),
        stop_ids=tuple(dict.fromkeys((*stop_ids, *(request.stop_token_ids or ())))),
        want_logps=logprobs is not None,
        top_logps=logprobs or 0,
        logit_bias=request.logit_bias or (),
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        constraint=constraint,
        **sampling,
    )
    _check_ids(backend.tokenizer, params.stop_ids, "stop_token_ids")
    _check_ids(backend.tokenizer, [token for token, _ in params.logit_bias], "logit_bias")
    return params


def _check_ids(tokenizer: Tokenizer, ids: Sequence[int], param: str) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < tokenizer.vocab_size):
        message = f"{param}: token ids are within 0 and {tokenizer.vocab_size - 1}"
        raise ApiError(400, message, param=param, code="invalid_value")


async def constraint_of(
    request: SamplingFields, service: Service, backend: Backend, stop_ids: Sequence[int]
) -> Callable[[], Constraint] | None:
    """What holds each response to the JSON schema that was asked for; None: any text.

    Why a thread: a new schema is compiled first, which may take seconds.
    Raises: ApiError 400 for a schema that cannot be used.
    """
    schema = request.response_format and request.response_format.schema_text
    if not schema:
        return None
    try:
        return await asyncio.to_thread(service.grammars[backend.name].json_schema, schema, stop_ids)
    except UserError as error:
        raise as_api_error(error, "response_format") from None


def encode_input(item: str | list[int], backend: Backend, param: str) -> list[int]:
    """Ids of a text, which begins with BOS; or ids as they were given."""
    if isinstance(item, str):
        return [backend.tokenizer.bos_id, *backend.tokenizer.encode(item)]
    _check_ids(backend.tokenizer, item, param)
    return item


def room_for(prompt: Sequence[int], asked: int | None, backend: Backend, param: str) -> int:
    """How many new tokens a prompt leaves room for, at most `asked`.

    Choice: an answer ends where the context does (`length`); only a wish that no prompt leaves room for is an error.
    """
    room = backend.max_tokens - len(prompt)
    if room < 1:
        raise ApiError(
            400,
            f"the prompt has {len(prompt)} tokens, but the context of this model holds {backend.max_tokens}, "
            "new tokens included",
            param=param,
            code="context_length_exceeded",
        )
    if asked is not None and asked > backend.max_tokens:
        raise ApiError(
            400,
            f"max_tokens = {asked} is more than the context of this model, {backend.max_tokens} tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return room if asked is None else min(asked, room)


@dataclass
class Usage:
    """Tokens of one call, while it runs."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int | None = None
    """Of the prompts; None where the engine does not tell."""

    def wire(self) -> dict[str, Any]:
        sums = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
        if self.cached_tokens is None:
            return sums
        return {**sums, "prompt_tokens_details": {"cached_tokens": self.cached_tokens}}


class Generation(AsyncIterator[tuple[int, Delta]]):
    """The responses to one call as (choice, delta): `num_samples` choices for each prompt, in the prompts' order.

    Raises: RequestFailed for a response that its grammar does not let end.
    """

    def __init__(self, model: str, metrics: Metrics, prompt_tokens: int, num_samples: int) -> None:
        self.usage = Usage(prompt_tokens)
        self._model, self._metrics = model, metrics
        self._num_samples = num_samples
        self._streams: list[AsyncIterator[Delta]] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._num_running = 0
        self._arrived: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue()
        self._started_at = time.monotonic()
        self._first_at: dict[int, float] = {}
        self._counts: Counter[int] = Counter()

    @staticmethod
    async def begin(
        service: Service,
        backend: Backend,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        continues: bool = False,
    ) -> "Generation":
        """Queue all prompts, or none; the caller closes it in every case. `continues`: no response is the start of a
        text.

        Raises: what `Backend.start` does.
        """
        prompt_tokens = sum(len(prompt) for prompt in prompts)
        generation = Generation(backend.name, service.metrics, prompt_tokens, params[0].num_samples)
        streams, group = generation._streams, object()
        try:
            for prompt, each in zip(prompts, params, strict=True):
                stream = backend.start(prompt, each, group) if each.max_new_tokens else _no_tokens(each)
                is_cut = continues and backend.tokenizer.strips_leading_space
                streams.append(FirstSpace(stream, backend.tokenizer, each) if is_cut else stream)
        except Exception:
            await generation.aclose()
            raise
        if len(streams) > 1:
            generation._pumps = [asyncio.create_task(generation._pump(*pair)) for pair in enumerate(streams)]
            generation._num_running = len(streams)
        service.metrics.prompt_tokens.labels(backend.name).inc(prompt_tokens)
        return generation

    async def __anext__(self) -> tuple[int, Delta]:
        choice, delta = await self._next()
        self.usage.completion_tokens += len(delta.token_ids)
        self._measure(choice, delta)
        if delta.finish_reason in ("error", "cancelled"):
            raise RequestFailed("a response could not be continued within the JSON schema that was asked for")
        return choice, delta

    async def aclose(self) -> None:
        """Cancel what is unfinished."""
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        for stream in self._streams:
            await close_iterator(stream)

    async def _next(self) -> tuple[int, Delta]:
        if not self._pumps:
            delta = await anext(self._streams[0])
            return delta.sample, delta
        while self._num_running:
            item = await self._arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is not None:
                return item
            self._num_running -= 1
        raise StopAsyncIteration

    async def _pump(self, index: int, stream: AsyncIterator[Delta]) -> None:
        """Carry the deltas of one of several prompts into the common queue; None says that there are no more."""
        try:
            async for delta in stream:
                self._arrived.put_nowait((index * self._num_samples + delta.sample, delta))
        except Exception as error:
            self._arrived.put_nowait(error)
        else:
            self._arrived.put_nowait(None)

    def _measure(self, choice: int, delta: Delta) -> None:
        now = time.monotonic()
        if choice not in self._first_at:
            self._first_at[choice] = now
            told = [count for stream in self._streams if (count := cached_tokens_of(stream)) is not None]
            self.usage.cached_tokens = sum(told) if told else None
            self._metrics.first_token_seconds.labels(self._model).observe(now - self._started_at)
        self._counts[choice] += len(delta.token_ids)
        self._metrics.completion_tokens.labels(self._model).inc(len(delta.token_ids))
        if delta.finish_reason is not None and self._counts[choice] > 1:
            seconds = (now - self._first_at[choice]) / (self._counts[choice] - 1)
            self._metrics.token_seconds.labels(self._model).observe(seconds)


async def _no_tokens(params: SamplingParams) -> AsyncIterator[Delta]:
    """The responses of a call that asks for none: it wants its prompt's log-probabilities only."""
    for sample in range(params.num_samples):
        yield Delta(0, sample, "", [], [], "length")
