"""The HTML report, from artifacts made by hand."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from groundup.base.artifacts import Artifact, new_artifact, open_artifact
from groundup.base.metrics import MetricsLog
from groundup.base.records import Message
from groundup.report.figures import Curve, bars_svg, curves_svg, running_mean
from groundup.report.page import (
    COMPARISON_PANELS,
    STEP_PANELS,
    SampleChat,
    duration,
    flatten,
    number,
    write_page,
)

HOSTILE = "<script>alert('x')</script> & \"quotes\""
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Checker(HTMLParser):
    """Collects tags and attributes, and that every element is closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.urls: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "xlink:href", "action"):
                self.urls.append(value or "")
            if key == "id":
                self.ids.append(value or "")
            assert not key.startswith("on"), f"{tag} {key}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def make(out: Path, name: str, kind: str, inputs: dict[str, Any], metrics: dict[str, Any], **extra: Any) -> Artifact:
    manifest = {
        "kind": kind, "stage": name.replace("-", "_"), "fingerprint": "f" * 64, "seed": 1, "inputs": inputs,
        "config": {"key": HOSTILE, "steps": 3}, "metrics": metrics,
        "cost": {
            "wall_seconds": 61.2, "cpu_seconds": 100.0, "energy_kwh_estimate": 3e-4, "resumed": name == "base",
            "tokens": metrics.get("tokens"),
        },
    }  # fmt: skip
    with new_artifact(out / name, manifest) as folder:
        if "rows" in extra:
            log = MetricsLog(folder / "logs")
            for row in extra["rows"]:
                log.log(row["step"], {key: value for key, value in row.items() if key != "step"})
            log.close()
        if "report" in extra:
            (folder / "report.json").write_text(json.dumps(extra["report"]))
    return open_artifact(out / name)


def fake_run(out: Path) -> dict[str, Artifact]:
    source = {
        "source": "wikipedia-demo", "weight": 2.0, "licences": ["CC BY-SA 3.0"], "documents_cut": 1, "files": 1,
        "documents": {"read": 30, "kept": 25, "dropped: too short": 4, "dropped: near duplicate": 1},
        "characters": {"read": 1_000_000, "kept": 900_000}, "skipped_by_reader": {"not UTF-8": 2},
    }  # fmt: skip
    report = {
        "sources": [source], "train": {"documents": 50, "characters": 1_790_000},
        "held_out": {"documents": 1, "characters": 10_000},
    }  # fmt: skip
    raw = {"path": "/texts", "bytes": 1_000_000, "files": 3, "digest": "0"}
    corpus = make(out, "corpus", "corpus", {"raw-1": raw}, {"train": report["train"]}, report=report)
    rows = []
    for step in range(1, 301):
        row: dict[str, Any] = {
            "step": step, "loss": 2 + 7 * math.exp(-step / 60) + 0.2 * math.sin(step * 7), "lr": 1e-3 * step / 300,
            "grad_norm": 1 + 1 / step, "tokens_per_second": 5000 + 100 * math.sin(step),
        }  # fmt: skip
        if step % 50 == 0:
            row |= {"held_out_loss": 2.2 + 7 * math.exp(-step / 60), "held_out_bits_per_byte": 1.5 + 80 / step}
            row |= {"sample": f"Once upon a time {HOSTILE}"}
        rows.append(row)
    metrics = {"parameters": 1_234_567, "tokens": 2_000_000, "held_out": {"bits_per_byte": 1.7667}}
    base = make(
        out, "base", "model", {"corpus": {"path": "../corpus", "relative": True, "id": corpus.id}}, metrics, rows=rows
    )
    packing = {"dialogues": 999, "dropped": {"too long": 3}, "packing": {"rows": 120, "fill_fraction": 0.9731}}
    sft = make(
        out, "sft-v1", "model", {"base": {"path": "../base", "relative": True, "id": base.id}},
        {"parameters": 1_234_567, "tokens": 100_000, **packing}, rows=rows[:40],
    )  # fmt: skip
    return {"corpus": corpus, "base": base, "sft-v1": sft}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    tmp_path = tmp_path_factory.mktemp("page")
    chats = [
        SampleChat(
            "sft-v1", (Message("system", "Be kind."), Message("user", HOSTILE), Message("assistant", "Hi!\nOk."))
        ),
        SampleChat("sft-v1", (Message("user", "What is rain?"), Message("assistant", "Water " * 60))),
    ]
    write_page(tmp_path / "index.html", "quickstart", "A <small> run.", fake_run(tmp_path / "run"), chats)
    return (tmp_path / "index.html").read_text(encoding="utf-8")


