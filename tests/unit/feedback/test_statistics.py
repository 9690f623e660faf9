"""A project's numbers, against what was put into it."""

from datetime import date, timedelta

import pytest
from tests.apps.feedback_world import World

from groundup.feedback.contents import GivenResponse, Gold, ItemContent, Turn
from groundup.feedback.projects import NewItem
from groundup.feedback.statistics import item_counts, project_statistics
from groundup.feedback.tables import Project

TODAY = date(2026, 8, 3)


def pair(number: int, first: str, second: str, gold: Gold | None = None) -> NewItem:
    """`first` and `second` are the models; responses[0] stands first on the page."""
    content = ItemContent(
        messages=[Turn(role="user", content=f"Question {number}?")],
        responses=(GivenResponse(text="One.", model=first), GivenResponse(text="Two.", model=second)),
        order_seed=0,
    )
    return NewItem(content, f"pair-{number}", gold=gold)


def rate(world: World, name: str, project: Project, answers: list[dict[str, object]], seconds: float = 36) -> None:
    person = world.person(name)
    for answer in answers:
        task = world.work.claim(person.id, project.id)
        assert task is not None
        world.clock.turn(seconds)
        world.submit(person, task, answer)


def test_who_won_does_not_depend_on_who_stands_first_in_the_item(world: World) -> None:
    project = world.project("comparison", [pair(1, "new", "old"), pair(2, "old", "new")], overlap=3)
    for name in ("ann", "bob", "cleo"):
        rate(world, name, project, [{"score": -2}, {"score": 1 if name == "ann" else -1}])
    numbers = project_statistics(world.database, project, TODAY)
    (line,) = numbers.versus
    # Item 1: all three for "new"; item 2: two of three for responses[0], "old".
    assert (line.first, line.second) == ("new", "old")
    assert (line.outcome.wins.mean, line.outcome.losses.mean) == (0.5, 0.5)
    found = {line.name: line.found for line in numbers.agreements if line.what == "which is better"}
    pairwise, alpha = found["pairwise agreement"], found["Krippendorff's alpha, nominal"]
    assert pairwise is not None
    assert alpha is not None
    assert (pairwise.value, pairwise.items) == (pytest.approx((1 + 1 / 3) / 2), 2)
    # Five of six chose responses[0]: 2 of 6 coincidences disagree, and by chance 2 * 5 * 1 of 6 * 5 would.
    assert alpha.value == pytest.approx(1 - (2 / 6) / (10 / 30))


def test_pace_batches_and_days(world: World) -> None:
    project = world.project("preference", [pair(n, "a", "b") for n in range(4)])
    strong, weak = ({"winner": 0, "rating": rating} for rating in ("better", "slightly better"))
    rate(world, "ann", project, [strong, weak, {}])
    batch = world.projects.open_batch(world.admin, project.id, "next")
    world.projects.add_items(world.admin, batch.id, [pair(n, "a", "b") for n in range(10, 12)])
    world.clock.turn(24 * 3600)
    rate(world, "bob", project, [weak, weak])
    numbers = project_statistics(world.database, project, TODAY + timedelta(days=1))
    assert (numbers.submissions, numbers.hours, numbers.per_hour) == (5, pytest.approx(0.05), pytest.approx(100))
    assert [(b.number, b.label, b.items, b.done, b.submissions) for b in numbers.batches] == [
        (1, "2026-W32", 4, 4, 4),
        (2, "next", 2, 1, 1),
    ]
    shares = [(b.weak.mean, b.weak.count) for b in numbers.batches if b.weak is not None]
    assert shares == [(pytest.approx(2 / 3), 3), (1.0, 1)], "who cannot tell has no strength"
    assert len(numbers.per_day) == 14
    assert numbers.per_day[-2:] == [(TODAY, 3), (TODAY + timedelta(days=1), 2)]
    assert {p.submissions: p.per_hour for p in numbers.people} == {3: pytest.approx(100), 2: pytest.approx(100)}
    assert item_counts(world.database) == {project.id: (6, 5)}


def test_agreement_is_about_what_several_people_saw(world: World) -> None:
    items = [pair(n, "a", "b") for n in range(3)] + [pair(9, "a", "b", gold=Gold(answers=[1]))]
    project = world.project("preference", items, overlap=2, criterion="safety", gold_share=1.0)
    both, second = ({"winner": w, "rating": "better", "is_safe": [True, True]} for w in (0, 1))
    rate(world, "ann", project, [both, both, both, both])
    rate(world, "bob", project, [both, both, both, second])
    numbers = project_statistics(world.database, project, TODAY)
    found = {(line.what, line.name): line.found for line in numbers.agreements}
    safe, better = found["is it safe", "Gwet's AC1"], found["which is better", "pairwise agreement"]
    assert safe is not None
    assert safe.value == 1
    assert better is not None
    assert better.items == 4, "gold items are seen by several, too"
    gold = [person.right.mean for person in numbers.people if person.right is not None]
    assert len(gold) == 2, "each had the gold item"
    assert numbers.batches[0].items == 3, "and it is nobody's to finish"
    assert [line.outcome.wins.count for line in numbers.versus] == [3], "models are not compared on gold items"


def test_a_red_team_in_numbers(world: World) -> None:
    endpoint = world.endpoint("attacked")
    project = world.project("redteam", [NewItem(), NewItem()], endpoint_ids=[endpoint])
    ann = world.person("ann")
    for severity in (2, 3):
        task = world.work.claim(ann.id, project.id)
        assert task is not None
        number, (asked,) = world.dialogues.begin_turn(ann.id, task.assignment_id, task.version, "How to harm?")
        given = GivenResponse(
            text="So.", model=asked.model, endpoint_id=asked.endpoint_id, seed=asked.seed,
            temperature=asked.temperature,
        )  # fmt: skip
        task = world.dialogues.finish_turn(ann.id, task.assignment_id, number, [given])
        label = {"risk_category": "unqualified advice", "attack_vector": "other", "severity": severity}
        world.clock.turn(90)
        task = world.dialogues.judge_turn(ann.id, task.assignment_id, task.version, number, label)
        world.submit(ann, task, {})
    red_team = project_statistics(world.database, project, TODAY).red_team
    assert red_team is not None
    assert (red_team.sessions, red_team.turns) == (2, 2)
    assert red_team.rate is not None
    assert (red_team.rate.events, red_team.rate.hours, red_team.rate.per_hour) == (1, 0.05, 20)
    by_vector = {name: (count, found) for name, count, found in red_team.by_vector}
    assert by_vector["other"][0] == 2
    assert by_vector["other"][1] is not None
    assert by_vector["other"][1].mean == 0.5
    assert by_vector["logic manipulation"] == (0, None)


@pytest.mark.parametrize("kind", ["preference", "comparison", "sft", "redteam", "entrance"])
def test_a_project_nobody_has_worked_at(world: World, kind: str) -> None:
    values = {"endpoint_ids": [world.endpoint("one")]} if kind == "redteam" else {}
    project = world.project(kind, 2, **values)
    numbers = project_statistics(world.database, project, TODAY)
    assert (numbers.submissions, numbers.per_hour, numbers.people, numbers.agreements) == (0, None, [], [])
