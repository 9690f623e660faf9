"""The same request through every way the official clients offer, brought into one form, and what answers must look
like byte by byte."""

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
from pydantic import BaseModel, ConfigDict, Field
from tests.apps.raw_http import running
from tests.apps.small_model import save_small_model

from groundup.serve.app import create_app
from groundup.serve.config import ServeConfig
from groundup.serve.run import EngineOptions, open_backend

KEY = "test-key"
MODEL = "small"


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[str]:
    """A server with a small random model; gives the base of its API."""
    backend = open_backend(MODEL, save_small_model(folder / MODEL), EngineOptions(**options))
    with running(create_app({MODEL: backend}, ServeConfig(api_keys=(KEY,)))) as site:
        yield f"{site.url}/v1"


# ---- what answers look like; a field too many or of another type fails


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class PromptTokens(Strict):
    cached_tokens: int = Field(ge=0)


class Usage(Strict):
    prompt_tokens: int = Field(ge=1)
    completion_tokens: int = Field(ge=0)
    total_tokens: int
    prompt_tokens_details: PromptTokens | None = None  # absent where no engine was asked


class TopLogprob(Strict):
    token: str
    logprob: float = Field(le=0)
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Strict):
    content: list[TokenLogprob]
    refusal: None


class ChatMessage(Strict):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Strict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class Head(Strict):
    id: str = Field(pattern="^(chatcmpl|cmpl)-[0-9a-f]{32}$")
    created: int
    model: str
    system_fingerprint: str


