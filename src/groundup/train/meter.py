"""How fast, how well used, how much memory."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

TIMING_KEYS = ("seconds", "tokens_per_second", "matmul_share", "memory_gb")
"""Keys of a metrics row that differ between two runs of the same thing."""


@dataclass
class Meter:
    """Measures from its creation on; `seconds` starts at what earlier processes of the run took."""

    device: torch.device
    precision: str
    world_size: int
    flops_per_token: int
    seconds_before: float

    def __post_init__(self) -> None:
        self._started = self._last = time.monotonic()
        self._tokens = self._tokens_at_last = 0
        self._matmul_rate: float | None = None

    @property
    def seconds(self) -> float:
        """Wall time of the run, without the time between a kill and the restart."""
        return self.seconds_before + time.monotonic() - self._started

    def count(self, tokens: int) -> None:
        """Note that `tokens` tokens (all ranks together) went through a training step."""
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Rates since the last reading."""
        now = time.monotonic()
        rate = (self._tokens - self._tokens_at_last) / max(now - self._last, 1e-9)
        values = {
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(rate, 1),
            "memory_gb": round(peak_memory_bytes(self.device) / 1e9, 3),
        }
        # Short runs, tests above all, are not to spend their time on measuring the machine.
        if self._matmul_rate is None and now - self._started > 10:
            self._matmul_rate = matmul_flops_per_second(self.device, self.precision)
        if self._matmul_rate is not None:
            values["matmul_share"] = round(rate * self.flops_per_token / (self._matmul_rate * self.world_size), 4)
        self._last, self._tokens_at_last = time.monotonic(), self._tokens
        return values

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside (a checkpoint, an evaluation) out of the rate."""
        started = time.monotonic()
        yield
        self._last += time.monotonic() - started


def matmul_flops_per_second(device: torch.device, precision: str) -> float:
    """The best this device does on one large matrix product: what training speed is compared with.

    Choice: measured here instead of a data sheet's number, so that it holds for every machine.
    """
    size = 8192 if device.type == "cuda" else 2048
    matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(5):
        _synchronize(device)
        started = time.perf_counter()
        matrix @ matrix
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return float(2 * size**3 / best)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: the GPU's tensors, or the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
