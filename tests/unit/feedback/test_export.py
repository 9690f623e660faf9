"""Exports: the rows that training reads, one snapshot, the same bytes again from another database."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.apps.feedback_world import World, sqlite_database

from groundup.base.artifacts import open_artifact
from groundup.base.errors import CorruptFile, UserError
from groundup.base.records import Message, Response, read_jsonl
from groundup.data.comparisons import HELD_OUT_FILE, TRAIN_FILE, ComparisonReport, read_comparisons
from groundup.data.dialogues import read_dialogues
from groundup.feedback.accounts import Account
from groundup.feedback.contents import GivenResponse, Gold, ItemContent, Turn
from groundup.feedback.database import Database
from groundup.feedback.errors import Conflict
from groundup.feedback.export import ITEMS_FILE, SUBMISSIONS_FILE, export_project, read_snapshot
from groundup.feedback.importing import import_export
from groundup.feedback.migrate import migrate
from groundup.feedback.projects import NewItem
from groundup.feedback.tables import Project

BETTER = {"winner": 0, "rating": "better"}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """On SQLite; the tests that depend on the database ask for `database` besides."""
    (tmp_path / "first").mkdir()
    database = Database(sqlite_database(tmp_path / "first"))
    migrate(database)
    yield World(database)
    database.close()


def pair_item(number: int, *, order_seed: int = 0, **values: Any) -> NewItem:
    """A prompt with two responses; `order_seed` 0 shows responses[0] first."""
    content = ItemContent(
        messages=[Turn(role="user", content=f"Question {number}?")],
        responses=(
            GivenResponse(text=f"One {number}.", model="old", temperature=0.7, finish_reason="stop"),
            GivenResponse(text=f"Two {number}.", model="new", revision="1a2b", temperature=1.0, token_ids=[5, number]),
        ),
        order_seed=order_seed,
        metadata={"id": f"prompt-{number}"},
    )
    return NewItem(content, f"pair-{number}", **values)


def answer_next(world: World, user: Account, project: Project, answer: dict[str, Any], **options: Any) -> None:
    """Take the next item, and 20 seconds for it; `answer` is in the terms of the page."""
    task = world.work.claim(user.id, project.id, **options)
    assert task is not None
    world.clock.turn(20)
    world.submit(user, task, answer)


def preferences(world: World, count: int = 12, people: int = 2) -> list[Account]:
    project = world.project("preference", [pair_item(n, order_seed=n) for n in range(count)], name="p", overlap=people)
    accounts = [world.person(name) for name in ("ann", "bob", "cleo")[:people]]
    for person in accounts:
        for number in range(count):
            answer_next(world, person, project, {**BETTER, "reason": f"{person.name} {number}"})
    return accounts


def test_a_comparison_says_all_there_is_to_say(world: World, tmp_path: Path) -> None:
    project = world.project("preference", [pair_item(7, order_seed=1)], name="p", criterion="safety")
    ann = world.person("ann")
    said = {"winner": 0, "rating": "slightly better", "is_safe": [True, False], "reason": "kinder"}
    answer_next(world, ann, project, said)
    export_project(world.database, "p", tmp_path / "out", held_out_fraction=0)
    (found,) = read_comparisons(tmp_path / "out")
    assert found.prompt == (Message("user", "Question 7?"),)
    # Swapped by the odd seed: what stood first on the page is responses[1] of the item.
    assert (found.chosen, found.rejected) == (Response("Two 7.", "new", 1.0), Response("One 7.", "old", 0.7))
    assert (found.criterion, found.rating, found.safety) == ("safety", "slightly better", "chosen safe")
    assert (found.batch, found.annotator, found.id) == (1, ann.pseudonym, f"p/pair-7/{ann.pseudonym}/1")
    assert found.metadata == {
        "schema_version": 1,
        "item": "pair-7",
        "turn": 1,
        "prompt_id": "prompt-7",
        "shown_first": "chosen",
        "reason": "kinder",
        "created_at": "2026-08-03T09:00:20+00:00",
        "seconds": 20.0,
        "revisions": ["1a2b", ""],
        "ended": [None, True],
        "prompt_token_ids": None,
        "chosen_token_ids": [5, 7],
        "rejected_token_ids": None,
    }


def test_what_nothing_can_be_learned_from_is_counted(world: World, tmp_path: Path) -> None:
    project = world.project("preference", [pair_item(n) for n in range(5)], name="p", criterion="safety")
    ann = world.person("ann")
    both_safe = {"rating": "better", "is_safe": [True, True]}
    for said in ({"winner": 0, **both_safe}, {}, {"winner": 0, "rating": "better", "is_safe": [False, True]}):
        answer_next(world, ann, project, said)
    answer_next(world, ann, project, {"winner": 1, **both_safe})
    world.work.undo(ann.id, project.id)
    metrics = export_project(world.database, "p", tmp_path / "out", held_out_fraction=0).metrics
    assert metrics["dropped"] == {"left undecided": 1, "unsafe winner over a safe loser": 1}
    assert (metrics["train"], metrics["submissions"], metrics["items"]) == (1, 3, 5)
    assert metrics["superseded"] == {"undone": 1}


def test_answers_to_gold_items_are_not_trained_on(world: World, tmp_path: Path) -> None:
    items = [pair_item(0, gold=Gold(answers=[1])), pair_item(1)]
    project = world.project("preference", items, name="p", gold_share=1.0)
    answer_next(world, world.person("ann"), project, BETTER)
    metrics = export_project(world.database, "p", tmp_path / "out").metrics
    assert (metrics["train"], metrics["held_out"]) == (0, 0)
    assert metrics["dropped"] == {"an answer to a gold item": 1}


def test_jsonl_and_parquet_hold_the_same_comparisons(world: World, tmp_path: Path) -> None:
    preferences(world)
    export_project(world.database, "p", tmp_path / "out")
    for name in (TRAIN_FILE, HELD_OUT_FILE):
        report = ComparisonReport()
        rows = list(read_comparisons(tmp_path / "out" / name, report))
        assert rows
        assert rows == list(read_comparisons((tmp_path / "out" / name).with_suffix(".parquet"), report))
        assert not report.dropped


def test_the_held_out_part_shares_no_prompt_and_stays_held_out(world: World, tmp_path: Path) -> None:
    ann, _ = preferences(world, count=20)
    export_project(world.database, "p", tmp_path / "one", held_out_fraction=0.3)
    train, held_out = ({c.prompt for c in read_comparisons(tmp_path / "one" / f)} for f in (TRAIN_FILE, HELD_OUT_FILE))
    assert not train & held_out
    assert len(train | held_out) == 20
    (project,) = world.projects.projects()
    batch = world.projects.open_batch(world.admin, project.id)
    world.projects.add_items(world.admin, batch.id, [pair_item(n) for n in range(20, 30)])
    for _ in range(10):
        answer_next(world, ann, project, BETTER)
    export_project(world.database, "p", tmp_path / "two", held_out_fraction=0.3)
    assert held_out <= {c.prompt for c in read_comparisons(tmp_path / "two" / HELD_OUT_FILE)}


def test_every_rating_of_an_item_is_a_comparison(world: World, tmp_path: Path) -> None:
    preferences(world, count=6, people=3)
    export_project(world.database, "p", tmp_path / "out", held_out_fraction=0)
    found = list(read_comparisons(tmp_path / "out"))
    assert Counter(c.metadata["item"] for c in found) == {f"pair-{n}": 3 for n in range(6)}
    assert len({c.id for c in found}) == 18


def test_names_of_people_and_keys_of_models_stay_inside(world: World, tmp_path: Path) -> None:
    world.endpoint("one", api_key="sk-very-secret")
    (ann,) = preferences(world, count=3, people=1)
    for kind in ("redteam", "sft"):
        make_work(world, kind, ann, world.person(f"other-{kind}", "reviewer"))
    for name in ("p", "redteam", "sft"):
        export_project(world.database, name, tmp_path / name)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".json", ".jsonl", ".parquet")]
    text = "".join(path.read_text("utf-8", "replace") for path in files if path.name != "manifest.json")
    assert ann.pseudonym in text
    for word in ("sk-very-secret", "key-of-", "password", "sqlite://", "127.0.0.1:9", "other-", '"ann"'):
        assert word not in text, word
    rows = [row for file in files if file.name == SUBMISSIONS_FILE for row in read_jsonl(file)]
    given = [r for row in rows for t in row["answer"].get("turns", ()) for r in t.get("responses", [t.get("response")])]
    assert given
    assert {response["endpoint_id"] for response in given} == {None}


def test_sft_answers_count_as_their_reviewer_left_them(world: World, tmp_path: Path) -> None:
    given = NewItem(ItemContent(messages=[Turn(role="user", content="What is rain?")]), "rain")
    project = world.project("sft", [given, *[NewItem() for _ in range(3)]], name="s", is_reviewed=True)
    ann, eve = world.person("ann"), world.person("eve", "reviewer")
    answer_next(world, ann, project, {"response": "Water that falls."})
    for number in range(3):
        answer_next(world, ann, project, {"prompt": f"Why {number}?", "response": f"Because {number}."})
    answer_next(world, eve, project, {"decision": "approve"}, review=True)
    answer_next(world, eve, project, {"decision": "edit", "response": "Because it is 0."}, review=True)
    answer_next(world, eve, project, {"decision": "reject", "feedback": "Say more."}, review=True)
    artifact = export_project(world.database, "s", tmp_path / "out", held_out_fraction=0)
    assert artifact.kind == "dialogues"
    said = {d.messages: d.metadata["review"] for d in read_dialogues(tmp_path / "out")}
    assert said == {
        (Message("user", "What is rain?"), Message("assistant", "Water that falls.")): "approved",
        (Message("user", "Why 0?"), Message("assistant", "Because it is 0.")): "edited",
    }
    assert artifact.metrics["dropped"] == {"not approved by a reviewer (yet)": 1}
    assert artifact.metrics["superseded"] == {"rejected": 1}
    assert list(read_dialogues(tmp_path / "out" / "dialogues.parquet")) == list(read_dialogues(tmp_path / "out"))


def make_work(world: World, kind: str, ann: Account, bob: Account) -> None:
    """Some finished work, with answers that were taken back; bob is a reviewer."""
    if kind == "sft":
        project = world.project("sft", [NewItem() for _ in range(4)], name=kind, is_reviewed=True)
        for number in range(4):
            answer_next(world, ann, project, {"prompt": f"Why {number}?", "response": f"Because {number}."})
        for said in ({"decision": "edit", "response": "So."}, {"decision": "reject", "feedback": "No."}):
            answer_next(world, bob, project, said, review=True)
        answer_next(world, ann, project, {"prompt": "Why again?", "response": "Because."})
    elif kind in ("preference", "comparison"):
        project = world.project(kind, [pair_item(n, order_seed=n) for n in range(4)], name=kind, overlap=2)
        for person in (ann, bob):
            for score in (-3, 0, 1, 2):
                answer_next(world, person, project, {"score": score} if kind == "comparison" else BETTER)
        world.work.undo(bob.id, project.id)
    elif kind == "redteam":
        endpoint = world.endpoint("attacked")
        project = world.project(kind, [NewItem() for _ in range(2)], name=kind, endpoint_ids=[endpoint])
        for person in (ann, bob):
            red_team_session(world, person, project)
    else:
        question = ItemContent(question="Which?", choices=["a", "b"])
        project = world.project(kind, [NewItem(question, gold=Gold(answers=[1]))], name=kind)
        for person, choice in ((ann, 1), (bob, 0)):
            answer_next(world, person, project, {"answer": choice})


def red_team_session(world: World, person: Account, project: Project) -> None:
    task = world.work.claim(person.id, project.id)
    assert task is not None
    number, (asked,) = world.dialogues.begin_turn(person.id, task.assignment_id, task.version, "How to harm?")
    given = GivenResponse(
        text="Like so.",
        model=asked.model,
        endpoint_id=asked.endpoint_id,
        seed=asked.seed,
        temperature=asked.temperature,
    )
    task = world.dialogues.finish_turn(person.id, task.assignment_id, number, [given])
    label = {"risk_category": "unqualified advice", "attack_vector": "logic manipulation", "severity": 4}
    world.clock.turn(90)
    task = world.dialogues.judge_turn(person.id, task.assignment_id, task.version, number, label)
    world.submit(person, task, {})


def test_an_export_makes_the_same_export_elsewhere(world: World, database: Database, tmp_path: Path) -> None:
    """From SQLite into SQLite and into PostgreSQL: every file of the second export has the first one's sha256."""
    kinds = ("preference", "sft", "comparison", "redteam", "entrance")
    ann, bob = world.person("ann"), world.person("bob", "reviewer")
    other = World(database)
    other.person("ann")
    other.project("preference", [pair_item(n) for n in range(3)], name="already here")
    for kind in kinds:
        make_work(world, kind, ann, bob)
        first = export_project(world.database, kind, tmp_path / "one" / kind)
        imported = import_export(database, tmp_path / "one" / kind)
        assert imported.submissions == first.metrics["submissions"] > 0
        second = export_project(database, kind, tmp_path / "two" / kind)
        hashes = [
            {name: entry["sha256"] for name, entry in artifact.manifest["files"].items()}
            for artifact in (first, second)
        ]
        assert hashes[0] == hashes[1], kind
        assert first.id == second.id
    with pytest.raises(Conflict, match="already"):
        import_export(database, tmp_path / "one" / "sft")
    import_export(database, tmp_path / "one" / "sft", "another name")
    assert len(read_snapshot(database, "another name").submissions) == len(read_snapshot(database, "sft").submissions)
    (project,) = (project for project in other.projects.projects() if project.name == "sft")
    assert not project.is_open
    other.projects.change_project(other.admin, project.id, project.version, is_open=True)
    task = other.work.claim(other.person("eve", "reviewer").id, project.id, review=True)
    assert task is not None, "what waited for a review still does"


