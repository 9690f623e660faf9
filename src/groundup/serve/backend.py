"""The seam between the API and an engine: token ids go in, deltas come out.

Why: chat format, limits and wire format are the API's alone, so every engine behind this seam is served alike.
"""

from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from typing import Any, Protocol

from groundup.base.generation import Delta, EngineStats, PromptScores, SamplingParams
from groundup.text.chat import ChatFormat
from groundup.text.tokenizer import Tokenizer


class Unavailable(Exception):
    """No answer from this model now: loading, shutting down, or its engine failed. The API answers 503."""

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Overloaded(Unavailable):
    """The bounded queue is full. The API answers 429."""

    def __init__(self, retry_after_seconds: float) -> None:
        super().__init__("too many requests are waiting; try again later", retry_after_seconds)


class Cancelled(Unavailable):
    """A running request was ended by the server, not by its client: the time to drain was over."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down and ended this request")


class RequestFailed(Exception):
    """One request failed inside the engine; the others go on. The API answers 500."""


class NotImplementedByEngine(Exception):
    """This engine cannot do what was asked for. The API answers 400."""


def cached_tokens_of(stream: AsyncIterator[Delta]) -> int | None:
    """How much of its prompt was kept from earlier ones when the request came; None where the engine does not tell."""
    found: int | None = getattr(stream, "cached_tokens", None)
    return found


class Backend(Protocol):
    """A loaded model that answers requests; all methods are called from one event loop."""

    name: str
    tokenizer: Tokenizer
    chat: ChatFormat
    max_tokens: int
    """The context, new tokens included."""
    generation: Mapping[str, Any]
    """What the model's generation_config.json says; empty without one."""

    def start(
        self, prompt: Sequence[int], params: SamplingParams, group: Hashable | None = None
    ) -> AsyncIterator[Delta]:
        """Queue a request and iterate over what its responses get, until each has a finish reason.

        Closing the iterator (`aclose`) cancels the request and frees its slots at once. Requests of one `group` count
        as one when an engine gives out its slots fairly. See `cached_tokens_of` for what an iterator may tell.

        Raises: Overloaded, Unavailable or UserError at the call itself; Unavailable or RequestFailed while iterating.
        """
        ...

    async def score(self, prompt: Sequence[int], top: int) -> PromptScores:
        """Raises: NotImplementedByEngine."""
        ...

    async def embed(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """One vector of length 1 for each row of ids.

        Raises: NotImplementedByEngine.
        """
        ...

    def health(self) -> str | None:
        """None when well, else what is wrong."""
        ...

    def stats(self) -> EngineStats: ...

    async def close(self, grace_seconds: float) -> None:
        """Refuse new requests, let running ones finish for so long, then end them with `Cancelled`."""
        ...
