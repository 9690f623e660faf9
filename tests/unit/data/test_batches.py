from types import SimpleNamespace

import numpy as np
import pytest
import torch

from groundup.base.errors import UserError
from groundup.data.batches import TokenBatches, micro_ranges, permute, positions_within


class FakeShards(SimpleNamespace):
    """Tokens 0..n-1, so that a token is its own place; a document every ten tokens."""

    def __init__(self, num_tokens):
        super().__init__(num_tokens=num_tokens, num_documents=-(-num_tokens // 10), folder="fake", split="train")

    def read(self, start, stop):
        return np.arange(start, min(stop, self.num_tokens), dtype=np.int64)

    def document_ids(self, start, stop):
        return self.read(start, stop) // 10


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_permute_is_a_permutation_that_depends_on_the_seed(size):
    image = permute(np.arange(size), size, seed=1)
    assert sorted(image.tolist()) == list(range(size))
    if size >= 64:
        other = permute(np.arange(size), size, seed=2)
        assert (image == other).mean() < 0.1
        assert (image == np.arange(size)).mean() < 0.1


def test_permute_leaves_no_trace_of_the_order():
    size = 10_000
    image = permute(np.arange(size), size, seed=3)
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.04
    steps = np.diff(image)
    assert len(np.unique(steps)) > 5000, "neighbours should not keep their distance"


def test_permute_of_a_huge_range_needs_no_memory():
    size = 10**12 + 7
    image = permute(np.arange(1000), size, seed=3)
    assert len(set(image.tolist())) == 1000
    assert image.max() < size
    assert image.max() > size // 2


@pytest.mark.parametrize("num_tokens", [2, 5, 16, 17, 18, 1000])
def test_every_token_but_the_first_is_target_once_an_epoch(num_tokens):
    batches = TokenBatches(FakeShards(num_tokens), batch_rows=3, context=16, seed=5)
    windows = batches.build(np.arange(batches.num_windows))
    assert sorted(windows.targets[windows.is_target].tolist()) == list(range(1, num_tokens))
    assert torch.equal(windows.targets[windows.is_target], windows.tokens[windows.is_target] + 1)
    assert windows.num_targets == num_tokens - 1
    assert windows.tokens.shape == (batches.num_windows, 16)


def test_isolated_documents_restart_and_are_not_predicted_from_others():
    batch = TokenBatches(FakeShards(100), batch_rows=1, context=25, seed=0, isolate=True).build(np.array([1, 3]))
    tokens = batch.tokens[0].tolist()
    assert tokens == list(range(25, 50))
    assert batch.document_ids[0].tolist() == [t // 10 for t in tokens]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, *range(10), *range(10)]
    not_targets = [t for t, is_target in zip(tokens, batch.is_target[0].tolist()) if not is_target]
    assert not_targets == [29, 39, 49]
    last = batch.document_ids[1].tolist()
    assert last[-1] == 9
    assert not batch.is_target[1, -1], "the last window's filling carries no loss"


def test_positions_restart_with_each_document():
    ids = np.array([[4, 4, 4, 5, 5, 9], [1, 1, 1, 1, 1, 1]])
    assert positions_within(ids).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]


def test_micro_ranges_by_hand():
    assert micro_ranges(7, 0, 2, 2) == [range(0, 2), range(2, 3)]
    assert micro_ranges(7, 1, 2, 2) == [range(3, 5), range(5, 7)]
    assert [len(rows) for rank in range(4) for rows in micro_ranges(3, rank, 4, 8)] == [0, 1, 1, 1]


def test_all_micro_batches_of_all_ranks_have_one_shape():
    batches = TokenBatches(FakeShards(1000), batch_rows=7, context=16, seed=0)
    for world_size in (1, 2, 3, 16):
        per_rank = [batches.micro_batches(0, rank, world_size, 2) for rank in range(world_size)]
        assert len({len(micro) for micro in per_rank}) == 1
        assert len({batch.tokens.shape for micro in per_rank for batch in micro}) == 1
        assert sum(batch.num_targets for micro in per_rank for batch in micro) == 7 * 16


def test_epochs_have_orders_of_their_own():
    batches = TokenBatches(FakeShards(64 * 16 + 1), batch_rows=64, context=16, seed=0)
    first, second = batches.window_ids(0), batches.window_ids(1)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(64))
    assert first.tolist() != second.tolist()
    assert batches.steps_per_epoch == 1


def test_nothing_to_learn_from_is_an_error():
    with pytest.raises(UserError, match="nothing to learn"):
        TokenBatches(FakeShards(1), batch_rows=1, context=8, seed=0)


def test_order_is_frozen():
    """A change of these numbers breaks the resuming of every run that is under way."""
    batches = TokenBatches(FakeShards(20 * 8 + 1), batch_rows=10, context=8, seed=42)
    assert batches.window_ids(0).tolist() == [3, 8, 12, 2, 15, 16, 7, 17, 11, 13]
    assert batches.window_ids(1).tolist() == [4, 10, 1, 14, 18, 6, 0, 9, 19, 5]
