"""What a stage uses of the machine: its rank under torchrun, the lock on its folder, raw files, time and energy."""

import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundup.base.errors import UserError

LOCK = ".lock"
WATTS_PER_BUSY_CORE = 10.0
WATTS_PER_RANK_ON_GPU = 400.0


@dataclass(frozen=True)
class Rank:
    """This process among those that torchrun started; alone, it is rank 0 of 1."""

    rank: int
    world_size: int

    @staticmethod
    def from_environment() -> "Rank":
        return Rank(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Hold a run's folder. The kernel lets go when the process ends, however it ends."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{out}: another groundup process ({file.read().strip() or 'unknown'}) is working in this folder",
                "wait for it to end, or give this run a folder of its own with --out",
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()}\n")
        file.flush()
        yield


def describe_raw_input(path: Path) -> dict[str, Any]:
    """Path, number of files, bytes, and a digest of every file's name, size and modification time.

    Choice: not the content, so that a terabyte of text is checked in seconds; a file that is rewritten in place with
    the same size and the same time goes unnoticed.
    """
    if path.is_dir():
        files = sorted(found for found in path.rglob("*") if found.is_file())
    else:
        files = [path]
    digest, total_bytes = hashlib.sha256(), 0
    for file in files:
        stat = file.stat()
        total_bytes += stat.st_size
        digest.update(f"{file.relative_to(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return {"path": str(path), "files": len(files), "bytes": total_bytes, "digest": digest.hexdigest()}


@dataclass(frozen=True)
class Cost:
    """Time and energy since a stage started."""

    wall: float
    cpu: float

    @staticmethod
    def start() -> "Cost":
        return Cost(time.monotonic(), _cpu_seconds())

    def so_far(self, world_size: int) -> dict[str, Any]:
        """Seconds, and an estimate of energy in kWh.

        Choice: like the paper, power times time, with no cooling, memory or idle power: each busy CPU core counts as
        10 W, each rank that used a GPU as 400 W (the cap of the paper's A100s). Time before a kill is not counted.
        """
        wall_seconds, cpu_seconds = time.monotonic() - self.wall, _cpu_seconds() - self.cpu
        gpu_seconds = wall_seconds * world_size if _uses_gpu() else 0.0
        joules = cpu_seconds * WATTS_PER_BUSY_CORE + gpu_seconds * WATTS_PER_RANK_ON_GPU
        return {
            "wall_seconds": round(wall_seconds, 3),
            "cpu_seconds": round(cpu_seconds, 3),
            "energy_kwh_estimate": round(joules / 3.6e6, 9),
        }


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _uses_gpu() -> bool:
    torch = sys.modules.get("torch")  # a stage that never imported torch used no GPU
    return torch is not None and bool(torch.cuda.is_available() and torch.cuda.is_initialized())
