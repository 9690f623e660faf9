"""The space at the start of what continues a text.

A tokenizer that puts a space before every text takes it away when it decodes. What continues a prompt is not the start
of a text, so a space that its first token brings is given back, and a stop string that begins with it counts.
"""

import dataclasses
from collections.abc import AsyncIterator

from groundup.base.generation import Delta, SamplingParams
from groundup.serve.backend import cached_tokens_of
from groundup.serve.wire import close_iterator
from groundup.text.tokenizer import Tokenizer


class FirstSpace(AsyncIterator[Delta]):
    """An engine's deltas with the space given back."""

    def __init__(self, stream: AsyncIterator[Delta], tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._stream = stream
        self._samples = [_Start(tokenizer, params) for _ in range(params.num_samples)]

    @property
    def cached_tokens(self) -> int | None:
        return cached_tokens_of(self._stream)

    async def __anext__(self) -> Delta:
        while not all(sample.is_over for sample in self._samples):
            delta = await anext(self._stream)
            sample = self._samples[delta.sample]
            if not sample.is_over:
                return sample.changed(delta)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel what is unfinished."""
        await close_iterator(self._stream)


class _Start:
    """One response: what its first tokens say, until it is clear whether a stop string is there."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self.is_over = False
        self._tokenizer, self._stop_ids = tokenizer, params.stop_ids
        self._stops = [stop for stop in params.stop if stop.startswith(" ")]
        self._decoder = tokenizer.stream_decoder()
        self._said = ""
        """The start of the text as the tokens have it; the engine may hold some of it back."""
        self._held = ""
        """What was owed and came from the engine meanwhile."""
        self._is_at_start = self._is_open = True

    def changed(self, delta: Delta) -> Delta:
        is_last = delta.finish_reason is not None
        self.is_over = is_last
        if not self._is_open:
            return delta
        for token_id in delta.token_ids:
            if token_id not in self._stop_ids:
                self._read(token_id)
        said = self._said + (self._decoder.flush() if is_last else "")
        if said and any(said.startswith(stop) for stop in self._stops):
            self.is_over = True
            return dataclasses.replace(delta, text="", finish_reason="stop")
        self._held += delta.text
        waits = self._is_at_start or any(stop.startswith(said) for stop in self._stops if said)
        if waits and not is_last:
            return dataclasses.replace(delta, text="")
        self._is_open = False
        return dataclasses.replace(delta, text=self._held)

    def _read(self, token_id: int) -> None:
        piece = self._tokenizer.token_bytes(token_id)
        if self._is_at_start and piece:
            self._is_at_start = False
            self._held = self._said = " " if piece.startswith(b" ") else ""
        if self._said:
            self._said += self._decoder.push(token_id)
