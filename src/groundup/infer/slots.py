"""Which slot of the cache holds what, and how what one held becomes another's beginning.

Slots 0..num_active-1 belong to the responses that are decoded, so that a step reads one dense view. Any other is either
taken by a prompt that is being computed, or free: then what it holds remains usable as a prefix until it is the least
recently used one of the free slots and its place is needed.
"""

from dataclasses import dataclass, field

import torch

from groundup.model.cache import SlotCache
from groundup.model.config import ModelConfig

MIN_PREFIX_TOKENS = 16
"""Shorter common prefixes are computed anew; copying them saves nothing."""


@dataclass(eq=False)
class Slot:
    """What one place in the cache holds; `index` is where, and changes when it is moved."""

    index: int
    tokens: list[int] = field(default_factory=list)
    """Those whose keys and values are there."""
    is_taken: bool = False
    last_used: int = 0
    """When it was let go or copied from; 0 when nothing in it is of use."""

    @property
    def is_useful(self) -> bool:
        return self.is_taken or self.last_used > 0


class Slots:
    """All slots of one cache; memory grows with use up to `cache_bytes(config, max_slots, max_tokens)`."""

    def __init__(
        self, config: ModelConfig, max_slots: int, max_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.cache = SlotCache(config, max_slots, dtype, device, max_tokens)
        self.num_active = 0
        self._slots = [Slot(index) for index in range(max_slots)]
        self._clock = 0

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are kept."""
        return sum(len(slot.tokens) for slot in self._slots)

    def longest_prefix(self, prompt: list[int]) -> tuple[int, Slot | None]:
        """How many tokens of the prompt some slot holds, and which; the last token is always computed anew."""
        best, source = 0, None
        for slot in self._slots:
            length = common_length(prompt, slot.tokens)
            if length > best:
                best, source = length, slot
        best = min(best, len(prompt) - 1)
        return (best, source) if best >= MIN_PREFIX_TOKENS else (0, None)

    def take(self, prompt: list[int]) -> Slot:
        """A slot for a prompt; it holds as much of it as was found somewhere.

        Why: a conversation that goes on stays where it is; a prefix that others may want as well is copied.
        """
        length, source = self.longest_prefix(prompt)
        if source is not None and not source.is_taken and len(source.tokens) - length < MIN_PREFIX_TOKENS:
            source.is_taken = True
            source.tokens = prompt[:length]
            return source
        slot = self._oldest_free()
        if source is not None:
            self._touch(source)
        return self._begin(slot, source, prompt[:length])

    def fork(self, source: Slot) -> Slot:
        """A second slot that holds the same."""
        return self._begin(self._oldest_free(), source, source.tokens[:])

    def activate(self, slot: Slot) -> None:
        """Put a taken slot behind the active ones and count it among them."""
        self._swap(slot, self._slots[self.num_active])
        self.num_active += 1

    def release(self, slot: Slot) -> None:
        """Free a slot; of the active ones the last takes its place."""
        slot.is_taken = False
        self._touch(slot)
        if slot.index < self.num_active:
            self.num_active -= 1
            self._swap(slot, self._slots[self.num_active])

    def _begin(self, slot: Slot, source: Slot | None, tokens: list[int]) -> Slot:
        if source is not None and source is not slot:
            self.cache.copy(source.index, slot.index, len(tokens))
        slot.is_taken, slot.tokens = True, tokens
        return slot

    def _oldest_free(self) -> Slot:
        return min((slot for slot in self._slots if not slot.is_taken), key=lambda slot: (slot.last_used, slot.index))

    def _touch(self, slot: Slot) -> None:
        self._clock += 1
        slot.last_used = self._clock if len(slot.tokens) >= MIN_PREFIX_TOKENS else 0

    def _swap(self, first: Slot, second: Slot) -> None:
        if first is second:
            return
        if first.is_useful and second.is_useful:
            self.cache.swap(first.index, second.index, max(len(first.tokens), len(second.tokens)))
        else:
            source, target = (first, second) if first.is_useful else (second, first)
            self.cache.copy(source.index, target.index, len(source.tokens))
            target.tokens = []
        first.index, second.index = second.index, first.index
        self._slots[first.index], self._slots[second.index] = first, second


def common_length(first: list[int], second: list[int]) -> int:
    """How many tokens two lists begin with in common, 0 when fewer than are worth a copy."""
    if first[:MIN_PREFIX_TOKENS] != second[:MIN_PREFIX_TOKENS]:
        return 0
    length = 0
    for a, b in zip(first, second):
        if a != b:
            break
        length += 1
    return length
