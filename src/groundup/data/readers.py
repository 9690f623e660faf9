"""Documents out of whatever holds them: files, folders, WARC archives, Hugging Face datasets and named sources."""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import orjson
from pydantic import Field
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import detect_encoding
from warcio.archiveiterator import ArchiveIterator
from warcio.exceptions import ArchiveLoadFailed
from warcio.recordloader import ArcWarcRecord
from warcio.statusandheaders import StatusAndHeadersParser

from groundup.base.config import Config
from groundup.base.errors import CorruptFile, UserError
from groundup.base.records import Document
from groundup.data.decompress import DecompressedFile
from groundup.data.sources import find_source, nearest_source, read_source

HF = "hf://"
csv.field_size_limit((1 << 31) - 1)  # of the whole process, 128 KiB if left alone; rows are limited below
_NESTING_TAG = re.compile(rb"<(/?)(?!p\b|li\b|br\b|img\b|hr\b|meta\b|link\b|input\b|t[dhr]\b|d[dt]\b|option\b)[a-zA-Z]")
_MAX_NESTING = 2000
_HTTP_HEADERS = StatusAndHeadersParser(["HTTP/"], verify=False)
_PIECE_CHARS = 16 << 20
"""A text file without markers comes in pieces of about this length, each ending with a paragraph."""
_KEPT_KEYS = ("title", "url", "date", "licence", "license", "language")
"""Row keys that go into a document's metadata when they are short texts."""


class ReadConfig(Config):
    """How raw files become documents, and what is too much."""

    text_keys: tuple[str, ...] = ("text", "content")
    """Key or column that holds the text, the first that is there."""
    split_marker: str | None = "<|endoftext|>"
    """Stands between the documents of a text file."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """Text that is not UTF-8: an error with file and byte offset, or U+FFFD, counted."""
    bad_rows: Literal["error", "skip"] = "error"
    """JSON and CSV rows that cannot be parsed: an error with file and line, or skipped, counted."""
    max_record_bytes: int = Field(default=256 << 20, gt=0)
    """Largest line, JSON file, table row or web page."""
    max_ratio: float = Field(default=200.0, gt=1)
    """A compressed file may grow by this factor (counted from 16 MiB on)."""
    max_decompressed_bytes: int = Field(default=1 << 40, gt=0)


@dataclass
class ReadReport:
    """What was read and what was not."""

    files: int = 0
    documents: int = 0
    characters: int = 0
    bytes_read: int = 0
    """Of the files on disk (or of the text, where there is no file): the measure of progress."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Reason -> number of files, rows or records."""
    repaired: Counter[str] = field(default_factory=Counter)


def read_documents(
    source: str | Path, config: ReadConfig | None = None, report: ReadReport | None = None
) -> Iterator[Document]:
    """The documents of a file, a folder, "hf://org/name[/split]", or a named source ("package://NAME" or NAME).

    Files: txt, md, jsonl, json, csv, tsv, parquet, html, warc; all but parquet also as .gz and .zst. A folder is read
    recursively by name; hidden files are passed over, unknown kinds are counted in `report.skipped`.
    Raises: `UserError` for what the user can mend, `CorruptFile` for damaged files.
    """
    config, report = config or ReadConfig(), report or ReadReport()
    for document in _read(str(source), config, report):
        report.documents += 1
        report.characters += len(document.text)
        yield document


def _read(source: str, config: ReadConfig, report: ReadReport) -> Iterator[Document]:
    if source.startswith(HF):
        return _counted_by_text(_huggingface(source, config, report), report)
    path = Path(source).expanduser()
    if path.is_dir():
        return chain.from_iterable(_file(file, path, source, config, report) for file in walk_files(path))
    if path.exists():
        if _reader_of(path) is None:
            raise UserError(f"{path}: cannot read files of kind {_kind(path)!r}", f"known kinds: {', '.join(_READERS)}")
        return _file(path, path.parent, source, config, report)
    if find_source(source) is not None:
        return _counted_by_text(read_source(source), report)
    raise UserError(f"{source}: no such file, folder or named source{nearest_source(source)}", "groundup data list")


