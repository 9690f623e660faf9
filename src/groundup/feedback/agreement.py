"""How far raters agree on the same items, beyond chance, with 95 % intervals.

Shape letters: n items, q categories, D different rows of a table, B samples of the items. Every statistic here starts
from a table (n, q) of how many raters put an item into a category, so raters may be missing anywhere.

Source: Gwet, "Computing inter-rater reliability and its variance in the presence of high agreement" (2008) for AC1, and
his Handbook of Inter-Rater Reliability (4th edition, 2014) for AC2 and missing ratings; Krippendorff, "Computing
Krippendorff's alpha-reliability" (2011). The paper reports AC1 and AC2 (section 3.4.2 and appendix A.4.6) and does not
name its weights.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from groundup.evals.compare import CONFIDENCE, Interval

Array = NDArray[np.float64]
Weights = Literal["nominal", "linear", "quadratic", "ordinal"]
"""How much two ratings agree: nominal only if they are equal, the others the more the nearer they are."""
Level = Literal["nominal", "ordinal", "interval"]


@dataclass(frozen=True)
class Agreement:
    """A coefficient (1: perfect, 0: as by chance) and its interval, over items that at least two raters have rated."""

    value: float
    low: float
    high: float
    items: int
    ratings: int


def share(hits: int, count: int) -> Interval:
    """A share of independent items and Wilson's interval."""
    found = stats.binomtest(hits, count).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(hits / count, float(found.low), float(found.high), count)


Parts = Callable[[Array, Array], tuple[Array, Array]]
"""(times (B, D), rows (D, q)) -> observed and expected disagreement (B,), in units of the largest there can be."""


def rating_table(items: Iterable[Sequence[Hashable]], categories: Sequence[Hashable]) -> Array:
    """How many raters chose each category. Shapes: returns (n, q).

    `items`: the ratings that each item has, each one of `categories`; for ordered statistics those are in order.
    """
    place = {category: index for index, category in enumerate(categories)}
    assert len(place) == len(categories) >= 2
    rows = [[place[rating] for rating in ratings] for ratings in items]
    table = np.zeros((len(rows), len(place)))
    for index, row in enumerate(rows):
        np.add.at(table[index], row, 1)
    return table


def pairwise_agreement(table: Array) -> Agreement | None:
    """Of two raters of an item, the chance that they say the same; each item counts alike. Shapes: (n, q)."""
    return _with_interval(table, _pairwise_parts)


def gwet(table: Array, weights: Weights = "nominal") -> Agreement | None:
    """Gwet's AC1 (nominal weights) or AC2 (the others); None with fewer than two items that two raters met on.

    Shapes: (n, q).
    Why: unlike kappa it does not fall towards 0 when nearly all items belong to one category, as with safety labels.
    """
    matrix = agreement_weights(weights, table.shape[1])
    return _with_interval(table, lambda times, rows: _gwet_parts(times, rows, matrix))


def krippendorff_alpha(table: Array, level: Level = "nominal") -> Agreement | None:
    """Krippendorff's alpha; None as for `gwet`, and where all chose one category, for which it is undefined.

    Shapes: (n, q).
    """
    return _with_interval(table, lambda times, rows: _alpha_parts(times, rows, level))


def agreement_weights(weights: Weights, q: int) -> Array:
    """How much two ratings agree, 1 on the diagonal, 0 between the ends. Shapes: returns (q, q).

    Source: Gwet 2014, section 3.5.
    """
    apart = np.abs(np.subtract.outer(np.arange(q), np.arange(q)))
    if weights == "nominal":
        return np.eye(q)
    if weights == "linear":
        return np.asarray(1 - apart / (q - 1))
    if weights == "quadratic":
        return np.asarray(1 - (apart / (q - 1)) ** 2)
    pairs_between = np.array([[math.comb(int(d) + 1, 2) for d in row] for row in apart])
    return np.asarray(1 - pairs_between / math.comb(q, 2))


