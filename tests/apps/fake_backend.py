"""A `Backend` without a model: for what is about HTTP and not about generating. It keeps what it was asked."""

import asyncio
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from typing import Any

from groundup.base.generation import Delta, EngineStats, PromptScores, SamplingParams
from groundup.text.chat import ChatFormat
from groundup.text.tokenizer import Tokenizer

ANSWER = "the quiet king hears a song"


class FakeBackend:
    """Answers every prompt with `ANSWER`, one token after another."""

    def __init__(
        self, tokenizer: Tokenizer, chat: ChatFormat, *, name: str = "fake", max_tokens: int = 100_000
    ) -> None:
        self.name, self.tokenizer, self.chat, self.max_tokens = name, tokenizer, chat, max_tokens
        self.generation: Mapping[str, Any] = {}
        self.prompts: list[list[int]] = []
        self.params: list[SamplingParams] = []
        self.num_open = 0
        self._answer = tokenizer.encode(ANSWER)

    def start(
        self, prompt: Sequence[int], params: SamplingParams, group: Hashable | None = None
    ) -> AsyncIterator[Delta]:
        self.prompts.append(list(prompt))
        self.params.append(params)
        return self._deltas(params)

    async def _deltas(self, params: SamplingParams) -> AsyncIterator[Delta]:
        self.num_open += 1
        try:
            decoders = [self.tokenizer.stream_decoder() for _ in range(params.num_samples)]
            ids = self._answer[: params.max_new_tokens]
            for place, token in enumerate(ids):
                await asyncio.sleep(0)
                for sample, decoder in enumerate(decoders):
                    reason = "length" if place + 1 == len(ids) else None
                    logps = [-1.0] if params.want_logps else []
                    top = [[(i, -1.0 - i) for i in range(params.top_logps)]] if params.top_logps else []
                    yield Delta(0, sample, decoder.push(token), [token], logps, reason, top)  # type: ignore[arg-type]
        finally:
            self.num_open -= 1

    async def score(self, prompt: Sequence[int], top: int) -> PromptScores:
        self.prompts.append(list(prompt))
        rest = len(prompt) - 1
        return PromptScores([-1.0] * rest, [[(i, -1.0 - i) for i in range(top)]] * rest)

    async def embed(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        self.prompts += [list(row) for row in rows]
        return [[1.0, 0.0] for _ in rows]

    def health(self) -> str | None:
        return None

    def stats(self) -> EngineStats:
        return EngineStats(self.num_open, 0, 8, 0, 0, 0, 0)

    async def close(self, grace_seconds: float) -> None:
        pass
