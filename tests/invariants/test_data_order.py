"""The rows of each step are the same whatever the stop point, the number of ranks and the micro-batch size."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from groundup.base.records import Dialogue, Message
from groundup.data.batches import TokenBatches
from groundup.data.packing import PackedBatches

NUM_WINDOWS, CONTEXT, BATCH_ROWS = 997, 8, 10


class CountingShards(SimpleNamespace):
    """Token i at place i, so that the first token of a window names it."""

    num_tokens = NUM_WINDOWS * CONTEXT + 1
    num_documents = 1
    folder, split = "fake", "train"

    def read(self, start, stop):
        return np.arange(start, min(stop, self.num_tokens), dtype=np.int64)


class LetterChat:
    """One id for each character; every dialogue of the test has text of its own."""

    def encode_dialogue(self, dialogue):
        ids, is_response = [], []
        for message in dialogue.messages:
            text = [ord(c) for c in message.content] + [0]
            ids += text
            is_response += [message.role == "assistant"] * len(text)
        return ids, is_response


def token_batches():
    return TokenBatches(CountingShards(), BATCH_ROWS, CONTEXT, seed=11)


def packed_batches():
    rng = random.Random(0)
    dialogues = [
        Dialogue((Message("user", chr(200 + i)), Message("assistant", chr(200 + i) * rng.randint(1, 12))))
        for i in range(311)
    ]
    return PackedBatches(dialogues, LetterChat(), BATCH_ROWS, 31, seed=11, isolate=True)


def rows_of(batches, step, world_size, micro_rows):
    """The rows that carry loss, as the trainer would compute them over all ranks."""
    rows = []
    for rank in range(world_size):
        for batch in batches.micro_batches(step, rank, world_size, micro_rows):
            for tokens, targets, is_target in zip(batch.tokens, batch.targets, batch.is_target):
                if is_target.any():
                    rows.append((tuple(tokens.tolist()), tuple(targets.tolist()), tuple(is_target.tolist())))
    return rows


@pytest.mark.parametrize("make", [token_batches, packed_batches])
def test_200_random_stops_with_other_ranks_and_micro_batches_give_the_same_rows(make):
    batches = make()
    num_steps = 2 * batches.steps_per_epoch
    expected = [rows_of(batches, step, 1, BATCH_ROWS) for step in range(num_steps)]
    assert min(map(len, expected)) > 0
    rng = random.Random(1)
    for _ in range(200):
        # A new process: nothing but the step number is carried over.
        resumed, step = make() if rng.random() < 0.02 else batches, rng.randrange(num_steps)
        for later in range(step, min(step + 3, num_steps)):
            world_size, micro_rows = rng.choice([1, 2, 4]), rng.choice([1, 2, 3, 4, 7, 64])
            assert rows_of(resumed, later, world_size, micro_rows) == expected[later], (later, world_size, micro_rows)


def test_an_epoch_of_windows_repeats_none_and_skips_none():
    batches = token_batches()
    seen = [
        row[0][0] // CONTEXT for step in range(3 * NUM_WINDOWS // BATCH_ROWS) for row in rows_of(batches, step, 2, 3)
    ]
    for epoch in range(2):
        here = seen[epoch * NUM_WINDOWS : (epoch + 1) * NUM_WINDOWS]
        assert sorted(here) == list(range(NUM_WINDOWS)), f"epoch {epoch}"
    assert seen[:NUM_WINDOWS] != seen[NUM_WINDOWS : 2 * NUM_WINDOWS]


def test_an_epoch_of_dialogues_repeats_none_and_skips_none():
    batches = packed_batches()
    epochs = []
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        rows = [row for step in steps for row in rows_of(batches, step, 4, 2)]
        assert len(rows) == len(batches.rows)
        letters = [c for tokens, _, _ in rows for c in sorted({t for t in tokens if t})]
        assert sorted(letters) == [200 + i for i in range(311)]
        epochs.append(rows)
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
