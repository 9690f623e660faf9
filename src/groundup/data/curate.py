"""Raw sources -> one clean corpus: normalise, language, duplicates, quality, weights, held-out split.

Every document that does not reach the corpus is counted under the key or the reason that dropped it.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any

import zstandard
from pydantic import Field, field_validator

from groundup.base.config import Config
from groundup.base.errors import UserError
from groundup.base.files import atomic_file, read_json, write_json, write_text
from groundup.base.progress import Progress, say
from groundup.base.records import Document, to_json
from groundup.base.seeds import derive_seed
from groundup.data.dedup import Deduplicator, text_hash
from groundup.data.filters import QualityConfig
from groundup.data.judge import Judged, Rules, judging
from groundup.data.readers import ReadConfig, ReadReport, read_documents, source_bytes
from groundup.data.sources import find_source

TRAIN, HELD_OUT, REPORT, DATA_CARD = "train.jsonl.zst", "held_out.jsonl.zst", "report.json", "DATA_CARD.md"
_KEPT, _COUNTS = "kept.jsonl.zst", "kept.json"


class SourceEntry(Config):
    """One source of the mix."""

    source: str
    """File, folder, hf://ORG/NAME[/SPLIT] or named source (groundup data list)."""
    weight: float = Field(default=1.0, gt=0, le=100)
    """How often a training document is there: 2 = twice, 0.5 = a fixed half of them. Held-out text is never repeated.

    Source: Llama 2 section 2.1, which up-samples the most factual sources.
    """


