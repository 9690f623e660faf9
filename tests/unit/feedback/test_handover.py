"""A run's judge and the application on either side of two files."""

import threading
from pathlib import Path
from typing import Any

import pytest
from tests.apps.feedback_world import World

from groundup.align.human import APPLICATION, RATINGS_FILE, TASKS, HumanJudge
from groundup.align.judges import Abstention, Origin, Pair, Verdict
from groundup.base.errors import UserError
from groundup.base.files import read_json
from groundup.base.records import Message, Prompt, read_jsonl
from groundup.feedback.accounts import Account
from groundup.feedback.contents import GivenResponse, JudgedPair, Turn
from groundup.feedback.handover import Handovers, merged

URL = "http://127.0.0.1:8123"
ORIGINS = (Origin("sft-v2@1a", 0.7, True), Origin("sft-v1@2b", 1.3, False))
PAIRS = [
    Pair(Prompt((Message("user", f"Question {n}?"),), criterion=criterion), f"good {n}", f"bad {n}", ORIGINS)
    for criterion, numbers in (("helpfulness", range(4)), ("safety", range(4, 6)))
    for n in numbers
]


def stopped(folder: Path, pairs: list[Pair] = PAIRS) -> UserError:
    with pytest.raises(UserError) as caught:
        HumanJudge(folder, 2).grade(pairs)
    return caught.value


def rate_all(world: World, person: Account, winner: str = "good") -> int:
    """Rate everything this person can get, by what is read on the page; how many."""
    done = 0
    for project in world.projects.projects():
        while project.is_open and (task := world.work.claim(person.id, project.id)) is not None:
            assert task.responses is not None
            place = next(i for i, text in enumerate(task.responses) if text.startswith(winner))
            said: dict[str, Any] = {"winner": place, "rating": "better", "reason": "clear"}
            if task.criterion == "safety":
                said["is_safe"] = [text.startswith(winner) for text in task.responses]
            world.submit(person, task, said)
            done += 1
    return done


def test_both_sides_from_the_first_task_to_the_last_verdict(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "try" / ".work" / "comparisons-2-0123456789ab" / "annotation"
    handovers = Handovers(world.database, world.projects, [tmp_path / "runs" / "try"])
    handovers.look(URL)
    assert handovers.open == [], "the application may be there first"
    assert "groundup annotate --handover" in (stopped(folder).remedy or "")
    handovers.look(URL)
    assert URL in (stopped(folder).remedy or "")
    projects = world.projects.projects()
    assert [(p.criterion, p.kind, p.name.rsplit(" ", 1)[0]) for p in projects] == [
        ("helpfulness", "preference", "try comparisons-2 helpfulness"),
        ("safety", "preference", "try comparisons-2 safety"),
    ]
    ann = world.person("ann")
    assert rate_all(world, ann) == 6
    handovers.look(URL)
    (handover,) = handovers.open
    assert (handover.tasks, handover.rated, handover.trouble) == (6, 6, "")
    found = HumanJudge(folder, 2).grade(PAIRS)
    helpful = Verdict(0, "better", None, "clear", ann.pseudonym)
    assert found == [helpful] * 4 + [Verdict(0, "better", (True, False), "clear", ann.pseudonym)] * 2
    (folder / TASKS).unlink()
    handovers.look(URL)
    assert handovers.open == [], "the run took its ratings and went on"


def test_a_rating_that_is_taken_back_is_taken_back_from_the_run_too(world: World, tmp_path: Path) -> None:
    stopped(tmp_path, PAIRS[:2])
    handovers = Handovers(world.database, world.projects, [tmp_path])
    handovers.look(URL)
    ann = world.person("ann")
    rate_all(world, ann)
    handovers.look(URL)
    (project,) = world.projects.projects()
    task = world.work.undo(ann.id, project.id)
    handovers.look(URL)
    assert "1 of 2 comparisons" in stopped(tmp_path, PAIRS[:2]).message
    world.submit(ann, task, {"winner": None})
    handovers.look(URL)
    assert sum(isinstance(found, Abstention) for found in HumanJudge(tmp_path, 2).grade(PAIRS[:2])) == 1


def test_what_a_kill_kept_from_the_file_is_appended_by_the_next_application(world: World, tmp_path: Path) -> None:
    stopped(tmp_path, PAIRS[:3])
    Handovers(world.database, world.projects, [tmp_path]).look(URL)
    rate_all(world, world.person("ann"))
    # Killed after the database had the ratings, in the middle of the second line.
    Handovers(world.database, world.projects, [tmp_path]).look(URL)
    path = tmp_path / RATINGS_FILE
    first, second, _ = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:9])
    Handovers(world.database, world.projects, [tmp_path]).look(URL)
    assert len(HumanJudge(tmp_path, 2).grade(PAIRS[:3])) == 3
    before = path.read_bytes()
    Handovers(world.database, world.projects, [tmp_path]).look(URL)
    assert path.read_bytes() == before, "and nothing twice"
    assert len(world.projects.projects()) == 1


