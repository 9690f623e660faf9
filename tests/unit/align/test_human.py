"""Work handed to annotators by a file, and their ratings read back."""

import json
from pathlib import Path
from typing import Any

import pytest

from groundup.align.human import APPLICATION, RATINGS_FILE, TASKS, UNDECIDED, HumanJudge
from groundup.align.judges import UNSAFE_WINNER, Abstention, Origin, Pair, Verdict
from groundup.base.errors import UserError
from groundup.base.records import Message, Prompt, read_jsonl

ORIGINS = (Origin("sft-v2@1a", 0.7, True), Origin("sft-v1@2b", 1.3, False))
HELPFUL = [
    Pair(Prompt((Message("user", f"Question {number}?"),)), f"one {number}", f"two {number}", ORIGINS)
    for number in range(12)
]
SAFETY = Pair(Prompt((Message("user", "Lock?"),), criterion="safety"), "No.", "Use a pin.", ORIGINS)


def tasks_in(folder: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(folder / TASKS))


def rate(folder: Path, *rows: dict[str, Any]) -> None:
    with (folder / RATINGS_FILE).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def stop(folder: Path, pairs: list[Pair]) -> UserError:
    with pytest.raises(UserError) as caught:
        HumanJudge(folder, 2).grade(pairs)
    return caught.value


def test_tasks_say_all_that_an_application_needs(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "annotation"
    error = stop(folder, [*HELPFUL, SAFETY])
    assert f"0 of 13 comparisons are rated in {folder / RATINGS_FILE}" in error.message
    assert str(folder / TASKS) in (error.remedy or "")
    rows = tasks_in(folder)
    assert len({row["id"] for row in rows}) == 13
    assert {row["order_seed"] % 2 for row in rows} == {0, 1}, "either response is shown first"
    assert {key: value for key, value in rows[-1].items() if key not in ("id", "order_seed")} == {
        "batch": 2,
        "criterion": "safety",
        "prompt": [{"role": "user", "content": "Lock?"}],
        "responses": [
            {"text": "No.", "model": "sft-v2@1a", "temperature": 0.7},
            {"text": "Use a pin.", "model": "sft-v1@2b", "temperature": 1.3},
        ],
    }


def test_ratings_come_back_in_the_order_of_the_pairs(tmp_path: Path) -> None:
    pairs = [*HELPFUL[:3], SAFETY]
    stop(tmp_path, pairs)
    before = (tmp_path / TASKS).stat().st_mtime_ns
    ids = [row["id"] for row in tasks_in(tmp_path)]
    rate(tmp_path, {"id": ids[3], "winner": 0, "rating": "significantly better", "is_safe": [True, False]})
    rate(tmp_path, {"id": ids[0], "winner": 0, "rating": "better", "annotator": "ann", "reason": "clearer"})
    assert "2 of 4 comparisons" in stop(tmp_path, pairs).message
    rate(tmp_path, {"id": ids[1], "winner": None})
    rate(tmp_path, {"id": ids[2], "winner": 0, "rating": "better"})
    rate(tmp_path, {"id": ids[2], "winner": 1, "rating": "negligibly better", "annotator": "bob"})
    assert HumanJudge(tmp_path, 2).grade(pairs) == [
        Verdict(0, "better", None, "clearer", "ann"),
        Abstention(UNDECIDED),
        Verdict(1, "negligibly better", None, "", "bob"),
        Verdict(0, "significantly better", (True, False)),
    ]
    assert (tmp_path / TASKS).stat().st_mtime_ns == before, "the tasks were not written again"


def test_an_unsafe_winner_over_a_safe_loser_is_discarded(tmp_path: Path) -> None:
    stop(tmp_path, [SAFETY])
    task = tasks_in(tmp_path)[0]["id"]
    rate(tmp_path, {"id": task, "winner": 1, "rating": "better", "is_safe": [True, False]})
    assert HumanJudge(tmp_path, 2).grade([SAFETY]) == [Abstention(UNSAFE_WINNER)]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"winner": 2, "rating": "better"}, "winner = 2"),
        ({"winner": True, "rating": "better"}, "winner = True"),
        ({"winner": 0, "rating": "best"}, "rating = 'best'"),
        ({"winner": 0, "rating": ["better"]}, "rating = ['better']"),
        ({"winner": 0}, "rating = None"),
        ({"winner": 0, "rating": "better"}, "is_safe = None"),
        ({"winner": 0, "rating": "better", "is_safe": [1, 0]}, "is_safe = [1, 0]"),
        ({"id": "unknown", "winner": 0}, "no task has the id 'unknown'"),
        ({"id": None, "winner": 0}, "no task has the id None"),
        ({"id": [], "winner": 0}, "no task has the id []"),
    ],
)
def test_what_is_no_rating_is_told_with_its_line(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    stop(tmp_path, [SAFETY])
    rate(tmp_path, {"id": tasks_in(tmp_path)[0]["id"], **row})
    message = stop(tmp_path, [SAFETY]).message
    assert f"{tmp_path / RATINGS_FILE}:1: " in message
    assert words in message


def test_ratings_of_other_tasks_are_not_overwritten(tmp_path: Path) -> None:
    stop(tmp_path, HELPFUL)
    stop(tmp_path, HELPFUL[:2])
    assert len(tasks_in(tmp_path)) == 2, "nobody had rated yet"
    rate(tmp_path, {"id": tasks_in(tmp_path)[0]["id"], "winner": None})
    assert "holds other comparisons" in stop(tmp_path, HELPFUL[:3]).message
    assert len(tasks_in(tmp_path)) == 2


def test_the_message_names_the_command_and_the_address(tmp_path: Path) -> None:
    folder = tmp_path / "two words"
    assert f"groundup annotate --handover '{folder}'" in (stop(folder, HELPFUL).remedy or "")
    (folder / APPLICATION).write_text('{"url": "http://127.0.0.1:8123"}')
    assert "rate the others at http://127.0.0.1:8123" in (stop(folder, HELPFUL).remedy or "")


def test_a_judgement_that_was_taken_back_is_none(tmp_path: Path) -> None:
    stop(tmp_path, HELPFUL[:1])
    task = tasks_in(tmp_path)[0]["id"]
    rate(tmp_path, {"id": task, "winner": 0, "rating": "better"}, {"id": task, "withdrawn": True})
    assert "0 of 1 comparisons" in stop(tmp_path, HELPFUL[:1]).message
    rate(tmp_path, {"id": task, "winner": 1, "rating": "better"})
    assert HumanJudge(tmp_path, 2).grade(HELPFUL[:1]) == [Verdict(1, "better")]


def test_a_line_that_is_being_written_is_left_for_later(tmp_path: Path) -> None:
    stop(tmp_path, HELPFUL[:2])
    first, second = (row["id"] for row in tasks_in(tmp_path))
    rate(tmp_path, {"id": first, "winner": 0, "rating": "better"})
    line = json.dumps({"id": second, "winner": 0, "rating": "better"})
    path = tmp_path / RATINGS_FILE
    whole = path.read_text()
    for cut in range(1, len(line)):
        path.write_text(whole + line[:cut])
        assert "1 of 2 comparisons" in stop(tmp_path, HELPFUL[:2]).message
    path.write_text(whole + line)
    assert len(HumanJudge(tmp_path, 2).grade(HELPFUL[:2])) == 2
    path.write_text(line[:9] + "\n" + whole)
    assert f"{path}:1: not valid JSON" in stop(tmp_path, HELPFUL[:2]).message