class ChatAnswer(Head):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(Strict):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Strict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatChunk(Head):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextLogprobs(Strict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(Strict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextAnswer(Head):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage


class TextChunkChoice(TextChoice):
    finish_reason: Literal["stop", "length"] | None  # type: ignore[assignment]


class TextChunk(Head):
    object: Literal["text_completion"]
    choices: list[TextChunkChoice]
    usage: Usage | None = None


class ErrorBody(Strict):
    message: str = Field(min_length=5)
    type: str
    param: str | None
    code: str | None


class Error(Strict):
    error: ErrorBody


# ---- one form for all ways


@dataclass
class Response:
    """One choice; `tokens` are (token, log-probability) pairs, None when none were asked for."""

    text: str = ""
    finish: str | None = None
    tokens: list[tuple[str, float | None]] | None = None


@dataclass
class Outcome:
    responses: list[Response]
    usage: tuple[int, int] | None = None
    chunks: int = field(default=0, compare=False)


class Raw:
    """Plain HTTP to the server."""

    def __init__(self, base: str) -> None:
        self._http = httpx.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=120)
        self._base = base
        self._references: dict[str, Outcome] = {}

    def post(self, route: str, body: dict[str, Any]) -> httpx.Response:
        return self._http.post(f"{self._base}/{route}", json=body)

    def close(self) -> None:
        self._http.close()

    def reference(self, kind: str, request: dict[str, Any]) -> Outcome:
        """The answer to a request with a seed, checked strictly and remembered."""
        key = f"{kind} {request!r}"
        if key not in self._references:
            self._references[key] = ask_raw(self, kind, request)
        return self._references[key]


def ask_raw(raw: Raw, kind: str, request: dict[str, Any]) -> Outcome:
    """The answer without any client library, checked strictly."""
    extra = request.get("extra_body", {})
    body = {"model": MODEL, **{k: v for k, v in request.items() if k != "extra_body"}, **extra}
    answered = raw.post("chat/completions" if kind == "chat" else "completions", body)
    assert answered.status_code == 200, answered.text
    answer = (ChatAnswer if kind == "chat" else TextAnswer).model_validate_json(answered.content)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    return of_answer(answer)


def of_answer(answer: Any) -> Outcome:
    responses = []
    for place, choice in enumerate(answer.choices):
        assert choice.index == place
        text = choice.message.content if hasattr(choice, "message") else choice.text
        responses.append(Response(text, choice.finish_reason, tokens_of(choice.logprobs)))
    return Outcome(responses, (answer.usage.prompt_tokens, answer.usage.completion_tokens))


def tokens_of(logprobs: Any) -> list[tuple[str, float | None]] | None:
    if logprobs is None:
        return None
    if hasattr(logprobs, "content"):
        return [(entry.token, entry.logprob) for entry in logprobs.content]
    return list(zip(logprobs.tokens, logprobs.token_logprobs, strict=True))


class Assembly:
    """A stream put together; what OpenAI promises about the order of its chunks is checked on the way."""

    def __init__(self) -> None:
        self.responses: dict[int, Response] = defaultdict(Response)
        self.usage: tuple[int, int] | None = None
        self.heads: set[tuple[Any, ...]] = set()
        self.chunks = 0

    def add(self, chunk: Any) -> None:
        self.chunks += 1
        self.heads.add((chunk.id, chunk.created, chunk.model, chunk.object, chunk.system_fingerprint))
        assert self.usage is None, "the usage chunk is the last"
        if not chunk.choices:
            self.usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
            return
        assert chunk.usage is None
        for choice in chunk.choices:
            is_first = choice.index not in self.responses
            response = self.responses[choice.index]
            assert response.finish is None, "nothing follows a finish reason"
            if hasattr(choice, "delta"):
                assert choice.delta.role == ("assistant" if is_first else None)
            response.text += (choice.delta.content or "") if hasattr(choice, "delta") else choice.text
            response.finish = choice.finish_reason
            tokens = tokens_of(choice.logprobs)
            if tokens is not None:
                response.tokens = (response.tokens or []) + tokens

    def outcome(self) -> Outcome:
        assert len(self.heads) == 1
        responses = [self.responses[index] for index in range(len(self.responses))]
        return Outcome(responses, self.usage, self.chunks)


class Clients:
    """The official clients on one server, and a loop for the asynchronous one."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.sync = openai.OpenAI(base_url=base, api_key=KEY, max_retries=0)
        self.asynchronous = openai.AsyncOpenAI(base_url=base, api_key=KEY, max_retries=0)
        self.runner = asyncio.Runner()

    def close(self) -> None:
        self.sync.close()
        self.runner.run(self.asynchronous.close())
        self.runner.close()


def _create(client: Any, kind: str, request: dict[str, Any], *, is_stream: bool) -> Any:
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if is_stream else {}
    return (client.chat.completions if kind == "chat" else client.completions).create(model=MODEL, **options, **request)


def ask_sync(clients: Clients, kind: str, request: dict[str, Any]) -> Outcome:
    return of_answer(_create(clients.sync, kind, request, is_stream=False))


def stream_sync(clients: Clients, kind: str, request: dict[str, Any]) -> Outcome:
    assembly = Assembly()
    for chunk in _create(clients.sync, kind, request, is_stream=True):
        assembly.add(chunk)
    return assembly.outcome()


def ask_async(clients: Clients, kind: str, request: dict[str, Any]) -> Outcome:
    async def ask() -> Outcome:
        return of_answer(await _create(clients.asynchronous, kind, request, is_stream=False))

    return clients.runner.run(ask())


def stream_async(clients: Clients, kind: str, request: dict[str, Any]) -> Outcome:
    async def ask() -> Outcome:
        assembly = Assembly()
        async for chunk in await _create(clients.asynchronous, kind, request, is_stream=True):
            assembly.add(chunk)
        return assembly.outcome()

    return clients.runner.run(ask())


MODES: dict[str, Callable[[Clients, str, dict[str, Any]], Outcome]] = {
    "sync": ask_sync,
    "sync-stream": stream_sync,
    "async": ask_async,
    "async-stream": stream_async,
}


def events(content: bytes) -> list[Any]:
    """The JSON of server-sent events; the last one is "[DONE]"."""
    parts = content.split(b"\n\n")
    assert parts[-1] == b""
    assert all(part.startswith(b"data: ") for part in parts[:-1])
    texts = [part[len(b"data: ") :] for part in parts[:-1]]
    assert texts[-1] == b"[DONE]"
    return [json.loads(text) for text in texts[:-1]]
