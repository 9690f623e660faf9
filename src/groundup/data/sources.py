"""Named sources: real text, dialogues, prompts, preferences, labels and models out of pinned registry packages
(`catalogue.yaml`).

A name may carry options, as in "adv-bench?part=0/4&count=100".
"""

import difflib
from collections.abc import Collection, Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, model_validator

from groundup.base.config import Config, load_yaml, parse_config
from groundup.base.errors import UserError
from groundup.base.files import atomic_file, sha256_file
from groundup.base.progress import say
from groundup.base.records import Criterion, Dialogue, Document, Message, Prompt, to_json, write_jsonl
from groundup.data.packages import Package, archive_folder, fetch, read_members
from groundup.data.source_parsers import (
    DIALOGUE_PARSERS,
    LABEL_PARSERS,
    PROMPT_PARSERS,
    ROW_PARSERS,
    TEXT_PARSERS,
)

Kind = Literal["text", "dialogues", "prompts", "preferences", "labels", "model"]
PREFIX = "package://"
"""Marks a named source where a path could stand."""
TASK_PREFIX = "task:"
"""Marks prompts and dialogues that data/tasks.py generates."""
REFUSALS = "refusals"
"""The name of the dialogues that data/refusals.py makes."""


class Source(Config):
    """One entry of the catalogue."""

    name: str = ""
    kind: Kind
    package: str
    members: tuple[str, ...] = Field(min_length=1)
    """Shell patterns of the files inside the archive."""
    parser: str
    licence: str
    """Of the words inside; the package's own is often another."""
    origin: str
    notes: str = ""
    text_bytes: int = 0
    """UTF-8 bytes of all its texts; 0 for other kinds."""
    criterion: Criterion = "helpfulness"
    """What its prompts and comparisons are about."""

    @model_validator(mode="after")
    def _parser_fits_the_kind(self) -> "Source":
        known: dict[Kind, Collection[str]] = {
            "text": TEXT_PARSERS, "dialogues": DIALOGUE_PARSERS, "prompts": PROMPT_PARSERS, "preferences": ROW_PARSERS,
            "labels": LABEL_PARSERS, "model": ("file",),
        }  # fmt: skip
        if self.parser not in known[self.kind]:
            raise ValueError(f"kind {self.kind} has no parser {self.parser!r}")
        return self


class _Catalogue(Config):
    packages: dict[str, Package]
    sources: dict[str, Source]


@cache
def _catalogue() -> _Catalogue:
    with resources.as_file(resources.files("groundup.data") / "catalogue.yaml") as path:
        return parse_config(_Catalogue, load_yaml(path), path.name)


def list_sources() -> list[Source]:
    """All named sources, by kind and then in the catalogue's order."""
    order: tuple[Kind, ...] = get_args(Kind)
    named = [source.model_copy(update={"name": name}) for name, source in _catalogue().sources.items()]
    return sorted(named, key=lambda source: order.index(source.kind))


def find_source(name: str) -> Source | None:
    """The source called `name` (with or without "package://" or options); None if a plain word is not in the
    catalogue."""
    bare = name.removeprefix(PREFIX).partition("?")[0]
    if bare in _catalogue().sources:
        return _catalogue().sources[bare].model_copy(update={"name": bare})
    if name.startswith(PREFIX):
        raise UserError(f"{name}: no such named source{nearest_source(bare)}", "groundup data list shows them all")
    return None


def is_named(source: str) -> bool:
    """Whether a source is no file but a name of the catalogue, generated tasks or refusals."""
    bare = source.partition("?")[0]
    return bare.startswith(TASK_PREFIX) or bare == REFUSALS or find_source(source) is not None


def split_options(source: str) -> tuple[str, dict[str, Any]]:
    """`NAME?key=value&key=value` -> the name and the options; values are YAML, as in overrides."""
    name, _, query = source.partition("?")
    options: dict[str, Any] = {}
    for item in filter(None, query.split("&")):
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UserError(f"{source}: {item!r} is no key=value", f"write it as {name}?key=value&key=value")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"{source}: the value of {key!r} is not valid YAML: {error}") from None
    return name, options


