"""Agreement against published numbers, other packages' numbers and loops that follow the definitions."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.feedback.agreement import (
    Agreement,
    Level,
    Weights,
    agreement_weights,
    gwet,
    krippendorff_alpha,
    pairwise_agreement,
    rating_table,
    share,
)

# Twelve units rated by up to four observers: the example of Krippendorff, "Computing Krippendorff's alpha-reliability"
# (2011), section C.
UNITS = [
    [1, 1, 1], [2, 2, 3, 2], [3, 3, 3, 3], [3, 3, 3, 3], [2, 2, 2, 2], [1, 2, 3, 4],
    [4, 4, 4, 4], [1, 1, 2, 1], [2, 2, 2, 2], [5, 5, 5], [1, 1], [3],
]  # fmt: skip
FOUR_ITEMS = [(1, 1), (2, 2), (1, 2), (3, 3)]
RATINGS = st.lists(st.lists(st.integers(0, 4), min_size=0, max_size=4), min_size=2, max_size=12)


def value(found: Agreement | None) -> float:
    assert found is not None
    assert found.low <= found.value <= found.high <= 1
    return found.value


@pytest.mark.parametrize(("level", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_is_krippendorffs_own_example(level: Level, published: float) -> None:
    assert value(krippendorff_alpha(rating_table(UNITS, range(1, 6)), level)) == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize(
    ("weights", "four_items", "units"),
    [
        ("nominal", 0.62791, 0.77544),
        ("linear", 0.72414, 0.85874),
        ("quadratic", 0.81818, 0.91400),
        ("ordinal", 0.78082, 0.89894),
    ],
)
def test_gwet_is_what_irrcac_says(weights: Weights, four_items: float, units: float) -> None:
    """Values of irrCAC 0.4.4, CAC(ratings, weights=...).gwet()."""
    assert value(gwet(rating_table(FOUR_ITEMS, range(1, 4)), weights)) == pytest.approx(four_items, abs=6e-6)
    assert value(gwet(rating_table(UNITS, range(1, 6)), weights)) == pytest.approx(units, abs=6e-6)


def test_percent_agreement_of_the_example() -> None:
    found = pairwise_agreement(rating_table(UNITS, range(1, 6)))
    assert found is not None
    assert found.value == pytest.approx(0.81818, abs=6e-6)
    assert (found.items, found.ratings) == (11, 41)


def pairs_of(items: list[list[int]]) -> list[list[tuple[int, int]]]:
    return [list(permutations(item, 2)) for item in items if len(item) >= 2]


@given(RATINGS, st.sampled_from(["nominal", "linear", "quadratic", "ordinal"]))
def test_gwet_equals_a_loop_over_pairs_of_raters(items: list[list[int]], name: Weights) -> None:
    weights = agreement_weights(name, 5)
    pairs = pairs_of(items)
    found = gwet(rating_table(items, range(5)), name)
    if len(pairs) < 2:
        assert found is None
        return
    agreed = sum(sum(weights[a, b] for a, b in item) / len(item) for item in pairs) / len(pairs)
    rated = [item for item in items if item]
    prevalence = [sum(item.count(k) / len(item) for item in rated) / len(rated) for k in range(5)]
    chance = weights.sum() / 20 * sum(p * (1 - p) for p in prevalence)
    assert value(found) == pytest.approx((agreed - chance) / (1 - chance), abs=1e-12)


@given(RATINGS, st.sampled_from(["nominal", "ordinal", "interval"]))
def test_alpha_equals_a_loop_over_pairs_of_ratings(items: list[list[int]], level: Level) -> None:
    everything = [rating for item in items if len(item) >= 2 for rating in item]
    counts = [everything.count(k) for k in range(5)]

    def distance(a: int, b: int) -> float:
        low, high = sorted((a, b))
        between = sum(counts[low : high + 1]) - (counts[low] + counts[high]) / 2
        return {"nominal": float(a != b), "ordinal": between**2, "interval": float(a - b) ** 2}[level]

    expected = sum(distance(a, b) for a, b in permutations(everything, 2))
    found = krippendorff_alpha(rating_table(items, range(5)), level)
    if len(pairs_of(items)) < 2 or expected == 0:
        assert found is None
        return
    n = len(everything)
    observed = sum(distance(a, b) / (len(item) - 1) for item in items for a, b in permutations(item, 2)) / n
    assert value(found) == pytest.approx(1 - observed / (expected / (n * (n - 1))), abs=1e-10)


def test_with_nearly_one_category_ac1_stays_high_where_alpha_falls() -> None:
    """The paradox that AC1 was made for: 95 of 100 labels "safe" by both, and five disagreements."""
    table = rating_table([(1, 1)] * 95 + [(0, 1)] * 5, range(2))
    assert value(pairwise_agreement(table)) == 0.95
    assert value(gwet(table)) > 0.94
    assert value(krippendorff_alpha(table)) < 0


def test_the_interval_is_wider_with_fewer_items() -> None:
    few, many = (gwet(rating_table(FOUR_ITEMS * k, range(1, 4)), "ordinal") for k in (5, 50))
    assert few is not None
    assert many is not None
    assert few.value == pytest.approx(many.value)
    assert many.high - many.low < (few.high - few.low) / 2


def test_the_interval_covers_the_truth() -> None:
    """Ratings simulated with a known chance of error; of 200 intervals 95 % should hold the true value."""
    rng = np.random.default_rng(0)

    def simulated(n: int) -> np.ndarray:
        truth = rng.choice(3, size=n, p=(0.6, 0.3, 0.1))
        wrong = rng.random((3, n)) < 0.4
        return rating_table(np.where(wrong, rng.integers(0, 3, (3, n)), truth).T.tolist(), range(3))

    true = value(gwet(simulated(50_000), "ordinal"))
    samples = [gwet(simulated(60), "ordinal") for _ in range(200)]
    covered = sum(s is not None and s.low <= true <= s.high for s in samples)
    assert 180 <= covered <= 199


def test_few_unanimous_items_do_not_claim_certainty() -> None:
    three, many = (pairwise_agreement(rating_table([(0, 0), (1, 1), (0, 0)] * k, range(2))) for k in (1, 100))
    assert three is not None
    assert many is not None
    assert three.value == many.value == 1
    assert three.low == pytest.approx(0.4385, abs=1e-4), "Wilson's lower limit for 3 of 3"
    assert many.low > 0.98


def test_one_disagreement_on_which_everything_hinges_gives_a_wide_interval() -> None:
    found = krippendorff_alpha(rating_table([(0, 0)] * 9 + [(0, 1)], range(2)))
    assert found is not None
    assert found.high - found.low > 1


def test_nothing_to_compare() -> None:
    assert gwet(rating_table([(1,), (), (2,)], range(3))) is None
    assert pairwise_agreement(rating_table([(1, 1), (2,)], range(3))) is None
    assert krippendorff_alpha(rating_table([(1, 1)] * 5, range(3))) is None
    assert rating_table([], range(3)).shape == (0, 3)
    assert gwet(rating_table([], range(3))) is None


def test_a_share_and_its_interval() -> None:
    found = share(0, 30)
    assert (found.mean, found.low, found.count) == (0, 0, 30)
    assert found.high == pytest.approx(0.1135, abs=1e-4), "Wilson: z^2 / (n + z^2)"
