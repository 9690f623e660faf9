"""Slots: what each holds after any order of taking, forking, activating and releasing."""

import random

import pytest
import torch

from groundup.infer.slots import MIN_PREFIX_TOKENS, Slot, Slots, common_length
from groundup.model.cache import cache_bytes
from groundup.model.config import ModelConfig

CONFIG = ModelConfig(100, 8, 2, 2, 1, 4, 8, 256)
CPU = torch.device("cpu")


def new_slots(count: int) -> Slots:
    return Slots(CONFIG, count, 256, torch.float32, CPU)


def compute(slots: Slots, slot: Slot, tokens: list[int]) -> None:
    """Stand in for a forward: the keys and values of a token are its id."""
    start = len(slot.tokens)
    slots.cache.reserve(slot.index + 1, start + len(tokens))
    for store in (*slots.cache.keys, *slots.cache.values):
        store[slot.index, :, start : start + len(tokens)] = torch.tensor(tokens, dtype=torch.float32)[:, None]
    slot.tokens += tokens


def check(slots: Slots) -> None:
    for index, slot in enumerate(slots._slots):
        assert slot.index == index
        if slot.is_useful and slot.tokens:
            for store in (*slots.cache.keys, *slots.cache.values):
                assert store[index, 0, : len(slot.tokens), 0].tolist() == slot.tokens
    assert all(slot.is_taken for slot in slots._slots[: slots.num_active])


def fill(slots: Slots, tokens: list[int]) -> Slot:
    slot = slots.take(tokens)
    compute(slots, slot, tokens[len(slot.tokens) :])
    return slot


def test_every_slot_holds_what_it_says_after_thousands_of_moves() -> None:
    draw = random.Random(0)
    slots = new_slots(6)
    stems = [[draw.randrange(100) for _ in range(60)] for _ in range(3)]
    active: list[Slot] = []
    begun: list[tuple[Slot, list[int]]] = []
    reused = 0
    for _ in range(3000):
        move = draw.randrange(5)
        if move == 0 and len(active) + len(begun) < 6:
            prompt = draw.choice(stems)[: draw.randrange(1, 60)]
            prompt += [draw.randrange(100) for _ in range(draw.randrange(20))]
            slot = slots.take(prompt)
            assert slot.tokens == prompt[: len(slot.tokens)]
            assert len(slot.tokens) < len(prompt)
            reused += len(slot.tokens)
            begun.append((slot, prompt))
        elif move == 1 and begun:
            slot, prompt = draw.choice(begun)
            missing = prompt[len(slot.tokens) :]
            compute(slots, slot, missing[: draw.randrange(len(missing) + 1)])
            if slot.tokens == prompt:
                begun.remove((slot, prompt))
                copies = [slots.fork(slot)] if len(active) + len(begun) < 5 and draw.random() < 0.5 else []
                for each in (slot, *copies):
                    slots.activate(each)
                    active.append(each)
        elif move == 2 and active:
            compute(slots, draw.choice(active), [draw.randrange(100)])
        elif move == 3 and active:
            slots.release(active.pop(draw.randrange(len(active))))
        elif move == 4 and begun and draw.random() < 0.3:
            slots.release(begun.pop(draw.randrange(len(begun)))[0])
        assert slots.num_active == len(active)
        assert {slot.index for slot in active} == set(range(len(active)))
        check(slots)
    assert reused > 1000
    assert slots.cache.num_bytes <= cache_bytes(CONFIG, 6, slots.cache.capacity[1])


def test_the_least_recently_used_prefix_goes_first() -> None:
    slots = new_slots(3)
    prompts = [[n] * 30 for n in range(4)]
    for prompt in prompts[:3]:
        slots.release(fill(slots, prompt))
    again = fill(slots, [*prompts[0], 50])  # goes on with the oldest, which is now the newest
    assert again.tokens == [*prompts[0], 50]
    slots.release(again)
    slots.release(fill(slots, prompts[3]))
    held = [slots.longest_prefix([*prompt, 99])[0] for prompt in prompts]
    assert held == [30, 0, 30, 30]


def test_a_conversation_stays_in_its_slot_and_a_shared_prefix_is_copied() -> None:
    slots = new_slots(3)
    system = [7] * 40
    first = fill(slots, system + [1] * 30)
    slots.release(first)
    second = slots.take(system + [2] * 30)
    assert second is not first
    assert len(second.tokens) == 40
    slots.release(second)
    assert slots.take(system + [1] * 30 + [3]) is first


def test_prefixes_shorter_than_a_copy_is_worth_are_not_reused() -> None:
    slots = new_slots(2)
    slots.release(fill(slots, [1] * (MIN_PREFIX_TOKENS - 1)))
    assert slots.longest_prefix([1] * 40) == (0, None)
    assert slots.num_tokens == MIN_PREFIX_TOKENS - 1


@pytest.mark.parametrize("length", [0, 3, MIN_PREFIX_TOKENS - 1, MIN_PREFIX_TOKENS, 40])
def test_common_length(length: int) -> None:
    first, second = [1] * length + [2] * 5, [1] * length + [3] * 9
    assert common_length(first, second) == (length if length >= MIN_PREFIX_TOKENS else 0)
    assert common_length(second + [4] * 9, [*second, 5]) == (length + 9 if length + 9 >= MIN_PREFIX_TOKENS else 0)