class CurateConfig(Config):
    """What goes into the corpus."""

    sources: tuple[SourceEntry, ...] = Field(min_length=1)
    """Also a single path or name, or a list in which some entries are."""
    read: ReadConfig = ReadConfig()
    languages: tuple[str, ...] = ("en",)
    """ISO 639-1 codes to keep; []: any language."""
    min_language_score: float = Field(default=0.4, ge=0, le=1)
    quality: QualityConfig | None = QualityConfig()
    """null: no quality heuristics."""
    near_duplicate_threshold: float | None = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity of 5-word runs from which a document counts as a copy; null: exact duplicates only.

    What is remembered of a document takes about 5 KB of memory: 5 GB for a million documents, 16 bytes each with null.
    """
    max_document_chars: int = Field(default=50_000, ge=1000)
    """Longer documents are cut between paragraphs, so that a book can be judged, and held out, in parts."""
    held_out_fraction: float = Field(default=0.01, ge=0, lt=1)
    """Chosen by the hash of the text, so that adding sources moves no text across. At least one document."""
    workers: int | None = Field(default=None, ge=1)
    """Processes; null: one below 8 MB of input, else one a core. The corpus does not depend on it."""

    @field_validator("sources", mode="before")
    @classmethod
    def _from_short_forms(cls, value: Any) -> Any:
        items = [value] if isinstance(value, str | dict) else value
        if not isinstance(items, list | tuple):
            raise ValueError("expected a path or name, or a list of them")
        return [{"source": item} if isinstance(item, str) else item for item in items]

    @field_validator("sources")
    @classmethod
    def _without_repetition(cls, value: tuple[SourceEntry, ...]) -> tuple[SourceEntry, ...]:
        for name, count in Counter(entry.source for entry in value).items():
            if count > 1:
                raise ValueError(f"{name!r} is there {count} times; give it a weight instead")
        return value


def curate(config: CurateConfig, seed: int, work: Path, out: Path) -> dict[str, Any]:
    """Fill `out` with train.jsonl.zst, held_out.jsonl.zst, report.json and DATA_CARD.md; returns the report.

    The result is a pure function of the sources, the config and the seed. `work` keeps what was collected, so that a
    kill while the files are written does not cost the curation.
    Raises: `UserError` if a source cannot be read, or if nothing is left to train on.
    """
    collected = _collect(config, work)
    sources = collected["sources"]
    _require_text(sources, sum(source["documents"].get("kept", 0) for source in sources))
    written = _publish(config, seed, collected["smallest_key"], work / _KEPT, out)
    report = {"sources": sources, **written}
    if not report["train"]["documents"]:
        raise UserError(
            "curate: all the text is held out, none is left to train on",
            "add text, lower curate.max_document_chars, or set curate.held_out_fraction: 0",
        )
    write_json(out / REPORT, report)
    write_text(out / DATA_CARD, data_card(report))
    for source in sources:
        say(_summary(source))
    return report


def _collect(config: CurateConfig, work: Path) -> dict[str, Any]:
    """Read, judge and deduplicate all sources into `work`; counts by source, and the smallest held-out key."""
    if (work / _COUNTS).exists():
        finished: dict[str, Any] = read_json(work / _COUNTS)
        return finished
    sizes = [source_bytes(entry.source) for entry in config.sources]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    rules = Rules(
        config.languages, config.min_language_score, config.quality, config.near_duplicate_threshold is not None,
        config.max_document_chars,
    )  # fmt: skip
    tallies = [_Tally(entry) for entry in config.sources]
    deduplicator, smallest_key = Deduplicator(config.near_duplicate_threshold), 1.0
    with (
        atomic_file(work / _KEPT) as temporary,
        _writer(temporary) as keep,
        judging(rules, config.workers, total) as judge,
        Progress("curate", total, "B") as progress,
    ):
        for tally in tallies:
            report, done = tally.read_report, 0
            for judged in judge(read_documents(tally.entry.source, config.read, report)):
                for document in _news(judged, tally, deduplicator):
                    smallest_key = min(smallest_key, _held_out_key(document))
                    keep(document)
                progress.advance(report.bytes_read - done, note=f"{tally.entry.source}: {tally.documents['kept']} kept")
                done = report.bytes_read
    collected = {"sources": [tally.to_json() for tally in tallies], "smallest_key": smallest_key}
    write_json(work / _COUNTS, collected)
    return collected


def _news(judged: Judged, tally: "_Tally", deduplicator: Deduplicator) -> Iterator[Document]:
    """The parts of a document that go into the corpus; everything is counted."""
    document = judged.document
    tally.add("read", len(document.text))
    tally.mended += judged.was_mended
    reason = judged.reason or deduplicator.reason_to_drop(judged.digest, judged.signature)
    if reason:
        tally.add(f"dropped: {reason}", len(document.text))
        return
    tally.cut += len(judged.parts) > 1
    for number, (text, why) in enumerate(judged.parts):
        tally.add(f"dropped: {why}" if why else "kept", len(text))
        if why is None:
            tally.licences.add(
                str(document.metadata.get("licence") or document.metadata.get("license") or "not stated")
            )
            part_id = f"{document.id}/{number}" if len(judged.parts) > 1 else document.id
            yield Document(text, part_id, tally.entry.source, document.metadata)


class _Tally:
    """Counts of one source. Parts of a document that was cut count as documents, but for `read`."""

    def __init__(self, entry: SourceEntry) -> None:
        self.entry, self.read_report = entry, ReadReport()
        self.documents, self.characters = Counter[str](), Counter[str]()
        self.mended = self.cut = 0
        self.licences: set[str] = set()

    def add(self, what: str, characters: int) -> None:
        self.documents[what] += 1
        self.characters[what] += characters

    def to_json(self) -> dict[str, Any]:
        named = find_source(self.entry.source) if not Path(self.entry.source).exists() else None
        return {
            "source": self.entry.source,
            "weight": self.entry.weight,
            "origin": named.origin if named else "given by the user",
            "licences": sorted(self.licences),
            "files": self.read_report.files,
            "skipped_by_reader": dict(self.read_report.skipped),
            "repaired": dict(self.read_report.repaired) | {"documents with mended characters": self.mended},
            "documents_cut": self.cut,
            "documents": dict(self.documents),
            "characters": dict(self.characters),
        }


def _require_text(sources: list[dict[str, Any]], kept: int) -> None:
    if kept:
        return
    reasons = Counter[str]()
    for source in sources:
        reasons.update({f"skipped: {why}": count for why, count in source["skipped_by_reader"].items()})
        reasons.update({why: count for why, count in source["documents"].items() if why != "read"})
    found = "; ".join(f"{why} x {count}" for why, count in reasons.most_common()) or "nothing was found to read"
    names = ", ".join(source["source"] for source in sources)
    raise UserError(
        f"curate: no text is left of {names}: {found}",
        "the keys curate.languages, curate.quality.* and curate.read.* set what is dropped",
    )


def _publish(config: CurateConfig, seed: int, smallest_key: float, kept: Path, out: Path) -> dict[str, dict[str, int]]:
    """Split what was kept into training and held-out text and repeat training text by weight; counts by split.

    Second copies come after all first ones, so that no context window holds a text twice.
    """
    weights = {entry.source: entry.weight for entry in config.sources}
    counts = {"train": {"documents": 0, "characters": 0}, "held_out": {"documents": 0, "characters": 0}}
    with _writer(out / TRAIN) as write_train, _writer(out / HELD_OUT) as write_held_out:
        write = {"train": write_train, "held_out": write_held_out}
        for copy in range(ceil(max(weights.values()))):
            for document in read_corpus(kept):
                key = _held_out_key(document)
                is_held_out = key < config.held_out_fraction or (config.held_out_fraction > 0 and key == smallest_key)
                copies = 1 if is_held_out else _copies(weights[document.source], seed, document)
                if copy < copies:
                    split = "held_out" if is_held_out else "train"
                    write[split](document)
                    counts[split]["documents"] += 1
                    counts[split]["characters"] += len(document.text)
    return counts


def _held_out_key(document: Document) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(text_hash(document.text)[:6]) / 2**48


def _copies(weight: float, seed: int, document: Document) -> int:
    """The weight, rounded up for a fixed share of the documents so that it holds on average."""
    draw = derive_seed(seed, "weight", text_hash(document.text).hex()) / 2**63
    return int(weight) + (draw < weight % 1)


@contextmanager
def _writer(path: Path) -> Iterator[Callable[[Document], None]]:
    """Writes documents as zstd-compressed JSON lines; equal documents give equal bytes."""
    with path.open("wb") as file, zstandard.ZstdCompressor(level=3).stream_writer(file) as stream:

        def write(document: Document) -> None:
            stream.write(json.dumps(to_json(document), ensure_ascii=False).encode() + b"\n")

        yield write


def read_corpus(path: Path) -> Iterator[Document]:
    """The documents of one file of a corpus artifact, as curate wrote them."""
    with zstandard.open(path, "rt", encoding="utf-8", newline="\n") as file:
        for line in file:
            yield Document(**json.loads(line))


def data_card(report: dict[str, Any]) -> str:
    """Markdown page that says what the corpus is made of, on what terms, and what was dropped."""
    lines = ["# Data card", ""]
    for split in ("train", "held_out"):
        lines.append(f"- {split}: {report[split]['documents']} documents, {report[split]['characters']} characters")
    lines += [
        "",
        "| source | origin | licence of the text | weight | documents kept | characters kept |",
        "|---|---|---|---|---|---|",
    ]
    for source in report["sources"]:
        kept = (str(source[unit].get("kept", 0)) for unit in ("documents", "characters"))
        licences = "; ".join(source["licences"]) or "-"
        cells = [source["source"], source["origin"], licences, f"{source['weight']:g}", *kept]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    lines += ["", "Dropped, in documents:", ""]
    lines += [f"- {_summary(source)}" for source in report["sources"]]
    return "\n".join(lines) + "\n"


def _summary(source: dict[str, Any]) -> str:
    documents = source["documents"]
    drops = {why.removeprefix("dropped: "): count for why, count in documents.items() if why.startswith("dropped: ")}
    drops |= {f"{why} (reader)": count for why, count in source["skipped_by_reader"].items()}
    told = (
        ", ".join(f"{why} {count}" for why, count in sorted(drops.items(), key=lambda item: (-item[1], item[0])))
        or "none"
    )
    cut = f" ({source['documents_cut']} cut into parts)" if source["documents_cut"] else ""
    return (
        f"{source['source']}: read {documents.get('read', 0)} documents{cut}, kept {documents.get('kept', 0)}; "
        f"dropped: {told}"
    )
