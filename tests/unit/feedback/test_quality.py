"""What judgements say about people and models: planted behaviour is found, and ordinary work is not."""

import random

import pytest

from groundup.feedback.quality import (
    Judgement,
    grade_of,
    outcome,
    person_qualities,
    rate_per_hour,
    score_table,
    sign,
    weak_share,
    winner_table,
)


def judgement(annotator: str, pair: int, score: int, **values: object) -> Judgement:
    fields = {"shown_first": 0, "seconds": 30.0, "batch": 1, "is_right": None, **values}
    return Judgement(pair, annotator, score, **fields)  # type: ignore[arg-type]


def test_a_judgement_as_one_number() -> None:
    assert grade_of(0, "significantly better") == 4
    assert grade_of(1, "negligibly better") == -1
    assert grade_of(None, None) == 0
    assert [sign(score) for score in (4, 1, 0, -2)] == [1, 1, 0, -1]


def crowd(seed: int = 0) -> list[Judgement]:
    """Three ordinary people and one who clicks on the left at once; 60 pairs with a clear winner each."""
    rng = random.Random(seed)
    found = []
    for pair in range(60):
        truth = rng.choice((-1, 1))
        for name in ("ann", "bob", "cleo"):
            score = truth if rng.random() < 0.9 else -truth
            found.append(judgement(name, pair, 2 * score, shown_first=rng.randrange(2), seconds=rng.uniform(20, 40)))
        first = rng.randrange(2)
        found.append(judgement("left", pair, 1 if first == 0 else -1, shown_first=first, seconds=3.0))
    return found


def test_who_clicks_at_the_left_at_once_stands_out_and_nobody_else() -> None:
    people = {person.annotator: person for person in person_qualities(crowd())}
    assert people["left"].warnings == ("favours a side of the page", "unusually fast")
    assert people["left"].first is not None
    assert people["left"].first.mean == 1
    assert people["left"].seconds == 3.0
    for name in ("ann", "bob", "cleo"):
        assert people[name].warnings == ()
        others = people[name].others
        assert others is not None
        assert others.mean > 0.7
    assert people["left"].others is not None
    assert people["left"].others.high < 0.8


def test_few_judgements_are_held_against_nobody() -> None:
    hasty = [judgement("new", pair, 1, seconds=1.0) for pair in range(5)]
    (found,) = (person for person in person_qualities([*crowd(), *hasty]) if person.annotator == "new")
    assert found.warnings == ()


def test_gold_items() -> None:
    rows = [judgement("ann", pair, 1, is_right=pair < 3) for pair in range(6)]
    (found,) = person_qualities(rows)
    assert found.gold is not None
    assert (found.gold.mean, found.gold.count) == (0.5, 6)
    assert "fewer than 80 % of the gold items right" in found.warnings


def test_agreement_with_others_leaves_out_ones_own_vote_and_pairs_without_a_majority() -> None:
    rows = [
        judgement("ann", 1, 2), judgement("bob", 1, 1), judgement("cleo", 1, -1),
        judgement("ann", 2, 2), judgement("bob", 2, -2),
        judgement("ann", 3, 2),
    ]  # fmt: skip
    ann, bob, cleo = person_qualities(rows)
    # Pair 1: to ann, bob and cleo are one each, so no majority; pair 2: bob alone, and he says the other one.
    assert ann.others is not None
    assert (ann.others.mean, ann.others.count) == (0, 1)
    assert bob.others is not None
    assert (bob.others.mean, bob.others.count) == (0, 1)
    assert cleo.others is not None
    assert (cleo.others.mean, cleo.others.count) == (0, 1)


def test_somebody_alone_has_nobody_to_agree_with() -> None:
    (found,) = person_qualities([judgement("ann", 1, 0)])
    assert (found.others, found.gold, found.first, found.judgements) == (None, None, None, 1)
    assert person_qualities([]) == []


def test_tables_put_each_pair_in_one_row() -> None:
    rows = [judgement("ann", 1, 4), judgement("bob", 1, -1), judgement("ann", 2, 0)]
    assert winner_table(rows).tolist() == [[1, 0, 1], [0, 1, 0]]
    table = score_table(rows, 4)
    assert table.shape == (2, 9)
    assert table[0, 8] == table[0, 3] == table[1, 4] == 1


def test_the_majority_of_three_raters_decides_an_item() -> None:
    found = outcome([[3, 1, -1], [2, 0, 0], [1, 0, -1], [-3, -2, -1], [], [1]])
    assert found is not None
    assert (found.wins.mean, found.ties.mean, found.losses.mean) == (2 / 5, 2 / 5, 1 / 5)
    assert found.decided is not None
    assert (found.decided.mean, found.decided.count) == (2 / 3, 3)
    assert found.wins.low < 2 / 5 < found.wins.high
    assert outcome([[]]) is None
    tied = outcome([[0, 0, 0]])
    assert tied is not None
    assert tied.decided is None


def test_weak_preferences_are_the_two_lowest_grades_of_decided_pairs() -> None:
    found = weak_share([4, -3, 2, -1, 0])
    assert found is not None
    assert (found.mean, found.count) == (0.5, 4)
    assert weak_share([0, 0]) is None


def test_violations_an_hour_have_the_exact_interval_of_poisson() -> None:
    """Limits for 10 events are 4.795 and 18.390, for none 0 and 3.689 (Garwood 1936)."""
    found = rate_per_hour(10, 2.0)
    assert found is not None
    assert found.per_hour == 5
    assert (found.low * 2, found.high * 2) == pytest.approx((4.795, 18.390), abs=1e-3)
    none = rate_per_hour(0, 1.0)
    assert none is not None
    assert (none.low, none.high) == pytest.approx((0, 3.689), abs=1e-3)
    assert rate_per_hour(3, 0) is None
