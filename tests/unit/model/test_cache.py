"""The slot cache: cached and uncached forwards agree, whatever was grown, copied or exchanged in between."""

import pytest
import torch

from groundup.model.cache import BLOCK_POSITIONS, SlotCache, cache_bytes
from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer

T = 40


def tiny_model(n_kv_heads: int) -> Transformer:
    model = Transformer(ModelConfig(96, 32, 2, 4, n_kv_heads, 8, 64, 128))
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def new_cache(model: Transformer, max_slots: int = 8) -> SlotCache:
    return SlotCache(model.config, max_slots, torch.float32, torch.device("cpu"))


@torch.inference_mode()
def run(model: Transformer, cache: SlotCache, first_slot: int, starts: list[int], tokens: torch.Tensor) -> torch.Tensor:
    positions = cache.begin(first_slot, starts, tokens.shape[1])
    return model(tokens, positions, cache=cache)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("cuts", [[T], [1] * T, [17, 1, 22], [39, 1]])
def test_cached_equals_uncached(n_kv_heads: int, cuts: list[int]) -> None:
    model = tiny_model(n_kv_heads)
    tokens = torch.randint(0, 96, (3, T), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(tokens)
    cache = new_cache(model)
    parts, start = [], 0
    for count in cuts:
        parts.append(run(model, cache, 0, [start] * 3, tokens[:, start : start + count]))
        start += count
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=2e-6, rtol=0)


def test_rows_at_different_positions_see_only_their_own_past() -> None:
    model = tiny_model(2)
    tokens = torch.randint(0, 96, (2, T), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = model(tokens)
    cache = new_cache(model)
    run(model, cache, 0, [0], tokens[:1, :30])
    run(model, cache, 1, [0], tokens[1:, :5])
    out = run(model, cache, 0, [30, 5], torch.stack((tokens[0, 30:34], tokens[1, 5:9])))
    torch.testing.assert_close(out[0], expected[0, 30:34], atol=2e-6, rtol=0)
    torch.testing.assert_close(out[1], expected[1, 5:9], atol=2e-6, rtol=0)


def test_a_copied_prefix_and_exchanged_slots_continue_alike() -> None:
    model = tiny_model(2)
    tokens = torch.randint(0, 96, (2, T), generator=torch.Generator().manual_seed(3))
    tokens[1, :20] = tokens[0, :20]
    with torch.inference_mode():
        expected = model(tokens)
    cache = new_cache(model)
    run(model, cache, 0, [0], tokens[:1])
    cache.copy(0, 3, 20)
    cache.swap(3, 1, 20)
    out = run(model, cache, 1, [20], tokens[1:, 20:])
    torch.testing.assert_close(out[0], expected[1, 20:], atol=2e-6, rtol=0)


def test_growing_keeps_what_is_stored_and_stays_within_the_slots() -> None:
    model = tiny_model(2)
    cache = new_cache(model, max_slots=5)
    cache.reserve(1, 3)
    assert cache.capacity == (1, BLOCK_POSITIONS)
    cache.keys[1][0, :, 2] = 7.0
    cache.reserve(3, BLOCK_POSITIONS + 1)
    assert cache.capacity == (3, 2 * BLOCK_POSITIONS)
    assert (cache.keys[1][0, :, 2] == 7).all()
    assert cache.keys[1].sum() == 7 * 2 * 8
    cache.reserve(4, 1)
    assert cache.capacity == (5, 2 * BLOCK_POSITIONS)


def test_memory_is_what_the_estimate_says() -> None:
    model = tiny_model(2)
    cache = new_cache(model)
    cache.reserve(8, 100)
    assert cache.num_bytes == cache_bytes(model.config, 8, 100) > 0
    # 7B, one position in fp16: 524,288 bytes.
    seven = ModelConfig(32_000, 4096, 32, 32, 32, 128, 11_008)
    assert cache_bytes(seven, 1, BLOCK_POSITIONS, torch.float16) == BLOCK_POSITIONS * 524_288


def test_a_selection_of_slots_goes_on_by_itself() -> None:
    """Two continuations of one prefix and one of another, the old cache untouched."""
    model = tiny_model(2)
    tokens = torch.randint(0, 96, (3, T), generator=torch.Generator().manual_seed(5))
    tokens[1, :7] = tokens[0, :7]
    with torch.inference_mode():
        expected = model(tokens)
    cache = new_cache(model)
    run(model, cache, 0, [0], tokens[2:, :3])
    run(model, cache, 1, [0], tokens[:1, :7])
    before = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
    chosen = cache.select([1, 1, 0], T)
    ends = [7, 7, 3]
    rest = torch.stack([row[end : end + 30] for row, end in zip(tokens, ends)])
    out = run(model, chosen, 0, ends, rest)
    for row, end in enumerate(ends):
        torch.testing.assert_close(out[row], expected[row, end : end + 30], atol=2e-6, rtol=0)
    assert all(map(torch.equal, before, (*cache.keys, *cache.values)))
