"""Keys and values of the sequences being generated.

Shape letters: B sequences, T tokens, S cached positions, G key/value heads, K channels per head, L layers.

Choice: one slot per sequence, grown in blocks as slots and positions are needed. Pages would waste less memory when
lengths differ much, but each step would have to gather them. The engine keeps its active sequences in slots 0..n-1,
so that a step reads one view; a prefix is reused by copying it to another slot.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from groundup.model.config import ModelConfig

BLOCK_POSITIONS = 32


class SlotCache:
    """`begin` says where the tokens of the next forward stand, `update` stores them layer by layer."""

    def __init__(
        self,
        config: ModelConfig,
        max_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        max_positions: int | None = None,
    ) -> None:
        self.max_slots = max_slots
        self.max_positions = max_positions or config.max_positions
        G, K, layers = config.n_kv_heads, config.head_dim, range(config.n_layers)
        self.keys = [torch.empty(0, G, 0, K, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty(0, G, 0, K, dtype=dtype, device=device) for _ in layers]

    @property
    def capacity(self) -> tuple[int, int]:
        """(slots, positions) that have memory."""
        return self.keys[0].shape[0], self.keys[0].shape[2]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def reserve(self, slots: int, positions: int) -> None:
        """Make room for at least so many and keep what is stored. New memory is zero: what is masked must be finite."""
        old_slots, old_positions = self.capacity
        assert slots <= self.max_slots
        if positions > old_positions:
            # An eighth more than before: growing copies everything, and what is not used yet is still multiplied.
            positions = max(positions, min(old_positions + old_positions // 8, self.max_positions))
        positions = max(old_positions, _whole_blocks(positions))
        slots = old_slots if slots <= old_slots else min(self.max_slots, max(slots, 2 * old_slots))
        if (slots, positions) == (old_slots, old_positions):
            return
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = old.new_empty(slots, old.shape[1], positions, old.shape[3])
                new[:old_slots, :, :old_positions] = old
                new[:old_slots, :, old_positions:] = 0
                new[old_slots:] = 0
                tensors[layer] = new

    def begin(self, first_slot: int, starts: list[int], T: int) -> Tensor:
        """The next forward holds T tokens for each of slots first_slot, first_slot + 1, ..., from `starts` on.

        Shapes: -> positions (B, T) int64, to be given to the model.
        """
        device = self.keys[0].device
        self.reserve(first_slot + len(starts), max(starts) + T)
        self.positions = torch.tensor(starts, device=device)[:, None] + torch.arange(T, device=device)  # (B, T)
        self.slots = slice(first_slot, first_slot + len(starts))
        slots = torch.arange(first_slot, self.slots.stop, device=device)
        self._rows = self._row_of(slots[:, None], self.positions)
        # A view of all positions is dense, and the products of a step copy what is not: cut only where that pays.
        used, positions = _whole_blocks(max(starts) + T), self.capacity[1]
        self.used_positions = used if 2 * used < positions else positions
        self.is_visible: Tensor | None = None
        if max(starts) > 0:
            keys_at = torch.arange(self.used_positions, device=device)
            self.is_visible = (keys_at <= self.positions[:, :, None])[:, None]  # (B, 1, T, S)
        return self.positions

    def begin_packed(self, segments: Sequence[tuple[int, int, int]]) -> Tensor:
        """The next forward holds, one after the other, the tokens of these (slot, start, length).

        Shapes: -> positions (N,) int64.
        """
        device = self.keys[0].device
        self.reserve(max(slot for slot, _, _ in segments) + 1, max(start + length for _, start, length in segments))
        positions = torch.cat([torch.arange(start, start + length, device=device) for _, start, length in segments])
        lengths = torch.tensor([length for _, _, length in segments], device=device)
        slots = torch.tensor([slot for slot, _, _ in segments], device=device).repeat_interleave(lengths)
        self._rows = self._row_of(slots, positions)
        return positions

    def _row_of(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Where the vectors of all heads stand in (slots * G * positions, K). Shapes: two alike (...) -> (... * G,)."""
        heads = torch.arange(self.keys[0].shape[1], device=slots.device)
        rows: Tensor = (slots[..., None] * len(heads) + heads) * self.capacity[1] + positions[..., None]
        return rows.flatten()

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store k, v (..., G, K) of the tokens that `begin` or `begin_packed` named."""
        for all_rows, new in ((self.keys[layer], k), (self.values[layer], v)):
            K = new.shape[-1]
            all_rows.view(-1, K).index_copy_(0, self._rows, new.reshape(-1, K).to(all_rows.dtype))

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, T, G, K); returns the keys and values of these slots, (B, G, S, K) in the cache's dtype."""
        self.write(layer, k, v)
        keys, values = self.keys[layer], self.values[layer]
        return keys[self.slots, :, : self.used_positions], values[self.slots, :, : self.used_positions]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `Transformer.forward` calls: see `groundup.model.transformer.KeyValueCache`."""
        keys, values = self.store(layer, k, v)
        if self.is_visible is None:
            return k.transpose(1, 2), v.transpose(1, 2), None
        return keys.to(k.dtype), values.to(v.dtype), self.is_visible

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another: a shared prefix."""
        self.reserve(target + 1, length)
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]

    def select(self, slots: Sequence[int], positions: int) -> "SlotCache":
        """A new cache whose slots are copies of these (one may come more than once), with room for so many positions.

        Shapes: the new keys and values are (len(slots), G, >= positions, K).
        """
        new = copy.copy(self)
        new.max_slots = len(slots)
        rows, used = torch.tensor(slots, device=self.keys[0].device), min(self.capacity[1], positions)
        for name in ("keys", "values"):
            setattr(new, name, [tensor[:, :, :used].index_select(0, rows) for tensor in getattr(self, name)])
        new.reserve(len(slots), positions)
        return new

    def swap(self, first: int, second: int, length: int) -> None:
        """Exchange the first `length` positions of two slots."""
        for store in (*self.keys, *self.values):
            kept = store[first, :, :length].clone()
            store[first, :, :length] = store[second, :, :length]
            store[second, :, :length] = kept


def cache_bytes(config: ModelConfig, slots: int, positions: int, dtype: torch.dtype = torch.float32) -> int:
    """Memory in bytes of a full cache: 2 x L x G x K numbers for every position of every slot."""
    positions = _whole_blocks(positions)
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * slots * positions * dtype.itemsize


def _whole_blocks(positions: int) -> int:
    return BLOCK_POSITIONS * -(-positions // BLOCK_POSITIONS)
