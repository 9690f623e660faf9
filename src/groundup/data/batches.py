"""What the trainer eats: batches, and sources that give the batch of any step without remembering anything.

Why: a batch is a pure function of (seed, step). Resuming, or changing the number of ranks or the micro-batch size,
cannot repeat or skip a row, because no position is stored anywhere.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundup.base.errors import UserError
from groundup.base.seeds import derive_seed
from groundup.data.shards import TokenShards

Int64s = NDArray[np.int64]
PADDING_ID = 0
"""What fills up rows; never a target, so any id would do."""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what they are to predict.

    Shapes: every tensor (B, T); is_target bool, the others int64. `targets[b, t]` is the token after `tokens[b, t]`; it
    carries loss where `is_target[b, t]`. `document_ids` (None: all one) keep the documents of a row from seeing each
    other; `positions` (None: 0..T-1) restart with each.
    """

    tokens: Tensor
    targets: Tensor
    is_target: Tensor
    positions: Tensor | None = None
    document_ids: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Batch(
            self.tokens.to(device), self.targets.to(device), self.is_target.to(device), move(self.positions),
            move(self.document_ids),
        )  # fmt: skip

    @property
    def num_targets(self) -> int:
        """Number of tokens that carry loss."""
        return int(self.is_target.sum())


class BatchSource(Protocol):
    """Batches by step number, counted from 0 and going on through the epochs."""

    batch_rows: int
    """Rows of a global batch: all ranks and micro batches of one optimizer step together."""
    steps_per_epoch: int

    def micro_batches(self, step: int, rank: int, world_size: int, micro_rows: int) -> list[Batch]:
        """What `rank` computes in `step`: batches of `micro_rows` rows (fewer if its share is smaller).

        Why: every rank gets equally many, because sharded models gather weights in each forward pass and would wait for
        ever for a rank that had fewer; and all have one shape, because a compiled model is compiled for a shape. Where
        rows run out, rows without targets stand in.
        """
        ...


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def micro_ranges(num_rows: int, rank: int, world_size: int, micro_rows: int) -> list[range]:
    """The rows (counted within the global batch) of each micro batch of `rank`; ranges may be empty at the end."""
    first, last = num_rows * rank // world_size, num_rows * (rank + 1) // world_size
    num_micro = ceil_div(ceil_div(num_rows, world_size), micro_rows)
    return [range(min(first + i * micro_rows, last), min(first + (i + 1) * micro_rows, last)) for i in range(num_micro)]


def fill_micro_batches(
    row_ids: Int64s, rank: int, world_size: int, micro_rows: int, full_rows: int, build: Callable[[Int64s], Batch]
) -> Iterator[Batch]:
    """The micro batches of `rank` for the global batch `row_ids`, each made by `build` from its row numbers.

    `full_rows` is the size of a full global batch: a shorter last one of an epoch keeps its shapes.
    """
    num_rows = min(micro_rows, ceil_div(full_rows, world_size))
    for rows in micro_ranges(len(row_ids), rank, world_size, micro_rows):
        batch = build(np.resize(np.append(row_ids[rows], row_ids[:1]), num_rows))
        batch.is_target[len(rows) :] = False
        yield batch


def permute(indices: Int64s, size: int, seed: int) -> Int64s:
    """Where a seeded pseudo-random permutation of 0..size-1 sends each index.

    Why: shuffling a list of all windows costs memory that grows with the corpus and has to be redone on resuming. A
    Feistel network is a permutation of 0..4^h-1 computed one index at a time; walking on until the value falls below
    `size` (at most four steps on average) makes it one of 0..size-1.
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = [np.uint64(derive_seed(seed, "feistel", round_number)) for round_number in range(4)]
    values = indices.astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half_bits, keys)
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half_bits: int, keys: list[np.uint64]) -> NDArray[np.uint64]:
    low_bits = np.uint64((1 << half_bits) - 1)
    left, right = values >> np.uint64(half_bits), values & low_bits
    for key in keys:
        mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & low_bits)
    return (left << np.uint64(half_bits)) | right


class TokenBatches:
    """Windows of T tokens over a token corpus, in an order drawn anew for each epoch; for pre-training.

    Each token of the corpus is the target of exactly one window an epoch (the first token, a BOS, of none); the last
    window is filled up with tokens that carry no loss. Global batches run on over the end of an epoch.

    Choice: documents lie end to end and may be cut by windows. The paper does not say whether attention crosses
    documents; plain causal attention is the default, `isolate` keeps them apart.
    """

    def __init__(self, shards: TokenShards, batch_rows: int, context: int, seed: int, *, isolate: bool = False) -> None:
        if shards.num_tokens < 2:
            raise UserError(f"{shards.folder}: split {shards.split!r} has {shards.num_tokens} tokens: nothing to learn")
        self.shards, self.context, self.seed, self.isolate = shards, context, seed, isolate
        self.num_windows = ceil_div(shards.num_tokens - 1, context)
        self.batch_rows = batch_rows
        self.steps_per_epoch = ceil_div(self.num_windows, batch_rows)

    def window_ids(self, step: int) -> Int64s:
        """The windows of the global batch of `step`: (batch_rows,)."""
        rows = np.arange(step * self.batch_rows, (step + 1) * self.batch_rows, dtype=np.int64)
        epochs = rows // self.num_windows
        ids = np.empty_like(rows)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order_seed = derive_seed(self.seed, "epoch", int(epoch))
            ids[here] = permute(rows[here] % self.num_windows, self.num_windows, order_seed)
        return ids

    def micro_batches(self, step: int, rank: int, world_size: int, micro_rows: int) -> list[Batch]:
        return list(
            fill_micro_batches(self.window_ids(step), rank, world_size, micro_rows, self.batch_rows, self.build)
        )

    def build(self, ids: Int64s) -> Batch:
        """The windows of these numbers, as they lie in the corpus; (len(ids), T)."""
        tokens = np.full((len(ids), self.context + 1), PADDING_ID, dtype=np.int64)
        is_target = np.zeros((len(ids), self.context), dtype=bool)
        document_ids = np.full((len(ids), self.context + 1), self.shards.num_documents, dtype=np.int64)
        for row, window in enumerate(ids.tolist()):
            start = window * self.context
            found = self.shards.read(start, start + self.context + 1)
            tokens[row, : len(found)] = found
            is_target[row, : len(found) - 1] = True
            if self.isolate:
                document_ids[row, : len(found)] = self.shards.document_ids(start, start + self.context + 1)
        positions = None
        if self.isolate:
            is_target &= document_ids[:, 1:] == document_ids[:, :-1]
            positions = torch.from_numpy(positions_within(document_ids[:, :-1]))
        return Batch(
            torch.from_numpy(tokens[:, :-1].copy()),
            torch.from_numpy(tokens[:, 1:].copy()),
            torch.from_numpy(is_target),
            positions,
            torch.from_numpy(document_ids[:, :-1].copy()) if self.isolate else None,
        )


def positions_within(document_ids: Int64s) -> Int64s:
    """Positions that restart at 0 wherever the document changes. Shapes: (B, T) -> (B, T)."""
    counts = np.broadcast_to(np.arange(document_ids.shape[1], dtype=np.int64), document_ids.shape)
    is_start = np.ones(document_ids.shape, dtype=bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return counts - np.maximum.accumulate(np.where(is_start, counts, 0), axis=1)
