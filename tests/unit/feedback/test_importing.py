"""Prompts and ready items out of the files that people have."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.apps.feedback_world import World

from groundup.base.errors import UserError
from groundup.data.prompts import PromptReport
from groundup.feedback.errors import Invalid
from groundup.feedback.importing import OPERATOR, read_items
from groundup.feedback.projects import NewItem


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[NewItem]:
    return read_items(path, PromptReport())


def test_prompts_of_any_known_format(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("Why is the sky blue?\n\nWhat is rain?\n")
    table = tmp_path / "prompts.csv"
    table.write_text('id,prompt\na,"Why is the sky blue?"\nb,What is rain?\n')
    chats = write(
        tmp_path / "chats.jsonl",
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is rain?"}]},
    )
    report = PromptReport()
    assert [item.content.messages[0].content for item in read_items(lines, report)] == [
        "Why is the sky blue?",
        "What is rain?",
    ]
    assert report.kept == 2
    assert report.dropped.total() == 1, "the empty line is counted"
    assert [item.content.metadata["id"] for item in read(table)] == ["a", "b"]
    (chat,) = read(chats)
    assert [turn.role for turn in chat.content.messages] == ["system", "user"]


def test_the_same_prompt_is_the_same_item_whatever_file_it_is_in(world: World, tmp_path: Path) -> None:
    project = world.project("sft")
    (batch,) = world.projects.batches(project.id)
    first = write(tmp_path / "one.jsonl", {"prompt": "What is rain?"}, {"prompt": "What is snow?"})
    second = write(tmp_path / "two.jsonl", {"prompt": "What is hail?"}, {"prompt": "What is rain?"})
    for path, added, there in ((first, 2, 0), (first, 0, 2), (second, 1, 1)):
        found = world.projects.add_items(OPERATOR, batch.id, read(path))
        assert (found.added, found.already_there) == (added, there)


def test_items_with_responses_gold_and_names(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "What is rain?"}]
    path = write(
        tmp_path / "items.jsonl",
        {"id": "g1", "messages": prompt, "responses": [{"text": "Water.", "model": "a"}, {"text": "No."}], "gold": [0]},
        {"messages": prompt, "responses": [{"text": "One."}, {"text": "Two."}]},
    )
    gold, plain = read(path)
    assert gold.external_id == "g1"
    assert gold.gold is not None
    assert gold.gold.answers == [0]
    assert gold.content.responses is not None
    assert [response.text for response in gold.content.responses] == ["Water.", "No."]
    assert plain.gold is None
    assert plain.external_id == read(path)[1].external_id, "its name follows from what it asks"


def test_an_entrance_test_out_of_a_file(world: World, tmp_path: Path) -> None:
    path = write(tmp_path / "test.jsonl", {"question": "Which?", "choices": ["a", "b"], "gold": [1]})
    project = world.project("entrance", read(path))
    ann = world.person("ann")
    task = world.work.claim(ann.id, project.id)
    assert task is not None
    assert task.choices == ("a", "b")
    world.submit(ann, task, {"answer": 1})
    result = world.work.test_result(ann.id, project.id)
    assert result is not None
    assert result.is_passed


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "Which?", "coices": ["a", "b"]}, "unknown key 'coices'"),
        ({"responses": [{"text": "a"}]}, "responses"),
        ({"responses": [{"text": "a"}, {"text": "b", "html": "c"}]}, "responses"),
        ({"question": "Which?", "choices": ["a", "b"], "gold": "b"}, "answers"),
        ({"instructions": "x" * 5000}, "instructions"),
        ({"instructions": "Write.", "id": "#7"}, "begins with '#'"),
        ({"instructions": "Write \x00 this."}, "cannot be stored"),
    ],
)
def test_what_is_no_item_is_told_with_its_line(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "items.jsonl", {"instructions": "Write about rain."}, row)
    with pytest.raises(Invalid, match=r"items\.jsonl:2: ") as caught:
        read(path)
    assert words in caught.value.message


def test_a_file_of_something_else_is_an_error_and_adds_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"numbers\.jsonl"):
        read(write(tmp_path / "numbers.jsonl", {"x": 1}, {"x": 2}))
