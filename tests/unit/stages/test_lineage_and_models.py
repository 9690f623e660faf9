"""What MODEL and RUN[/ARTIFACT] mean, and the tree of where an artifact came from."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from groundup.base.artifacts import new_artifact, open_artifact
from groundup.base.errors import UserError
from groundup.stages.lineage import find_artifact, lineage_tree
from groundup.stages.models import resolve_model


def make(run: Path, name: str, kind: str, parents: dict[str, str], config: dict[str, Any], when: str) -> None:
    inputs: dict[str, Any] = {
        role: {"path": f"../{parent}", "relative": True, "id": open_artifact(run / parent).id}
        for role, parent in parents.items()
    }
    if name == "corpus":
        inputs["raw-1"] = {"path": str(run.parent / "texts"), "files": 3, "bytes": 1234}
    manifest = {
        "kind": kind, "stage": name, "fingerprint": "f", "inputs": inputs, "config": config, "seed": 7,
        "cost": {"wall_seconds": 1.25}, "finished_at": when,
    }  # fmt: skip
    with new_artifact(run / name, manifest) as folder:
        (folder / "file").write_text(name)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    make(run, "corpus", "corpus", {}, {"sources": [{"source": "grimm", "weight": 1.0}, {"source": "texts"}]}, "2026-01")
    make(run, "tokenizer", "tokenizer", {"corpus": "corpus"}, {}, "2026-02")
    make(run, "shards", "shards", {"corpus": "corpus", "tokenizer": "tokenizer"}, {}, "2026-03")
    make(run, "base", "model", {"shards": "shards", "tokenizer": "tokenizer"}, {}, "2026-04")
    make(run, "report", "report", {"base": "base"}, {}, "2026-05")
    return run


def shown(path: Path) -> str:
    console = Console(width=200, record=True)
    console.print(lineage_tree(path))
    return console.export_text()


def test_tree_goes_back_to_raw_text_once(run: Path) -> None:
    text = shown(run / "base")
    lines = [line.strip("│ ├└─").strip() for line in text.splitlines()]
    assert lines[0].startswith("base  model ")
    assert [line.split()[0] for line in lines if not line.startswith("reads")] == [
        "base", "shards", "corpus", str(run.parent / "texts"), "tokenizer", "corpus", "tokenizer",
    ]  # fmt: skip
    assert lines.count("reads grimm") == 1
    assert "3 files, 1,234 bytes" in text
    assert text.count("(see above)") == 2


def test_find_artifact(run: Path, tmp_path: Path) -> None:
    assert find_artifact(run / "shards") == run / "shards"
    assert find_artifact(run) == run / "base", "the newest, reports aside"
    with pytest.raises(UserError, match="no such run or artifact"):
        find_artifact(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no finished artifact"):
        find_artifact(tmp_path / "empty")


def test_resolve_model(run: Path, tmp_path: Path) -> None:
    assert resolve_model(str(run)) == run / "base"
    make(run, "sft-v1", "model", {"base": "base"}, {}, "2026-06")
    assert resolve_model(str(run)) == run / "sft-v1"
    assert resolve_model(str(run / "base")) == run / "base"
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    assert resolve_model(str(file)) == file
    folder = tmp_path / "hf"
    folder.mkdir()
    assert resolve_model(str(folder)) == folder
    with pytest.raises(UserError, match="of kind 'shards' where 'model' is needed"):
        resolve_model(str(run / "shards"))
    with pytest.raises(UserError, match=r"smollm2-135m: no such file.*did you mean 'smollm2"):
        resolve_model("smollm2-135m")
    with pytest.raises(UserError, match="a source of text where a model is needed"):
        resolve_model("grimm")
