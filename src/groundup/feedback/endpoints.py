"""Models behind OpenAI-compatible APIs, asked by the server: browsers learn neither who answers nor where.

An exchange goes on without its browser: a reload, a phone that sleeps or a lost connection costs no answer.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from pydantic import BaseModel, ValidationError

from groundup.feedback.contents import MAX_CHARACTERS, GivenResponse
from groundup.feedback.dialogue import Generation
from groundup.feedback.errors import Refused
from groundup.feedback.views import sentences

CONNECT_SECONDS, SILENCE_SECONDS, TOTAL_SECONDS = 10.0, 120.0, 600.0
MAX_STREAM_BYTES = 16 << 20
RETRY_SECONDS = (0.5, 2.0)
"""Waits before a model that could not be reached, or is busy, is asked again."""
RETRY_STATUSES = {429, 500, 502, 503, 504}

Key = tuple[str, int, int]
Store = Callable[[list[GivenResponse]], Awaitable[None]]
Event = dict[str, Any]
"""What a page hears of each position: "text" (all of it so far), then "more", and at its end "finish" (the reason) or
"failed" (a sentence); at last one {"end": whether all is stored, "message": why not}."""

_logger = logging.getLogger(__name__)


class EndpointFailed(Exception):
    """A model did not answer; the message names neither it nor its address, and may be shown to annotators."""

    def __init__(self, message: str, may_retry: bool = False) -> None:
        super().__init__(message)
        self.may_retry = may_retry


def new_client() -> httpx.AsyncClient:
    """For all endpoints. No redirects and no proxies of the environment: only addresses that administrators set."""
    timeout = httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
    return httpx.AsyncClient(timeout=timeout, follow_redirects=False, trust_env=False)


class Delta(BaseModel):
    """What a chunk adds."""

    content: str | None = None


class Choice(BaseModel):
    """The one response that we ask for. Servers that know `return_token_ids` (vLLM does) tell its ids."""

    delta: Delta = Delta()
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class Chunk(BaseModel):
    """A piece of a streamed chat completion: what we read of it."""

    choices: list[Choice] = []
    prompt_token_ids: list[int] | None = None
    error: Any = None


@dataclass
class Answer:
    """What has come of one generation so far."""

    text: str = ""
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    is_done: bool = False
    failure: str = ""

    def take(self, chunk: "Chunk") -> None:
        """Add a piece of the stream.

        Raises: EndpointFailed when it grows too long.
        """
        self.prompt_token_ids = chunk.prompt_token_ids or self.prompt_token_ids
        for choice in chunk.choices:
            self.text += (choice.delta.content or "").replace("\0", "\ufffd")  # PostgreSQL stores no NUL
            self.token_ids += choice.token_ids or []
            self.finish_reason = choice.finish_reason or self.finish_reason
        if len(self.text) > MAX_CHARACTERS:
            raise EndpointFailed(f"The answer is longer than {MAX_CHARACTERS} characters.")


class Exchange:
    """One turn being answered; any number of browsers may watch it, and none is needed."""

    def __init__(self, client: httpx.AsyncClient, generations: Sequence[Generation]) -> None:
        self.generations = tuple(generations)
        self.answers = [Answer() for _ in generations]
        self.is_stored = False
        self._trouble = ""
        self._client = client
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_running(self) -> bool:
        """Whether answers may still come."""
        return self._task is not None and not self._task.done()

    def start(self, store: Store) -> None:
        """Ask all at once for what is missing; `store` gets the responses once all are there."""
        self._trouble = ""
        self._task = asyncio.create_task(self._run(store))

    async def stop(self) -> None:
        """End it where it is."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self, store: Store) -> None:
        await asyncio.gather(*(self._ask(i) for i in range(len(self.answers)) if not self.answers[i].is_done))
        if not all(answer.is_done for answer in self.answers):
            return
        try:
            await store([_response(*pair) for pair in zip(self.generations, self.answers, strict=True)])
            self.is_stored = True
        except Refused as error:
            self._trouble = sentences(error.message, error.remedy)
        except Exception as error:
            _logger.error("%s while storing responses", type(error).__name__)
            self._trouble = "The answers could not be stored. Try again."

    async def _ask(self, index: int) -> None:
        for wait in (*RETRY_SECONDS, None):
            answer = self.answers[index] = Answer()
            try:
                async with asyncio.timeout(TOTAL_SECONDS):
                    await self._read(self.generations[index], answer)
                answer.is_done = True
                break
            except (EndpointFailed, TimeoutError) as error:
                failure = error if isinstance(error, EndpointFailed) else EndpointFailed("The model took too long.")
                if wait is None or not failure.may_retry:
                    answer.failure = str(failure)
                    break
                await asyncio.sleep(wait)
        self._tell()

    async def _read(self, generation: Generation, answer: Answer) -> None:
        async for chunk in stream(self._client, generation):
            answer.take(chunk)
            self._tell()
        if not answer.text.strip():
            raise EndpointFailed("The model answered with nothing.")

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self) -> AsyncIterator[Event]:
        """What has been said so far, then what comes, until the end."""
        shown = [-1] * len(self.answers)
        told: set[int] = set()
        while True:
            changed, is_running = self._changed, self.is_running
            for index, answer in enumerate(self.answers):
                position = self.generations[index].position
                if shown[index] < 0 or len(answer.text) < shown[index]:
                    yield {"position": position, "text": answer.text}
                elif len(answer.text) > shown[index]:
                    yield {"position": position, "more": answer.text[shown[index] :]}
                shown[index] = len(answer.text)
                if index not in told and (answer.is_done or answer.failure):
                    told.add(index)
                    how = {"failed": answer.failure} if answer.failure else {"finish": answer.finish_reason}
                    yield {"position": position, **how}
            if not is_running:
                yield {"end": self.is_stored, "message": self._trouble}
                return
            await self._wait(changed)

    async def _wait(self, changed: asyncio.Event) -> None:
        assert self._task is not None
        waiting = asyncio.ensure_future(changed.wait())
        try:
            await asyncio.wait({waiting, self._task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()


class Exchanges:
    """Those under way, and those of which a part failed, by what they answer (a turn, an item)."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._open: dict[Key, Exchange] = {}

    def start(self, key: Key, generations: Sequence[Generation], store: Store) -> Exchange:
        """The exchange under way for `key`; else another try at what failed of the same question; else a new one."""
        self._open = {key: exchange for key, exchange in self._open.items() if not exchange.is_stored}
        exchange = self._open.get(key)
        if exchange is not None and exchange.is_running:
            return exchange
        if exchange is None or exchange.generations != tuple(generations):
            exchange = self._open[key] = Exchange(self._client, generations)
        exchange.start(store)
        return exchange

    async def close(self) -> None:
        """End all; their pages ask again."""
        for exchange in self._open.values():
            await exchange.stop()


def _response(generation: Generation, answer: Answer) -> GivenResponse:
    return GivenResponse(
        text=answer.text,
        model=generation.model,
        revision=generation.revision,
        endpoint_id=generation.endpoint_id,
        temperature=generation.temperature,
        seed=generation.seed,
        prompt_token_ids=answer.prompt_token_ids,
        token_ids=answer.token_ids or None,
        finish_reason=answer.finish_reason,
    )


async def stream(client: httpx.AsyncClient, generation: Generation) -> AsyncIterator[Chunk]:
    """The chunks of one chat completion.

    Raises: EndpointFailed.
    """
    body: dict[str, Any] = {
        "model": generation.model,
        "messages": [{"role": turn.role, "content": turn.content} for turn in generation.messages],
        "temperature": generation.temperature,
        "max_tokens": generation.max_new_tokens,
        "seed": generation.seed,
        "stream": True,
    }
    headers = {"authorization": f"Bearer {generation.api_key}"} if generation.api_key else {}
    url = generation.base_url.rstrip("/") + "/chat/completions"
    is_first = True
    try:
        # Servers that do not know the extension may refuse it: they are asked again without.
        for extension in ({"return_token_ids": True}, {}):
            async with client.stream("POST", url, json=body | extension, headers=headers) as answer:
                if answer.status_code in (400, 422) and extension:
                    continue
                if answer.status_code != 200:
                    raise EndpointFailed(
                        f"The model's server refused (status {answer.status_code}).",
                        may_retry=answer.status_code in RETRY_STATUSES,
                    )
                async for chunk in _events(answer):
                    yield chunk
                    is_first = False
                return
    except httpx.HTTPError as error:
        kind = "took too long to answer" if isinstance(error, httpx.TimeoutException) else "cannot be reached"
        raise EndpointFailed(f"The model {kind}.", may_retry=is_first) from None


async def _events(answer: httpx.Response) -> AsyncIterator[Chunk]:
    """The JSON of server-sent events up to [DONE].

    Raises: EndpointFailed for an error that is told, an early end, and for what is no such stream.
    """
    size, rest = 0, b""
    async for piece in answer.aiter_bytes():
        size += len(piece)
        if size > MAX_STREAM_BYTES:
            raise EndpointFailed("The model's server does not stop sending.")
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield _chunk(data)
    raise EndpointFailed("The model's answer was cut off.")


def _chunk(data: bytes) -> Chunk:
    try:
        chunk = Chunk.model_validate_json(data)
    except ValidationError:
        raise EndpointFailed("The model's server answered with something that is no stream of text.") from None
    if chunk.error is not None:
        raise EndpointFailed("The model failed while it answered.")
    return chunk