def test_is_whole_and_self_contained(page: str) -> None:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.tags.count("svg") == 5 + 4 + 1
    assert all(url.startswith("#") for url in checker.urls), "nothing is fetched from anywhere"
    assert "script" not in checker.tags
    assert "@import" not in page
    assert "url(http" not in page
    referred = set(re.findall(r"url\(#([^)]*)\)", page)) | {url[1:] for url in checker.urls}
    assert referred, "clip paths and marks are referred to by id"
    assert referred <= set(checker.ids)


def test_users_text_is_escaped(page: str) -> None:
    assert "<script>" not in page
    assert page.count("&lt;script&gt;") >= 3
    assert "A &lt;small&gt; run." in page


def test_says_what_matters(page: str) -> None:
    checker = Checker()
    checker.feed(page)
    text = " ".join(" ".join(checker.text).split())
    for words in (
        "1,234,567", "1.767", "2,100,000", "3 min 04 s", "wikipedia-demo", "CC BY-SA 3.0", "900,000", "too short",
        "near duplicate", "not UTF-8 (reader)", "packing: fill fraction", "0.9731", "What is rain?",
        "/texts (1,000,000 bytes)",
        "Training: base", "Training: sft-v1", "Sample at step 300", "* resumed",
    ):  # fmt: skip
        assert words in text, words


def test_curves_of_training_on_comparisons(tmp_path: Path) -> None:
    step = {"loss": 0.7, "share_correct": 0.5, "score_difference": 0.1, "lr": 1e-4, "grad_norm": 1.0}
    rows = [{"step": 1, **step}, {"step": 2, **step, "held_out_loss": 0.6, "held_out_accuracy": 0.75}]
    model = make(tmp_path, "by-pairs", "model", {}, {}, rows=rows)
    write_page(tmp_path / "index.html", "x", "", {"by-pairs": model}, [])
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    figures = re.findall(r'aria-label="([^"]*)"', text)
    assert figures == [panel[0] for panel in (*COMPARISON_PANELS, *STEP_PANELS[:2])]
    assert "nats per comparison" in text
    assert "nats per target token" not in text


def test_empty_run(tmp_path: Path) -> None:
    write_page(tmp_path / "index.html", "nothing", "", {}, [])
    checker = Checker()
    checker.feed((tmp_path / "index.html").read_text())
    assert checker.open == []


def test_figures_are_reproducible_and_follow_the_page() -> None:
    curves = [Curve("a <b>", range(30), [1.0 / (1 + i) for i in range(30)], is_noisy=True), Curve("c", [1, 2], [3, 4])]
    first, second = (curves_svg("Loss & more", "nats", curves, "x") for _ in range(2))
    assert first == second
    assert "currentColor" in first
    assert "DejaVu" not in first
    assert 'aria-label="Loss &amp; more"' in first
    assert "currentColor" in bars_svg("Drops", {"short": 3, "copy": 10}, "y")


def test_running_mean_starts_at_the_first_value() -> None:
    assert running_mean([4.0, 4.0, 4.0]) == pytest.approx([4.0, 4.0, 4.0])
    assert running_mean([1.0, 2.0], weight=0.5) == pytest.approx([1.0, (0.25 * 1 + 0.5 * 2) / 0.75])


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234567, "1,234,567"), (0.97314, "0.9731"), (3.0, "3"), (1.5e-7, "1.500e-07"), (True, "True"), ("x", "x")],
)
def test_number(value: Any, text: str) -> None:
    assert number(value) == text


def test_duration() -> None:
    assert [duration(s) for s in (0.25, 59.94, 61, 3661)] == ["0.2 s", "59.9 s", "1 min 01 s", "1 h 01 min"]


def test_flatten() -> None:
    assert list(flatten({"a_b": {"c": 1, "d": [1]}, "e": "f"})) == [("a b: c", 1), ("a b: d", "[1]"), ("e", "f")]
