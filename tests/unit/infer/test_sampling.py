"""Token sampling against a plain float64 oracle, hand numbers and chi-square."""

import dataclasses

import numpy as np
import pytest
import torch

from groundup.base.errors import UserError
from groundup.base.generation import SamplingParams
from groundup.infer.sampling import (
    argmax,
    check_params,
    draw,
    draw_nucleus,
    draw_truncated,
    hash_uniforms,
    sample,
    stack_params,
    token_logps,
)

CPU = torch.device("cpu")


def oracle_kept(logits: list[float], temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """Token -> probability after temperature, top-k and top-p, written as the definitions read."""
    weights = np.exp(np.array(logits, dtype=np.float64) / temperature)
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    if top_k:
        order = order[:top_k]
    total = sum(weights[token] for token in order)
    kept, before = [], 0.0
    for token in order:
        if before / total > top_p:
            break
        kept.append(token)
        before += weights[token]
    mass = sum(weights[token] for token in kept)
    return {token: weights[token] / mass for token in kept}


def many_uniforms(count: int, key: int = 1) -> torch.Tensor:
    return torch.from_numpy(hash_uniforms(np.full(count, key, np.uint64), np.arange(count, dtype=np.uint64)))


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, int]:
    """The statistic and its degrees of freedom."""
    expected = probabilities * counts.sum()
    assert (counts[expected == 0] == 0).all(), "drew a token of probability 0"
    used = expected > 0
    return float(((counts - expected)[used] ** 2 / expected[used]).sum()), int(used.sum()) - 1


@pytest.mark.parametrize("vocab_size", [7, 128, 300, 4096])
def test_plain_sampling_follows_the_softmax(vocab_size: int) -> None:
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(0)) * 3
    tokens = draw(logits.expand(20_000, -1).contiguous(), many_uniforms(20_000))
    probabilities = logits.double().softmax(-1)[0].numpy()
    rare = probabilities < 5e-4
    counts = np.bincount(tokens.numpy(), minlength=vocab_size)
    if rare.any():  # chi-square needs cells with enough expected counts
        counts = np.append(counts[~rare], counts[rare].sum())
        probabilities = np.append(probabilities[~rare], probabilities[rare].sum())
    statistic, freedom = chi_square(counts, probabilities)
    assert freedom > 3
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("top_k", [0, 1, 5, 70, 2000])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("spread", [0.05, 1.0, 6.0])
def test_truncated_sampling_equals_the_oracle(top_k: int, top_p: float, spread: float) -> None:
    # A flat distribution over 1500 tokens needs every tier of candidates.
    logits = torch.randn(1, 1500, generator=torch.Generator().manual_seed(7)) * spread
    kept = oracle_kept(logits[0].tolist(), 1.0, top_k, top_p)
    uniforms = (torch.arange(600, dtype=torch.float64) + 0.5) / 600
    tokens = draw_truncated(
        logits.expand(600, -1).contiguous(), torch.full((600,), top_k), torch.full((600,), top_p).double(), uniforms
    )
    order = list(kept)
    reached = np.cumsum(list(kept.values()))
    expected = [order[min(int(np.searchsorted(reached, u, side="right")), len(order) - 1)] for u in uniforms.tolist()]
    differ = sum(a != b for a, b in zip(tokens.tolist(), expected))
    assert set(tokens.tolist()) <= set(order)
    assert differ <= 2  # a uniform within rounding of a border


@pytest.mark.parametrize("attempts", [1, 2, 9])
@pytest.mark.parametrize("top_p", [0.0, 0.2, 0.7, 0.95, 0.9999])
@pytest.mark.parametrize("spread", [0.05, 1.5, 6.0])
def test_nucleus_sampling_follows_the_oracles_distribution(attempts: int, top_p: float, spread: float) -> None:
    """With one attempt every row is sorted, with more nearly none is."""
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(7)) * spread
    kept = oracle_kept(logits[0].tolist(), 1.0, 0, top_p)
    count = 8000
    uniforms = torch.stack([many_uniforms(count, key=key) for key in range(attempts)])
    tokens = draw_nucleus(
        logits.expand(count, -1).contiguous(), torch.full((count,), top_p, dtype=torch.float64), uniforms
    )
    probabilities = np.zeros(300)
    probabilities[list(kept)] = list(kept.values())
    counts = np.bincount(tokens.numpy(), minlength=300)
    assert (counts[probabilities == 0] == 0).all()
    rare = probabilities < 1e-3
    counts = np.append(counts[~rare], counts[rare].sum())
    probabilities = np.append(probabilities[~rare], probabilities[rare].sum())
    statistic, freedom = chi_square(counts, probabilities)
    assert statistic <= max(freedom, 1) + 5 * np.sqrt(2 * max(freedom, 1))