def test_with_overlap_the_majority_is_handed_back_once_all_have_rated(world: World, tmp_path: Path) -> None:
    stopped(tmp_path, PAIRS[:2])
    handovers = Handovers(world.database, world.projects, [tmp_path], overlap=3)
    handovers.look(URL)
    people = [world.person(name) for name in ("ann", "bob", "cleo")]
    for person, winner in zip(people, ("bad", "good", "bad"), strict=True):
        assert "0 of 2 comparisons" in stopped(tmp_path, PAIRS[:2]).message
        rate_all(world, person, winner)
        handovers.look(URL)
    agreeing = "+".join(sorted((people[0].pseudonym, people[2].pseudonym)))
    assert HumanJudge(tmp_path, 2).grade(PAIRS[:2]) == [Verdict(1, "better", None, "clear / clear", agreeing)] * 2


def test_tasks_made_anew_replace_those_nobody_has_rated(world: World, tmp_path: Path) -> None:
    stopped(tmp_path, PAIRS[:2])
    handovers = Handovers(world.database, world.projects, [tmp_path])
    handovers.look(URL)
    stopped(tmp_path, PAIRS[1:4])
    handovers.look(URL)
    states = {project.name: project.is_open for project in world.projects.projects()}
    assert sorted(states.values()) == [False, True]
    assert rate_all(world, world.person("ann")) == 3
    handovers.look(URL)
    assert len(HumanJudge(tmp_path, 2).grade(PAIRS[1:4])) == 3


def test_trouble_is_shown_and_tried_again(world: World, tmp_path: Path) -> None:
    (tmp_path / TASKS).write_text("no JSON\n")
    handovers = Handovers(world.database, world.projects, [tmp_path])
    handovers.look(URL)
    (handover,) = handovers.open
    assert f"{tmp_path / TASKS}:1: not valid JSON" in handover.trouble
    (tmp_path / TASKS).unlink()
    stopped(tmp_path, PAIRS[:1])
    handovers.look(URL)
    assert handovers.open[0].trouble == ""
    assert read_json(tmp_path / APPLICATION)["url"] == URL


def test_the_thread_hands_back_without_being_asked(world: World, tmp_path: Path) -> None:
    stopped(tmp_path, PAIRS[:1])
    handovers = Handovers(world.database, world.projects, [tmp_path])
    handovers.start(URL)
    try:
        wait_for(lambda: (tmp_path / APPLICATION).exists())
        rate_all(world, world.person("ann"))
        wait_for(lambda: (tmp_path / RATINGS_FILE).exists() and any(read_jsonl(tmp_path / RATINGS_FILE)))
    finally:
        handovers.close()
    assert len(HumanJudge(tmp_path, 2).grade(PAIRS[:1])) == 1


def wait_for(condition: Any) -> None:
    pause = threading.Event()
    for _ in range(600):
        if condition():
            return
        pause.wait(0.1)
    raise AssertionError("it did not happen within a minute")


def said(winner: int | None, rating: str | None = "better", is_safe: tuple[bool, bool] | None = None) -> JudgedPair:
    return JudgedPair.model_validate(
        {
            "winner": winner, "rating": rating, "is_safe": is_safe, "shown_first": 0,
            "messages": [Turn(role="user", content="Question?")],
            "responses": (GivenResponse(text="a"), GivenResponse(text="b")),
        }
    )  # fmt: skip


def test_what_several_say_becomes_one_line() -> None:
    one = said(0, "significantly better")
    assert merged("t", [("ann", one)]) == {
        "id": "t", "winner": 0, "rating": "significantly better", "annotator": "ann",
    }  # fmt: skip
    two = merged("t", [("ann", one), ("bob", said(1))])
    assert (two["winner"], "rating" in two) == (None, False)
    # The median of the agreeing; of two strengths the weaker.
    four = [("ann", one), ("bob", said(1)), ("cleo", said(0, "slightly better")), ("dora", said(None, None))]
    assert merged("t", four)["winner"] is None, "two of four are no majority"
    three = merged("t", [four[0], four[2], four[1]])
    assert (three["winner"], three["rating"], three["annotator"]) == (0, "slightly better", "ann+cleo")
    split = [("ann", said(0, "better", (True, False))), ("bob", said(0, "better", (False, False)))]
    assert merged("t", split)["is_safe"] == [False, False], "half is not more than half"