def nearest_source(name: str) -> str:
    """` (did you mean 'x'?)` for a message, or nothing."""
    near = difflib.get_close_matches(name, _catalogue().sources, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def package_of(source: Source) -> Package:
    """The pinned archive that holds a source."""
    return _catalogue().packages[source.package]


def _open(name: str, *kinds: Kind) -> tuple[Source, Iterator[tuple[str, bytes]]]:
    source = find_source(PREFIX + name.removeprefix(PREFIX))
    assert source is not None
    if "?" in name:
        raise UserError(f"{name}: options are not for sources of {source.kind} here", f"write {source.name}")
    if source.kind not in kinds:
        needed = " or ".join(kinds)
        raise UserError(
            f"{name}: a source of {source.kind} where {needed} is needed", "groundup data list shows the kinds"
        )
    say(f"{source.name}: {source.origin}; licence: {source.licence}")
    return source, read_members(fetch(source.package, package_of(source)), source.members)


def read_source(name: str) -> Iterator[Document]:
    """The documents of a named source of text."""
    source, members = _open(name, "text")
    for number, (title, text) in enumerate(TEXT_PARSERS[source.parser](members)):
        metadata = {"licence": source.licence, **({"title": title} if title else {})}
        yield Document(text, f"{source.name}/{number}", source.name, metadata)


def read_source_dialogues(name: str) -> Iterator[Dialogue]:
    """The dialogues of a named source, user and assistant in turn."""
    source, members = _open(name, "dialogues")
    for number, messages in enumerate(DIALOGUE_PARSERS[source.parser](members)):
        yield Dialogue(tuple(messages), f"{source.name}/{number}", source.name, {"licence": source.licence})


def read_source_prompts(name: str) -> Iterator[Prompt]:
    """The prompts of a named source, one turn each, tagged with its criterion."""
    source, members = _open(name, "prompts")
    for number, (text, metadata) in enumerate(PROMPT_PARSERS[source.parser](members)):
        yield Prompt(
            (Message("user", text),), f"{source.name}/{number}", source.criterion, source.name,
            {"licence": source.licence, **metadata},
        )  # fmt: skip


def read_source_rows(name: str) -> Iterator[dict[str, Any]]:
    """The rows of a named source of preferences (layouts of data/comparison_formats.py) or of labels.

    A row of labels: `prompt`, `response`, `label` (what people judged: "refusal" or "harm"), `score` (their mean: 0
    is no, 1 is fully), `scores` (each), `category`.
    """
    source, members = _open(name, "preferences", "labels")
    yield from {**ROW_PARSERS, **LABEL_PARSERS}[source.parser](members)


def get_source(name: str, out: Path | None = None) -> Path:
    """Fetch a named source and write it as one file: JSON lines, or the model file itself; returns the path.

    `out` is a file, or a folder that exists; without it the file goes beside the cached archive and, being a pure
    function of that archive, is used again when it is there.
    """
    source = find_source(PREFIX + name.removeprefix(PREFIX))
    assert source is not None
    file_name = Path(source.members[0]).name if source.kind == "model" else f"{source.name}.jsonl"
    if out is None:
        path = archive_folder() / package_of(source).sha256[:16] / file_name
        if _is_intact(path):
            return path
    else:
        path = out / file_name if out.is_dir() else out
    if source.kind == "model":
        _, members = _open(name, "model")
        with atomic_file(path) as temporary:
            temporary.write_bytes(next(members)[1])
    else:
        write_jsonl(path, _json_rows(source))
    if out is None:
        path.with_name(path.name + ".sha256").write_text(sha256_file(path))
    return path


def _is_intact(path: Path) -> bool:
    digest = path.with_name(path.name + ".sha256")
    return path.exists() and digest.exists() and digest.read_text() == sha256_file(path)


def _json_rows(source: Source) -> Iterator[dict[str, Any]]:
    if source.kind == "text":
        return map(to_json, read_source(source.name))
    if source.kind == "dialogues":
        return map(to_json, read_source_dialogues(source.name))
    if source.kind == "prompts":
        return map(to_json, read_source_prompts(source.name))
    return read_source_rows(source.name)
