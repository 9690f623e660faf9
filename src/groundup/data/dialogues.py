"""Dialogues out of the file formats people have, and into one JSON-lines format of our own.

The format of a file is told from the keys of its first records. A record that does not fit is left out and counted by
reason, with the places of the first few; a file that fits no format is an error.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

from groundup.base.errors import UserError
from groundup.base.progress import say
from groundup.base.records import Dialogue, Message, Role, to_json, write_jsonl
from groundup.data.readers import walk_files
from groundup.data.rows import Row, is_row_file, read_rows
from groundup.data.sources import find_source, nearest_source, read_source_dialogues

DIALOGUES_FILE = "dialogues.jsonl"
_LOOK_AHEAD_RECORDS = 20
_EXAMPLES_PER_REASON = 3
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
}  # fmt: skip
_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_PROMPT_KEYS = ("prompt", "instruction", "question")
_RESPONSE_KEYS = ("response", "completion", "answer")


@dataclass
class DialogueReport:
    """What became of the records read: each is kept or dropped, and some are kept shortened."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    shortened: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> the first few places, as "file:line" (line of JSON lines, row of other kinds)."""
    formats: dict[str, str] = field(default_factory=dict)
    """File -> the format it was read as."""

    def note(self, counter: Counter[str], reason: str, place: str) -> None:
        """Count one record under `reason` in `dropped` or `shortened`."""
        counter[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < _EXAMPLES_PER_REASON:
            places.append(place)

    def lines(self) -> list[str]:
        """The report for people: one line of totals and one a reason."""
        lines = [f"{self.kept} dialogues kept, {self.dropped.total()} dropped, {self.shortened.total()} shortened"]
        for verb, counter in (("dropped", self.dropped), ("shortened", self.shortened)):
            for reason, count in counter.most_common():
                lines.append(f"  {verb} {count}: {reason} (e.g. {', '.join(self.places[reason])})")
        return lines

    def metrics(self) -> dict[str, Any]:
        """The report for a manifest."""
        return {"kept": self.kept, "dropped": dict(self.dropped), "shortened": dict(self.shortened)}


class _Malformed(Exception):
    """Why one record is no dialogue."""


@dataclass(frozen=True)
class _Format:
    keys: str
    fits: Callable[[dict[str, Any]], bool]
    turns: Callable[[dict[str, Any]], list[Message]]


def read_dialogues(
    source: str | Path, report: DialogueReport | None = None, format_name: str | None = None
) -> Iterator[Dialogue]:
    """The dialogues of a file, a folder of files, a `dialogues` artifact or a named source of the catalogue.

    Raises: UserError for a file whose format is not recognised, and for a source without one usable dialogue.
    """
    report = report if report is not None else DialogueReport()
    if format_name is not None and format_name not in FORMATS:
        raise UserError(f"dialogue format {format_name!r} is not known", f"one of: {', '.join(FORMATS)}")
    before = report.kept
    if Path(source).exists():
        for path in _files(Path(source)):
            yield from _read_file(path, report, format_name)
    elif find_source(str(source)) is not None:
        yield from _read_named(str(source), report)
    else:
        raise UserError(
            f"{source}: no such file, folder or named source{nearest_source(str(source))}",
            "give a path, or a name that groundup data list shows",
        )
    if report.kept == before:
        raise UserError("\n".join([f"{source}: not one usable dialogue", *report.lines()]))


def write_dialogues(path: Path, dialogues: Iterable[Dialogue]) -> int:
    """Write our own format, one dialogue a line, which `read_dialogues` reads back; returns how many."""
    return write_jsonl(path, map(to_json, dialogues))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / DIALOGUES_FILE).exists():
        return [path / DIALOGUES_FILE]
    files = [file for file in walk_files(path) if is_row_file(file)]
    if not files:
        raise UserError(f"{path}: no .json, .jsonl, .csv, .tsv or .parquet file in this folder")
    return files


def _read_named(name: str, report: DialogueReport) -> Iterator[Dialogue]:
    for number, dialogue in enumerate(read_source_dialogues(name), 1):
        kept = _checked(list(dialogue.messages), f"{name}:{number}", report)
        if kept is not None:
            yield Dialogue(kept, dialogue.id or f"{name}:{number}", dialogue.source or name, dialogue.metadata)


def _read_file(path: Path, report: DialogueReport, format_name: str | None) -> Iterator[Dialogue]:
    records = read_rows(path)
    first = list(islice(records, _LOOK_AHEAD_RECORDS))
    if not first:
        raise UserError(f"{path}: the file is empty")
    format_name = format_name or _detect(path, [record for _, record in first])
    report.formats[str(path)] = format_name
    say(f"{path}: read as {format_name} ({FORMATS[format_name].keys})")
    for number, record in chain(first, records):
        place = f"{path.name}:{number}"
        try:
            if record is None:
                raise _Malformed("not a JSON object")
            if not FORMATS[format_name].fits(record):
                raise _Malformed(f"without the keys of the {format_name} format")
            turns = FORMATS[format_name].turns(record)
        except _Malformed as error:
            report.note(report.dropped, str(error), place)
            continue
        kept = _checked(turns, place, report)
        if kept is not None:
            metadata = record.get("metadata")
            yield Dialogue(
                kept, str(record.get("id") or place), str(record.get("source") or path.name),
                metadata if isinstance(metadata, dict) else {},
            )  # fmt: skip