def _pairwise_parts(times: Array, rows: Array) -> tuple[Array, Array]:
    paired = rows.sum(axis=1) >= 2
    agreement = times[:, paired] @ _agreement_of_items(rows[paired], np.eye(rows.shape[1]))
    return 1 - agreement / times[:, paired].sum(axis=1), np.ones(len(times))


def _gwet_parts(times: Array, rows: Array, weights: Array) -> tuple[Array, Array]:
    raters = rows.sum(axis=1)
    paired = raters >= 2
    agreement = times[:, paired] @ _agreement_of_items(rows[paired], weights) / times[:, paired].sum(axis=1)
    prevalence = times @ (rows / raters[:, None]) / times.sum(axis=1, keepdims=True)
    q = rows.shape[1]
    by_chance = weights.sum() / (q * (q - 1)) * (prevalence * (1 - prevalence)).sum(axis=1)
    return 1 - agreement, 1 - by_chance


def _agreement_of_items(rows: Array, weights: Array) -> Array:
    """Mean weight of all pairs of an item's raters. Shapes: (D, q) -> (D,)."""
    raters = rows.sum(axis=1)
    return np.asarray((rows * (rows @ weights - 1)).sum(axis=1) / (raters * (raters - 1)))


def _alpha_parts(times: Array, rows: Array, level: Level) -> tuple[Array, Array]:
    raters, q = rows.sum(axis=1), rows.shape[1]
    paired = raters >= 2
    rows, times, raters = rows[paired], times[:, paired], raters[paired]
    pairs = rows[:, :, None] * rows[:, None, :] - np.eye(q) * rows[:, :, None]
    coincidences = np.tensordot(times, pairs / (raters - 1)[:, None, None], 1)
    marginals = coincidences.sum(axis=2)
    total = marginals.sum(axis=1)
    distance = _squared_distances(marginals, level)
    observed = (coincidences * distance).sum(axis=(1, 2)) / total
    expected = np.einsum("bk,bl,bkl->b", marginals, marginals, distance) / (total * (total - 1))
    largest = distance.max(axis=(1, 2))
    return observed / largest, expected / largest


def _squared_distances(marginals: Array, level: Level) -> Array:
    """Shapes: (B, q) -> (B, q, q). Ordinal: how many ratings lie between two categories, half of their own included."""
    q = marginals.shape[1]
    if level == "ordinal":
        ranks = np.cumsum(marginals, axis=1) - marginals / 2
        return np.asarray((ranks[:, :, None] - ranks[:, None, :]) ** 2)
    apart = np.subtract.outer(np.arange(q), np.arange(q)).astype(np.float64)
    one = (apart != 0).astype(np.float64) if level == "nominal" else apart**2
    return np.broadcast_to(one, (len(marginals), q, q))


def _with_interval(table: Array, parts: Parts) -> Agreement | None:
    """1 - observed / expected disagreement, and its interval over items.

    Choice: the jackknife over items with Student's quantile; it is exact to repeat, and on 10 to 100 simulated items it
    covers the truth at least as often as 2,000 bootstrap resamples. Rows that are alike are left out together, so that
    the cost does not grow with n. Where a sample shows no disagreement at all, neither do its parts; its lower limit
    then comes from Wilson's interval for n unanimous items of n, so that three items that agree prove little.
    """
    table = table[table.sum(axis=1) > 0]
    items = int((table.sum(axis=1) >= 2).sum())
    if items < 2:
        return None
    rows, times = np.unique(table, axis=0, return_counts=True)
    observed, expected = (float(part[0]) for part in parts(times[None].astype(np.float64), rows))
    if expected == 0:
        return None
    value = 1 - observed / expected
    if observed == 0:
        low = 1 - (1 - share(items, items).low) / expected
        return Agreement(value, low, 1.0, items, int(table.sum()))
    without_one, chance = parts(times[None] - np.eye(len(times)), rows)
    values = 1 - np.divide(without_one, chance, out=np.zeros_like(chance), where=chance > 0)
    n = len(table)
    mean = float(times @ values) / n
    error = math.sqrt((n - 1) / n * float(times @ (values - mean) ** 2))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    return Agreement(value, value - reach, min(1.0, value + reach), items, int(table.sum()))