def test_a_flipped_bit_is_found_before_anything_is_imported(world: World, tmp_path: Path) -> None:
    preferences(world, count=3)
    export_project(world.database, "p", tmp_path / "out")
    path = tmp_path / "out" / ITEMS_FILE
    path.write_bytes(path.read_bytes().replace(b"Question 1", b"Question 9", 1))
    with pytest.raises(CorruptFile, match=r"items\.jsonl"):
        import_export(world.database, tmp_path / "out", "again")
    assert [project.name for project in world.projects.projects()] == ["p"]


def test_twenty_exports_while_people_rate_are_each_one_snapshot(database: Database, tmp_path: Path) -> None:
    """One writer; whatever an export sees is all that stood at one moment: no holes, and items that fit the answers."""
    world, count = World(database), 80
    project = world.project("preference", [pair_item(n) for n in range(count)], name="p")
    ann = world.person("ann")
    acknowledged: list[int] = []

    def rate() -> None:
        for number in range(count):
            answer_next(world, ann, project, {**BETTER, "reason": str(number)})
            acknowledged.append(number)

    writer = threading.Thread(target=rate)
    writer.start()
    seen = []
    for number in range(20):
        before = len(acknowledged)
        artifact = export_project(database, "p", tmp_path / str(number), held_out_fraction=0).verify()
        after = len(acknowledged)
        rows = [json.loads(line) for line in (artifact.path / SUBMISSIONS_FILE).read_text().splitlines()]
        reasons = [int(row["answer"]["turns"][0]["reason"]) for row in rows]
        assert reasons == list(range(len(rows))), "what was acknowledged first is there first, without a hole"
        assert before <= len(rows) <= after + 1
        done = {row["id"] for row in read_jsonl(artifact.path / ITEMS_FILE) if row["is_done"]}
        assert {row["item"] for row in rows} == done
        assert artifact.metrics["train"] == len(rows)
        seen.append(len(rows))
    writer.join()
    assert len(acknowledged) == count
    assert len(set(seen)) > 1, "nothing was written while the exports were made"


def test_an_unknown_project_is_told_with_those_there_are(world: World, tmp_path: Path) -> None:
    preferences(world, count=1, people=1)
    with pytest.raises(UserError, match="no project is called 'nothing'\n.*projects: p"):
        export_project(world.database, "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_manifest_names_the_kind_and_the_command(world: World, tmp_path: Path) -> None:
    preferences(world, count=3)
    export_project(world.database, "p", tmp_path / "out")
    manifest = open_artifact(tmp_path / "out", "comparisons", verify=True).manifest
    assert manifest["argv"] == ["groundup", "annotate", "export", "--project", "p"]
    assert manifest["schema_version"] == 1
