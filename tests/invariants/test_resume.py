"""A run killed with SIGKILL at any moment and started again ends bitwise equal to one that was never killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("training_worker.py")


def run_kills(folder: Path, seed: int, random_kills: int, call_kills: int) -> dict[str, int]:
    """Real processes, really killed; the worker compares weights, optimizer, random numbers, counters and losses."""
    command = [sys.executable, str(WORKER), "kills", str(folder), *map(str, (seed, random_kills, call_kills))]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-6000:]
    print(result.stdout)
    report: dict[str, int] = json.loads(result.stdout)
    assert report["rows"] == 24
    return report


def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(tmp_path: Path) -> None:
    report = run_kills(tmp_path, seed=1, random_kills=3, call_kills=5)
    assert report["trials"] == 8
    assert report["killed"] >= 5, "every trial of the second kind is killed at least once"
    assert report["resumed"] >= 3


@pytest.mark.slow
def test_fifty_trials(tmp_path: Path) -> None:
    report = run_kills(tmp_path, seed=2, random_kills=25, call_kills=25)
    assert report["killed"] >= 25
    assert report["resumed"] >= 20