def walk_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted by path; hidden files and folders are left out."""
    found: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(found)


def source_bytes(source: str) -> int | None:
    """The `ReadReport.bytes_read` at which a source is finished; None if nobody knows beforehand."""
    path = Path(source).expanduser()
    if path.is_dir():
        return sum(file.stat().st_size for file in walk_files(path) if _reader_of(file) is not None)
    if path.exists():
        return path.stat().st_size
    entry = None if source.startswith(HF) else find_source(source)
    return entry.text_bytes if entry else None


def _counted_by_text(documents: Iterator[Document], report: ReadReport) -> Iterator[Document]:
    for document in documents:
        report.bytes_read += len(document.text.encode("utf-8", "surrogatepass"))
        yield document


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in (".gz", ".zst") else suffix


def _reader_of(path: Path) -> "Callable[[_Input], Iterator[Document]] | None":
    return None if path.suffix.lower() in (".gz", ".zst") and _kind(path) == ".parquet" else _READERS.get(_kind(path))


def _file(path: Path, root: Path, source: str, config: ReadConfig, report: ReadReport) -> Iterator[Document]:
    read = _reader_of(path)
    if read is None:
        report.skipped[f"file of unknown kind {''.join(path.suffixes[-2:]) or path.name!r}"] += 1
        return
    raw = DecompressedFile(path, config.max_ratio, config.max_decompressed_bytes)
    before = report.bytes_read
    with io.BufferedReader(raw, 1 << 20) as stream:
        name = path.relative_to(root).as_posix()
        for document in read(_Input(path, name, source, cast(BinaryIO, stream), config, report)):
            report.bytes_read = before + raw.bytes_read
            yield document
    report.files += 1
    report.bytes_read = before + path.stat().st_size


@dataclass(frozen=True)
class _Input:
    """One open file and what its reader needs to know."""

    path: Path
    name: str
    """Relative to the source, so that ids do not depend on where the source lies."""
    source: str
    stream: BinaryIO
    config: ReadConfig
    report: ReadReport

    def document(self, text: str, number: int, metadata: dict[str, Any] | None = None) -> Document:
        return Document(text, f"{self.name}#{number}", self.source, metadata or {})

    def skip(self, reason: str) -> None:
        self.report.skipped[reason] += 1

    def bad_row(self, line: int, why: object) -> None:
        if self.config.bad_rows == "error":
            raise CorruptFile(f"{self.path}:{line}: {why}", "mend the file, or set read.bad_rows: skip")
        self.skip("row that cannot be parsed")

    def lines(self) -> Iterator[str]:
        """Decoded lines with their ends; a byte order mark is dropped."""
        offset, limit = 0, self.config.max_record_bytes
        while line := self.stream.readline(limit + 1):
            if len(line) > limit:
                raise UserError(
                    f"{self.path}: byte {offset}: a line of more than {limit} bytes", "raise read.max_record_bytes"
                )
            yield self.decode(line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line, offset)
            offset += len(line)

    def whole(self) -> bytes:
        content = self.stream.read(self.config.max_record_bytes + 1)
        if len(content) > self.config.max_record_bytes:
            raise UserError(
                f"{self.path}: more than {self.config.max_record_bytes} bytes in one record",
                "raise read.max_record_bytes, or store it as JSON lines",
            )
        return content

    def decode(self, content: bytes, offset: int = 0) -> str:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.config.encoding_errors == "strict":
                raise UserError(
                    f"{self.path}: byte {offset + error.start} (0x{content[error.start]:02x}): not UTF-8 text",
                    "convert the file (iconv -t utf-8), or set read.encoding_errors: replace",
                ) from None
            text = content.decode("utf-8", errors="replace")
            self.report.repaired["character that is not UTF-8"] += text.count("\ufffd")
            return text

    def row_document(self, row: dict[str, Any], number: int) -> Document | None:
        """The document in a row; None, counted, if it holds no text."""
        for key in self.config.text_keys:
            if isinstance(text := row.get(key), str):
                kept = {
                    name: row[name] for name in _KEPT_KEYS if isinstance(row.get(name), str) and len(row[name]) < 1000
                }
                return self.document(text, number, kept)
        self.skip(f"row without a text under {' or '.join(self.config.text_keys)}")
        return None


def _text(file: _Input) -> Iterator[Document]:
    """The stretches between split markers; in a file without any, pieces that end with a paragraph."""
    marker, lines = file.config.split_marker, [""]
    number = size = 0
    for line in file.lines():
        parts = line.split(marker) if marker else [line]
        for part in parts[:-1]:
            lines.append(part)
            if (text := "".join(lines)).strip():
                yield file.document(text.strip("\n"), number)
                number += 1
            lines, size = [], 0
        lines.append(parts[-1])
        size += len(parts[-1])
        if size > _PIECE_CHARS and not line.strip():
            yield file.document("".join(lines).strip("\n"), number)
            lines, size, number = [], 0, number + 1
    if (text := "".join(lines)).strip():
        yield file.document(text.strip("\n"), number)


def _jsonl(file: _Input) -> Iterator[Document]:
    return _json_lines(file, file.lines())


def _json_lines(file: _Input, lines: Iterator[str]) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            file.bad_row(number, f"not valid JSON ({error})")
            continue
        yield from _row(file, row, number)


def _json(file: _Input) -> Iterator[Document]:
    """A list of objects, one object, or JSON lines under another name, as the shards of C4 are."""
    lines = file.lines()
    first = next(lines, "")
    if first.startswith("{") and first.rstrip().endswith("}"):
        yield from _json_lines(file, chain([first], lines))
        return
    try:
        value = orjson.loads(first + file.decode(file.whole(), len(first.encode())))
    except orjson.JSONDecodeError as error:
        raise CorruptFile(f"{file.path}: not valid JSON ({error})") from None
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield from _row(file, row, number)


def _row(file: _Input, row: object, number: int) -> Iterator[Document]:
    if not isinstance(row, dict):
        file.bad_row(number, f"expected a JSON object, found {type(row).__name__}")
    elif document := file.row_document(row, number):
        yield document


def _csv(file: _Input) -> Iterator[Document]:
    limit, size = file.config.max_record_bytes, 0

    def lines() -> Iterator[str]:
        nonlocal size
        for line in file.lines():
            size += len(line)
            if size > limit:  # an open quote swallows the rest of the file
                raise UserError(f"{file.path}: more than {limit} bytes in one row", "raise read.max_record_bytes")
            yield line

    rows = csv.DictReader(lines(), delimiter="\t" if _kind(file.path) == ".tsv" else ",", strict=True)
    try:
        for number, row in enumerate(rows, 1):
            size = 0
            if document := file.row_document(row, number):
                yield document
    except csv.Error as error:
        raise CorruptFile(f"{file.path}:{rows.line_num}: not a valid table ({error})") from None


def _parquet(file: _Input) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file.path)
        groups = [table.metadata.row_group(index) for index in range(table.metadata.num_row_groups)]
        if sum(group.total_byte_size for group in groups) > max(
            64 << 20, file.config.max_ratio * file.path.stat().st_size
        ):
            raise UserError(
                f"{file.path}: grows to more than {file.config.max_ratio:g} times its size", "read.max_ratio"
            )
        columns = [key for key in (*file.config.text_keys, *_KEPT_KEYS) if key in table.schema_arrow.names]
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                if document := file.row_document(row, number):
                    yield document
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorruptFile(f"{file.path}: not a readable parquet file ({error})") from None


def _html(file: _Input) -> Iterator[Document]:
    if text := html_text(file.whole()):
        yield file.document(text, 0)
    else:
        file.skip("page without text")


def html_text(page: bytes, charset: str | None = None) -> str:
    """The main text of a web page, without menus, forms and scripts.

    Choice: resiliparse rather than trafilatura (ten times the installed size) or the standard library's parser, which
    leaves telling text from menus to us. It runs in native code, about 1 ms a page. Its time grows with the square of
    the nesting, so a page nested deeper than any real one counts as one without text.
    """
    depth = 0
    for tag in _NESTING_TAG.finditer(page):
        depth += -1 if tag[1] else 1
        if depth > _MAX_NESTING:
            return ""
    return str(extract_plain_text(decode_page(page, charset), main_content=True, alt_texts=False)).strip()


def decode_page(page: bytes, charset: str | None) -> str:
    """Text of a web page in the character set it declares, else in the one its bytes suggest."""
    try:
        return page.decode(charset or detect_encoding(page) or "utf-8", errors="replace")
    except LookupError:
        return page.decode("utf-8", errors="replace")


def _warc(file: _Input) -> Iterator[Document]:
    """Responses and resources that are pages or plain text, and the `conversion` records of WET files.

    Why `no_record_parse`: warcio takes a response without an HTTP header for the end of the file.
    """
    try:
        for number, record in enumerate(ArchiveIterator(file.stream, no_record_parse=True)):
            if record.rec_type in ("response", "resource", "conversion") and (text := _page_text(file, record)):
                url, date = (record.rec_headers.get_header(name) or "" for name in ("WARC-Target-URI", "WARC-Date"))
                yield file.document(text, number, {"url": url.strip("<>"), "date": date})
    except (ArchiveLoadFailed, ValueError) as error:
        raise CorruptFile(f"{file.path}: not a readable WARC file ({error})") from None


def _page_text(file: _Input, record: ArcWarcRecord) -> str | None:
    """The text of one record; None, counted, if it has none that we can use."""
    if record.rec_type == "response":
        try:
            record.http_headers = _HTTP_HEADERS.parse(record.raw_stream)
        except EOFError:
            file.skip("response without a header")
            return None
    headers = record.http_headers or record.rec_headers
    kind, _, parameters = (headers.get_header("Content-Type") or "unknown").lower().partition(";")
    text, why = None, "page without text"
    if record.http_headers and record.http_headers.get_statuscode() != "200":
        why = "web page with a status other than 200"
    elif kind.strip() not in ("text/html", "application/xhtml+xml", "text/plain"):
        why = f"record of type {kind.strip()}"
    else:
        content = record.content_stream().read(file.config.max_record_bytes + 1)
        charset = parameters.partition("charset=")[2].strip(" \"'") or None
        if len(content) > file.config.max_record_bytes:
            why = "record larger than max_record_bytes"
        elif record.raw_stream.limit > 0:
            raise CorruptFile(f"{file.path}: ends in the middle of a record", "is the download complete?")
        else:
            text = html_text(content, charset) if "html" in kind else decode_page(content, charset).strip()
    if not text:
        file.skip(why)
    return text


def _huggingface(source: str, config: ReadConfig, report: ReadReport) -> Iterator[Document]:
    parts = source.removeprefix(HF).strip("/").split("/")
    if len(parts) not in (2, 3):
        raise UserError(f"{source}: expected hf://ORG/NAME or hf://ORG/NAME/SPLIT")
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise UserError(f"{source}: the datasets package is not installed", "pip install datasets") from None
    name, split = "/".join(parts[:2]), parts[2] if len(parts) == 3 else "train"
    try:
        rows = iter(datasets.load_dataset(name, split=split, streaming=True))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{source}: cannot be opened ({error})", "check the name, the split and the connection"
        ) from None
    reader = _Input(Path(source), name, source, io.BytesIO(), config, report)
    for number, row in enumerate(rows, 1):
        if document := reader.row_document(row, number):
            yield document


_READERS: dict[str, Callable[[_Input], Iterator[Document]]] = {
    ".txt": _text, ".md": _text, ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
    ".html": _html, ".htm": _html, ".warc": _warc, ".wet": _warc,
}  # fmt: skip