def test_a_nucleus_leaves_out_what_was_masked() -> None:
    logits = torch.full((50, 140), float("-inf"))
    logits[:, [3, 77, 130]] = torch.tensor([1.0, 1.0, -4.0])
    uniforms = torch.stack([many_uniforms(50, key=key) for key in range(4)])
    tokens = draw_nucleus(logits, torch.full((50,), 0.9, dtype=torch.float64), uniforms)
    assert set(tokens.tolist()) == {3, 77}


def test_rows_keep_their_own_parameters_in_a_mixed_batch() -> None:
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(3)) * 2
    params = [
        SamplingParams(temperature=0, want_logps=True),
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.5, top_p=0.8),
        SamplingParams(temperature=1.0, top_k=3),
        SamplingParams(temperature=1.2, top_p=0.4),
        SamplingParams(temperature=0.5, top_k=200, top_p=0.5),
        SamplingParams(),
    ]
    keys, positions = list(range(10, 17)), [0, 5, 9, 2, 4, 0, 7]
    together, logps = sample(logits, stack_params(params, keys, CPU), positions)
    assert logps is not None
    for row, p in enumerate(params):
        alone, _ = sample(logits[row : row + 1], stack_params([p], keys[row : row + 1], CPU), positions[row : row + 1])
        assert alone.item() == together[row].item()
        wide = (logits[row].double() / (p.temperature or 1.0)).log_softmax(-1)
        assert logps[row].item() == pytest.approx(wide[together[row]].item(), abs=1e-5)
    assert together[0] == logits[0].argmax()


def test_greedy_batches_take_no_random_numbers_and_can_give_logps() -> None:
    logits = torch.randn(4, 256, generator=torch.Generator().manual_seed(5))
    greedy = SamplingParams(temperature=0)
    tokens, logps = sample(logits, stack_params([greedy] * 4, [0] * 4, CPU), [0] * 4)
    assert tokens.tolist() == logits.argmax(-1).tolist()
    assert logps is None
    wanted = dataclasses.replace(greedy, want_logps=True)
    _, logps = sample(logits, stack_params([greedy] * 3 + [wanted], [0] * 4, CPU), [0] * 4)
    torch.testing.assert_close(logps, logits.log_softmax(-1).amax(-1))


@pytest.mark.parametrize("vocab_size", [5, 128, 129, 32_000])
def test_argmax_takes_the_first_of_equals(vocab_size: int) -> None:
    logits = torch.randint(0, 4, (9, vocab_size), generator=torch.Generator().manual_seed(1)).float()
    assert argmax(logits).tolist() == [row.tolist().index(max(row.tolist())) for row in logits]


def test_token_logps_by_hand() -> None:
    logits = torch.tensor([[0.0, np.log(3.0)]])
    assert token_logps(logits, torch.tensor([1])).item() == pytest.approx(np.log(0.75), abs=1e-6)


def test_random_numbers_are_splitmix64() -> None:
    # The first outputs of the published generator for seed 0.
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    uniforms = hash_uniforms(np.zeros(3, np.uint64), np.arange(3, dtype=np.uint64))
    assert uniforms.tolist() == [(output >> 11) / 2**53 for output in outputs]
    statistic, freedom = chi_square(
        np.bincount((many_uniforms(50_000).numpy() * 100).astype(int), minlength=100), np.full(100, 0.01)
    )
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


def test_the_last_uniform_never_leaves_the_vocabulary() -> None:
    logits = torch.full((2, 200), -1e9)
    logits[:, 3] = 0.0
    almost_one = torch.full((2,), 1 - 2.0**-53, dtype=torch.float64)
    assert draw(logits, almost_one).tolist() == [3, 3]
    assert draw_truncated(logits, torch.tensor([0, 50]), torch.tensor([0.9, 1.0]).double(), almost_one).tolist() == [
        3,
        3,
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")),
        ("top_p", 1.5), ("top_k", -1), ("num_samples", 0), ("stop", ("",)), ("top_logps", -1),
        ("logit_bias", ((100, 1.0),)), ("logit_bias", ((-1, 1.0),)), ("logit_bias", ((1, float("nan")),)),
        ("frequency_penalty", float("inf")), ("presence_penalty", float("nan")),
    ],
)  # fmt: skip
def test_wrong_parameters_are_named(field: str, value: object) -> None:
    with pytest.raises(UserError, match=field):
        check_params(dataclasses.replace(SamplingParams(), **{field: value}), 100)
    check_params(SamplingParams(), 100)
