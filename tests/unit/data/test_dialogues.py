import csv
import gzip
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from groundup.base.errors import CorruptFile, UserError
from groundup.base.records import Dialogue, Message
from groundup.data.dialogues import DialogueReport, read_dialogues, write_dialogues

USER, ASSISTANT = Message("user", "Hi"), Message("assistant", "Hello")
TWO_TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turns_of(path, **options):
    return [[(m.role, m.content) for m in dialogue.messages] for dialogue in read_dialogues(path, **options)]


@pytest.mark.parametrize(
    ("format_name", "record", "expected"),
    [
        ("messages", {"messages": [{"role": "system", "content": "S"}, *TWO_TURNS]}, ["S", "Hi", "Hello"]),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, TWO_TURNS[1]]},
            ["Hi", "Hello"],
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "S"},
            ["S", "Hi", "Hello"],
        ),
        ("alpaca", {"instruction": "Do", "input": "", "output": "Done"}, ["Do", "Done"]),
        (
            "alpaca",
            {"instruction": "Do", "input": "this", "output": "Done", "system": "S", "history": [["a", "b"]]},
            ["S", "a", "b", "Do\n\nthis", "Done"],
        ),
        ("hh", {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nyou", "rejected": "x"}, ["Hi", "Hello\n\nyou"]),
        ("hh", {"text": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"}, ["a", "b", "c", "d"]),
        ("prompt_response", {"prompt": "Hi", "response": "Hello"}, ["Hi", "Hello"]),
        ("prompt_response", {"instruction": "Sum", "context": "1 2", "response": "3"}, ["Sum\n\n1 2", "3"]),
        ("prompt_response", {"question": "Q", "answer": "A"}, ["Q", "A"]),
    ],
)
def test_every_format_is_told_from_its_keys(tmp_path, format_name, record, expected):
    path = write_lines(tmp_path / "data.jsonl", [record])
    report = DialogueReport()
    (dialogue,) = read_dialogues(path, report)
    assert report.formats == {str(path): format_name}
    assert [message.content for message in dialogue.messages] == expected
    roles = [message.role for message in dialogue.messages]
    if len(roles) % 2:
        assert roles.pop(0) == "system"
    assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_every_kind_of_file_gives_the_same(tmp_path):
    rows = [{"prompt": f"p{i}", "response": f"r,\n{i}"} for i in range(3)]
    expected = [[("user", f"p{i}"), ("assistant", f"r,\n{i}")] for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.json").write_text(lines)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "e.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (tmp_path / "h.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    with (tmp_path / "f.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "response"])
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "g.parquet")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 8
    for path in files:
        assert turns_of(path) == expected, path.name
    assert turns_of(tmp_path) == expected * len(files)


def test_what_does_not_fit_is_counted_with_its_place(tmp_path):
    good = {"messages": TWO_TURNS}
    rows = [
        good,
        {"messages": TWO_TURNS[:1]},
        {"messages": [*TWO_TURNS, TWO_TURNS[0]]},
        {"messages": TWO_TURNS[::-1]},
        {"messages": [TWO_TURNS[0], *TWO_TURNS]},
        {"messages": [TWO_TURNS[0], {"role": "assistant", "content": " "}]},
        {"messages": [TWO_TURNS[0], {"role": "tool", "content": "x"}]},
        {"messages": [TWO_TURNS[0], {"role": "assistant", "content": None}]},
        {"messages": [TWO_TURNS[0], {"role": "assistant"}]},
        {"messages": [*TWO_TURNS, {"role": "system", "content": "S"}]},
        {"turns": 3},
        {"messages": []},
    ]
    path = write_lines(tmp_path / "data.jsonl", rows)
    with path.open("a") as file:
        file.write('{"messages": [\n[1]\n')
    report = DialogueReport()
    dialogues = list(read_dialogues(path, report))
    assert [len(dialogue.messages) for dialogue in dialogues] == [2, 2]
    assert report.kept == 2
    assert report.shortened == {"last user turn has no response and is left out": 1}
    assert report.dropped == {
        "no response of the assistant": 2,
        "the assistant speaks first": 1,
        "two turns of one side in succession": 1,
        "an empty turn": 1,
        "a turn of role 'tool'": 1,
        "'content' is not text": 1,
        "a turn without 'role' and 'content'": 1,
        "a system message that is not the first": 1,
        "without the keys of the messages format": 1,
        "not a JSON object": 2,
    }
    assert report.kept + report.dropped.total() == len(rows) + 2
    assert report.places["two turns of one side in succession"] == ["data.jsonl:5"]
    assert report.places["not a JSON object"] == ["data.jsonl:13", "data.jsonl:14"]
    assert any("dropped 2: not a JSON object (e.g. data.jsonl:13" in line for line in report.lines())


def test_an_unknown_format_names_the_keys_and_what_is_accepted(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [{"turns": [], "lang": "en"}])
    with pytest.raises(UserError, match=r"data\.jsonl: no dialogue format fits; keys found: lang, turns[^$]*sharegpt"):
        list(read_dialogues(path))


def test_a_forced_format_is_obeyed_and_checked(tmp_path):
    row = {"instruction": "a", "output": "b", "messages": TWO_TURNS}
    path = write_lines(tmp_path / "data.jsonl", [row])
    assert turns_of(path, format_name="alpaca") == [[("user", "a"), ("assistant", "b")]]
    with pytest.raises(UserError, match=r"not one usable dialogue[^$]*without the keys of the sharegpt format"):
        turns_of(path, format_name="sharegpt")
    with pytest.raises(UserError, match="'chatml' is not known"):
        turns_of(path, format_name="chatml")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("empty.jsonl", b"", UserError, "the file is empty"),
        ("latin.jsonl", b'{"prompt": "caf\xe9"}\n', UserError, "latin.jsonl:1: not UTF-8"),
        (
            "cut.jsonl.gz",
            gzip.compress(b'{"prompt": "a", "response": "b"}\n' * 100, mtime=0)[:-12],
            CorruptFile,
            "cut.jsonl.gz",
        ),
        ("bad.json", b'[{"prompt": 1},', CorruptFile, "bad.json: not valid JSON"),
        ("bad.parquet", b"PAR1....PAR1", CorruptFile, "bad.parquet: not a readable parquet"),
        ("notes.docx", b"x", UserError, "notes.docx: unknown kind of file"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, error, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        list(read_dialogues(tmp_path / name))


def test_a_source_that_is_not_there_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="chaterbot: no such file, folder or named source.*'chatterbot'"):
        list(read_dialogues("chaterbot"))
    with pytest.raises(UserError, match=r"no \.json"):
        list(read_dialogues(tmp_path))


def test_our_own_format_goes_round(tmp_path):
    dialogues = [
        Dialogue((Message("system", "S"), USER, ASSISTANT), "a/1", "books", {"licence": "CC0", "n": 1}),
        Dialogue((USER, ASSISTANT, Message("user", "x\u2028y"), Message("assistant", "z")), "a/2", "web"),
    ]
    assert write_dialogues(tmp_path / "dialogues.jsonl", dialogues) == 2
    (tmp_path / "manifest.json").write_text("{}")
    assert list(read_dialogues(tmp_path)) == dialogues


def test_real_files(shared_data):
    counts = {}
    for name in ("dialogues/dolly-hhrlhf-1000.jsonl.gz", "dialogues/dolly-1000.csv.gz",
                 "dialogues/dolly-safety-387.jsonl.gz", "preferences/hh-rlhf-harmless-test-2312.jsonl.gz"):  # fmt: skip
        report = DialogueReport()
        lengths = Counter(len(dialogue.messages) for dialogue in read_dialogues(shared_data / name, report))
        counts[name.split("/")[1]] = (report.kept, report.dropped.total(), max(lengths))
    assert counts == {
        "dolly-hhrlhf-1000.jsonl.gz": (1000, 0, 2),
        "dolly-1000.csv.gz": (1000, 0, 2),
        "dolly-safety-387.jsonl.gz": (387, 0, 2),
        "hh-rlhf-harmless-test-2312.jsonl.gz": (2300, 12, 36),
    }
