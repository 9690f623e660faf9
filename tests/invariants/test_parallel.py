"""Two ranks train as one does, however unevenly targets lie, and continue each other's checkpoints."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from groundup.base.metrics import METRICS_FILE, read_metrics
from groundup.train.meter import TIMING_KEYS

WORKER = Path(__file__).with_name("training_worker.py")
RUNS = ("ddp:ddp:7:untied", "fsdp:fsdp:7:untied", "ddp:ddp-tied:7:tied", "fsdp:fsdp-tied:7:tied")


def launch(folder: Path, jobs: tuple[str, ...], ranks: int) -> None:
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += [str(WORKER), "train", str(folder), *jobs]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-6000:]


def losses(folder: Path) -> list[dict[str, Any]]:
    rows = read_metrics(folder / "logs" / METRICS_FILE)
    assert [row["step"] for row in rows] == list(range(1, 8))
    return rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    launch(folder / "one", (RUNS[0], RUNS[2]), 1)
    for tied in ("", "-tied"):
        go_back(folder / "one" / f"ddp{tied}", folder / "two" / f"resumed{tied}")
    launch(folder / "two", (*RUNS, "fsdp:resumed:7:untied", "fsdp:resumed-tied:7:tied"), 2)
    for tied in ("", "-tied"):
        go_back(folder / "two" / f"fsdp{tied}", folder / "one" / f"resumed{tied}")
    launch(folder / "one", ("ddp:resumed:7:untied", "ddp:resumed-tied:7:tied"), 1)
    return folder


def go_back(folder: Path, target: Path) -> None:
    """A copy of a finished run as it was after step 6."""
    shutil.copytree(folder, target)
    shutil.rmtree(target / "checkpoints" / "step-00000007")


def assert_same_training(one: Path, other: Path, rel: float = 1e-6) -> None:
    for mine, theirs in zip(losses(one), losses(other), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=rel)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=10 * rel)
        assert ("held_out_loss" in mine) == ("held_out_loss" in theirs) == (mine["step"] in (4, 7))
        assert mine.get("held_out_loss", 0) == pytest.approx(theirs.get("held_out_loss", 0), rel=rel)
        for key in ("tokens", "target_tokens", "lr", "sample"):
            assert mine.get(key) == theirs.get(key)
    a, b = (torch.load(folder / "weights.pt", weights_only=True) for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("tied", ["", "-tied"])
def test_two_ranks_log_the_losses_of_one(runs: Path, mode: str, tied: str) -> None:
    assert_same_training(runs / "one" / f"ddp{tied}", runs / "two" / f"{mode}{tied}")


def test_sharded_checkpoints_hold_a_part_each(runs: Path) -> None:
    files = {path.name for path in (runs / "two" / "fsdp" / "checkpoints" / "step-00000007").iterdir()}
    kinds = {f"{kind}-0000{rank}.safetensors" for kind in ("model", "optimizer") for rank in (0, 1)}
    assert files == {*kinds, "manifest.json", "state.json"}
    assert len(list((runs / "two" / "ddp" / "checkpoints" / "step-00000007").iterdir())) == 4


@pytest.mark.parametrize(("resumed", "origin"), [("one", "two/fsdp"), ("two", "one/ddp")])
@pytest.mark.parametrize("tied", ["", "-tied"])
def test_what_two_ranks_wrote_one_continues_and_the_other_way_round(
    runs: Path, resumed: str, origin: str, tied: str
) -> None:
    run = runs / resumed / f"resumed{tied}"
    assert_same_training(runs / "one" / f"ddp{tied}", run)
    assert losses(run)[:6] == losses(runs / f"{origin}{tied}")[:6], "steps before the checkpoint were done again"


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_at_once_and_a_restart_finishes_it_bitwise(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER)]
    job = ("train", str(tmp_path), "ddp:killed:60:untied")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *job], env=environment, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoints" / "step-00000006").exists():
        assert process.poll() is None
        time.sleep(0.05)
    ranks = [child for child in psutil.Process(process.pid).children() if str(WORKER) in child.cmdline()]
    assert len(ranks) == 2
    ranks[1].kill()
    assert process.wait(timeout=60) != 0
    assert not any(rank.is_running() for rank in ranks)
    launch(tmp_path, ("ddp:killed:60:untied", "ddp:whole:60:untied"), 2)
    rows = [read_metrics(tmp_path / name / "logs" / METRICS_FILE) for name in ("killed", "whole")]
    for mine, theirs in zip(*rows, strict=True):
        assert all(mine[key] == theirs[key] for key in theirs if key not in TIMING_KEYS)
    a, b = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("killed", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)