def _detect(path: Path, records: list[Row]) -> str:
    objects = [record for record in records if record is not None]
    for record in objects:
        for name, candidate in FORMATS.items():
            if candidate.fits(record):
                return name
    keys = sorted({str(key) for record in objects for key in record})
    raise UserError(
        f"{path}: no dialogue format fits; keys found: {', '.join(keys) or 'none (no JSON objects)'}",
        "accepted: " + "; ".join(f"{name} ({candidate.keys})" for name, candidate in FORMATS.items()),
    )


def _checked(turns: list[Message], place: str, report: DialogueReport) -> tuple[Message, ...] | None:
    """The turns if they make a dialogue to train on (system?, then user and assistant in turn), else None."""
    try:
        body = turns[1:] if turns and turns[0].role == "system" else turns
        if any(turn.role == "system" for turn in body):
            raise _Malformed("a system message that is not the first")
        if body and body[0].role == "assistant":
            raise _Malformed("the assistant speaks first")
        if any(first.role == second.role for first, second in pairwise(body)):
            raise _Malformed("two turns of one side in succession")
        if body and body[-1].role == "user":
            body = body[:-1]
            if body:
                report.note(report.shortened, "last user turn has no response and is left out", place)
        if not body:
            raise _Malformed("no response of the assistant")
        if any(not turn.content.strip() for turn in body):
            raise _Malformed("an empty turn")
    except _Malformed as error:
        report.note(report.dropped, str(error), place)
        return None
    report.kept += 1
    return tuple(turns[:1] if turns[0].role == "system" else []) + tuple(body)


def _text(value: Any, key: str) -> str:
    """A text value; OpenAI's lists of {type: text} parts are joined."""
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise _Malformed(f"{key!r} is not text")
    return value


def _turn_list(record: dict[str, Any], key: str, role_key: str, content_key: str) -> list[Message]:
    turns = []
    if record.get("system"):
        turns.append(Message("system", _text(record["system"], "system")))
    for turn in record[key]:
        if not isinstance(turn, dict) or role_key not in turn or content_key not in turn:
            raise _Malformed(f"a turn without {role_key!r} and {content_key!r}")
        role = _ROLES.get(str(turn[role_key]).lower())
        if role is None:
            raise _Malformed(f"a turn of role {turn[role_key]!r}")
        turns.append(Message(role, _text(turn[content_key], content_key)))
    return turns


def _alpaca(record: dict[str, Any]) -> list[Message]:
    turns = []
    if record.get("system"):
        turns.append(Message("system", _text(record["system"], "system")))
    for pair in record.get("history") or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _Malformed("'history' is not a list of [user, assistant] pairs")
        turns += [Message("user", _text(pair[0], "history")), Message("assistant", _text(pair[1], "history"))]
    user = _with_context(_text(record["instruction"], "instruction"), record.get("input"), "input")
    return [*turns, Message("user", user), Message("assistant", _text(record["output"], "output"))]


def _with_context(prompt: str, context: Any, key: str) -> str:
    return f"{prompt}\n\n{_text(context, key)}" if context else prompt


def _first_key(record: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if key in record), None)


def _prompt_response(record: dict[str, Any]) -> list[Message]:
    prompt_key, response_key = _first_key(record, _PROMPT_KEYS), _first_key(record, _RESPONSE_KEYS)
    assert prompt_key is not None
    assert response_key is not None
    turns = []
    if record.get("system"):
        turns.append(Message("system", _text(record["system"], "system")))
    user = _with_context(_text(record[prompt_key], prompt_key), record.get("context"), "context")
    return [*turns, Message("user", user), Message("assistant", _text(record[response_key], response_key))]


def _hh_text(record: dict[str, Any]) -> str | None:
    for key in ("chosen", "text"):
        if isinstance(record.get(key), str) and _HH_TURN.match(record[key]):
            return str(record[key])
    return None


def _hh(record: dict[str, Any]) -> list[Message]:
    _, *parts = _HH_TURN.split(_hh_text(record) or "")
    names, contents = parts[::2], parts[1::2]
    return [Message("user" if n == "Human" else "assistant", c.strip()) for n, c in zip(names, contents, strict=True)]


FORMATS: dict[str, _Format] = {
    "messages": _Format(
        "messages: [{role, content}]",
        lambda r: isinstance(r.get("messages"), list),
        lambda r: _turn_list(r, "messages", "role", "content"),
    ),
    "sharegpt": _Format(
        "conversations: [{from, value}]",
        lambda r: isinstance(r.get("conversations"), list),
        lambda r: _turn_list(r, "conversations", "from", "value"),
    ),
    "hh": _Format(
        "chosen or text: a transcript '\\n\\nHuman: ...\\n\\nAssistant: ...'", lambda r: _hh_text(r) is not None, _hh
    ),
    "alpaca": _Format(
        "instruction, output; optional input, system, history", lambda r: "instruction" in r and "output" in r, _alpaca
    ),
    "prompt_response": _Format(
        "prompt, instruction or question; response, completion or answer; optional context, system",
        lambda r: _first_key(r, _PROMPT_KEYS) is not None and _first_key(r, _RESPONSE_KEYS) is not None,
        _prompt_response,
    ),
}
