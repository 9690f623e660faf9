"""Seeds, records, files, metrics and progress."""

import hashlib
import io
import json
import stat
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from groundup.base.errors import UserError
from groundup.base.files import atomic_file, sha256_file, write_text
from groundup.base.metrics import MetricsLog, read_metrics
from groundup.base.progress import Progress, track
from groundup.base.records import Dialogue, Message, read_jsonl, to_json, write_jsonl
from groundup.base.seeds import derive_seed


def test_seeds_are_stable_and_distinct() -> None:
    assert derive_seed(0, "sft", 3) == derive_seed(0, "sft", 3)
    seeds = {derive_seed(seed, name, step) for seed in range(5) for name in ("a", "b") for step in range(50)}
    assert len(seeds) == 500
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_dialogues_round_trip(tmp_path: Path) -> None:
    dialogue = Dialogue((Message("user", "hé\n"), Message("assistant", "ok")), "1", "here", {"k": 1})
    assert write_jsonl(tmp_path / "d.jsonl", [to_json(dialogue)]) == 1
    assert [Dialogue.from_json(row) for row in read_jsonl(tmp_path / "d.jsonl")] == [dialogue]


@pytest.mark.parametrize("content", [b'{"a": 1}\n{bad', b"[1]\n", b'{"a": "\xff"}\n'])
def test_bad_jsonl_names_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"d\.jsonl"):
        list(read_jsonl(path))


def test_atomic_file_keeps_the_old_on_error_and_follows_umask(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR
    assert sha256_file(path) == hashlib.sha256(b"old").hexdigest()


def test_metrics_resume_cuts_what_came_later(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in range(6):
        log.log(step, {"loss": step / 2, "none": None})
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 6, "lo')
    resumed = MetricsLog(tmp_path, resume_step=4)
    resumed.log(4, {"loss": 9.0})
    resumed.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(log.path)] == [
        (0, 0),
        (1, 0.5),
        (2, 1),
        (3, 1.5),
        (4, 9),
    ]
    assert "none" not in log.path.read_text()
    assert list((tmp_path / "tensorboard").iterdir())


def test_progress_prints_rate_and_counts_without_a_terminal() -> None:
    text = io.StringIO()
    with redirect_stderr(text), Progress("work", 3, "rows") as progress:
        for _ in range(3):
            progress.advance(note="loss 1.0")
    assert "work: 3/3 rows" in text.getvalue()
    assert "/s" in text.getvalue()
    assert "loss 1.0" in text.getvalue()
    assert list(track([1, 2], "again")) == [1, 2]


def test_manifest_json_is_readable(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", json.dumps({"a": "é"}))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": "é"}
