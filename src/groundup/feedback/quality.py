"""What judgements say about the people who gave them, the models they are about, and the pace of the work.

Everything here is a pure function of judgements; `statistics.py` reads those out of the database.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from scipy import stats

from groundup.align.judges import RATINGS
from groundup.evals.compare import CONFIDENCE, Interval
from groundup.feedback.agreement import Array, rating_table, share

GRADES = {rating: grade for grade, rating in enumerate(RATINGS, 1)}
"""How much better a response is: 1 negligibly, 4 significantly."""
WEAK_GRADES = (1, 2)
MIN_JUDGEMENTS, MIN_GOLD = 20, 5
"""From how many on a person is held against the others. Choice: below that, chance makes too many stand out."""
ODD_P = 0.01
FAST_SHARE = 1 / 3
"""Of the group's median time, below which somebody is unusually fast."""


@dataclass(frozen=True)
class Judgement:
    """One person's decision between two responses."""

    pair: Hashable
    """The same for everybody who judged this pair."""
    annotator: str
    score: int
    """Above 0: the pair's first response is better, below: the second; 0: no difference, or cannot tell."""
    shown_first: int
    """Which of the two stood first on the page: 0 or 1."""
    seconds: float
    batch: int = 0
    is_right: bool | None = None
    """Of gold items alone."""


@dataclass(frozen=True)
class PersonQuality:
    """One annotator beside the others; None where nothing can be said."""

    annotator: str
    judgements: int
    gold: Interval | None
    """Share of gold items answered rightly."""
    others: Interval | None
    """Share of pairs with the same winner as most of the others'."""
    seconds: float
    """Median for a judgement."""
    first: Interval | None
    """Share of decisions for the response that stood first; 0.5 without a bias."""
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """One model against another, over items: shares of wins, ties and losses, and of wins among the decided."""

    wins: Interval
    ties: Interval
    losses: Interval
    decided: Interval | None


@dataclass(frozen=True)
class Rate:
    """Events in a time and how many that is an hour, with an exact Poisson interval."""

    events: int
    hours: float
    per_hour: float
    low: float
    high: float


def grade_of(winner: int | None, rating: str | None) -> int:
    """A judgement of a pair as one number from -4 to 4; above 0: the first is better."""
    if winner is None or rating is None:
        return 0
    return GRADES[rating] if winner == 0 else -GRADES[rating]  # type: ignore[index]


def sign(score: int) -> int:
    """Who won: 1 the first, -1 the second, 0 nobody."""
    return (score > 0) - (score < 0)


def score_table(judgements: Iterable[Judgement], largest: int) -> Array:
    """Scores of each pair, for ordered statistics. Shapes: returns (n, 2 * largest + 1)."""
    return rating_table(_scores(judgements).values(), range(-largest, largest + 1))


def winner_table(judgements: Iterable[Judgement]) -> Array:
    """Winners of each pair, for nominal statistics. Shapes: returns (n, 3)."""
    return rating_table([[sign(score) for score in each] for each in _scores(judgements).values()], (-1, 0, 1))


def person_qualities(judgements: Sequence[Judgement]) -> list[PersonQuality]:
    """Every annotator, by name."""
    by_person: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        by_person[judgement.annotator].append(judgement)
    medians = {name: median(j.seconds for j in own) for name, own in by_person.items()}
    usual = median(medians.values()) if medians else 0.0
    winners = _winners_by_pair(judgements)
    return [_person(name, by_person[name], winners, medians[name], usual) for name in sorted(by_person)]


def _person(
    name: str, own: Sequence[Judgement], winners: Mapping[Hashable, Mapping[str, int]], seconds: float, usual: float
) -> PersonQuality:
    gold = [judgement.is_right for judgement in own if judgement.is_right is not None]
    alike = []
    for judgement in own:
        others = _majority(winner for who, winner in winners[judgement.pair].items() if who != name)
        if others is not None:
            alike.append(others == sign(judgement.score))
    decided = [(judgement.score > 0) == (judgement.shown_first == 0) for judgement in own if judgement.score]
    warnings = []
    if len(gold) >= MIN_GOLD and sum(gold) < 0.8 * len(gold):
        warnings.append("fewer than 80 % of the gold items right")
    if len(decided) >= MIN_JUDGEMENTS and stats.binomtest(sum(decided), len(decided)).pvalue < ODD_P:
        warnings.append("favours a side of the page")
    if len(own) >= MIN_JUDGEMENTS and seconds < FAST_SHARE * usual:
        warnings.append("unusually fast")
    return PersonQuality(
        name, len(own), _share(gold), _share(alike), seconds, _share(decided), tuple(warnings)
    )  # fmt: skip


def outcome(scores_of_items: Sequence[Sequence[int]]) -> Outcome | None:
    """The first model against the second, from each item's scores; None without an item.

    Choice: an item goes to whom most of its raters chose; without a majority it is a tie. Source: appendix A.3.7 for
    three raters; section 3.4.2 for the 7 points and for wins, ties and losses.
    """
    results = Counter(_majority(map(sign, scores)) or 0 for scores in scores_of_items if scores)
    items = results.total()
    if not items:
        return None
    won, lost = results[1], results[-1]
    return Outcome(
        share(won, items), share(results[0], items), share(lost, items),
        share(won, won + lost) if won + lost else None,
    )  # fmt: skip


def weak_share(scores: Iterable[int]) -> Interval | None:
    """Share of decisions graded slightly or negligibly better. Source: figure 25, where it grows with the batches."""
    return _share([abs(score) in WEAK_GRADES for score in scores if score])


def rate_per_hour(events: int, hours: float) -> Rate | None:
    """Violations a person finds in an hour (gamma of section 4.3), or any other count; None without time."""
    if hours <= 0:
        return None
    tail = (1 - CONFIDENCE) / 2
    low = stats.chi2.ppf(tail, 2 * events) / 2 if events else 0.0
    high = stats.chi2.ppf(1 - tail, 2 * events + 2) / 2
    return Rate(events, hours, events / hours, float(low) / hours, float(high) / hours)


def _scores(judgements: Iterable[Judgement]) -> dict[Hashable, list[int]]:
    found: dict[Hashable, list[int]] = defaultdict(list)
    for judgement in judgements:
        found[judgement.pair].append(judgement.score)
    return found


def _winners_by_pair(judgements: Iterable[Judgement]) -> dict[Hashable, dict[str, int]]:
    found: dict[Hashable, dict[str, int]] = defaultdict(dict)
    for judgement in judgements:
        found[judgement.pair][judgement.annotator] = sign(judgement.score)
    return found


def _majority(votes: Iterable[int]) -> int | None:
    """What more than half of the votes say."""
    counts = Counter(votes)
    winner, count = counts.most_common(1)[0] if counts else (None, 0)
    return winner if 2 * count > counts.total() else None


def _share(hits: Sequence[Any]) -> Interval | None:
    return share(sum(map(bool, hits)), len(hits)) if hits else None
