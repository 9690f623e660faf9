"""How fast this machine is, measured in seconds, for planning."""

import os
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil
import torch

from groundup.data.batches import Batch
from groundup.model.config import ModelConfig, flops_per_token, num_parameters
from groundup.model.transformer import Transformer
from groundup.train.config import TrainConfig
from groundup.train.loop import choose_precision
from groundup.train.losses import lm_loss
from groundup.train.meter import matmul_flops_per_second
from groundup.train.optim import make_optimizer

MEASURED_BELOW_PARAMETERS = 200_000_000
MICRO_STEP_SECONDS = 6.0
ASSUMED_UTILISATION = 0.4
"""Share of the matmul rate that training reaches where it is not measured; the paper's runs reached 0.35 to 0.43."""


@dataclass(frozen=True)
class TrainingRate:
    """Tokens/s of training on this machine alone, and where the number comes from."""

    tokens_per_second: float
    is_measured: bool


class Machine:
    """One device and what it has; rates are measured when they are first asked for."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._measured: dict[tuple[ModelConfig, int], float] = {}

    @property
    def name(self) -> str:
        """For people: the GPU, or the number of cores."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{os.cpu_count()} CPU cores"

    @property
    def memory_bytes(self) -> int:
        """Of the device that trains: the GPU's, or the machine's that no other process uses now."""
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[1])
        return int(psutil.virtual_memory().available)

    @cached_property
    def matmul_flops(self) -> dict[str, float]:
        """FLOP/s of one large matrix product, by precision."""
        return {precision: matmul_flops_per_second(self.device, precision) for precision in ("bf16", "fp32")}

    def training_rate(self, model: ModelConfig, train: TrainConfig, *, measure: bool) -> TrainingRate:
        """Tokens/s of training: some real micro batches for small models, else a share of the matmul rate."""
        if measure and num_parameters(model) < MEASURED_BELOW_PARAMETERS:
            key = (model, train.seq_len)
            if key not in self._measured:
                self._measured[key] = self._measure_training(model, train)
            return TrainingRate(self._measured[key], is_measured=True)
        rate = self.matmul_flops[choose_precision(train.precision, self.device)]
        return TrainingRate(rate * ASSUMED_UTILISATION / flops_per_token(model, train.seq_len), is_measured=False)

    def _measure_training(self, model: ModelConfig, train: TrainConfig) -> float:
        """With as many rows of a micro batch as take about a second, so that a large one delays and fills nothing."""
        rate = self.matmul_flops[choose_precision(train.precision, self.device)] * ASSUMED_UTILISATION
        rows = int(rate / (flops_per_token(model, train.seq_len) * train.seq_len))
        return measure_training(model, train, self.device, max(1, min(rows, train.micro_rows, train.batch_rows)))


def free_disk_bytes(folder: Path) -> int:
    """What the file system of a folder (or of its nearest parent that exists) can still take."""
    while not folder.exists():
        folder = folder.absolute().parent
    return int(psutil.disk_usage(str(folder)).free)


def measure_training(config: ModelConfig, train: TrainConfig, device: torch.device, rows: int) -> float:
    """Tokens/s of optimizer steps on random tokens, `rows` rows to a micro batch, uncompiled."""
    precision = choose_precision(train.precision, device)
    model = Transformer(config).to(device)
    model.init_weights(0)
    optimizer = make_optimizer(model, train)
    tokens = torch.randint(config.vocab_size, (rows, train.seq_len + 1), device=device)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones_like(tokens[:, 1:], dtype=torch.bool))

    def micro_step() -> float:
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = lm_loss(model, batch).loss_sum
        loss.backward()  # type: ignore[no-untyped-call]
        loss.item()
        return time.perf_counter() - started

    started, durations = time.perf_counter(), [micro_step()]
    while len(durations) < 8 and time.perf_counter() - started < MICRO_STEP_SECONDS:
        durations.append(micro_step())
    update = time.perf_counter()
    optimizer.step()
    update = time.perf_counter() - update
    micro_seconds = min(durations)  # the first one also pays for warming up
    micros = max(1, train.batch_rows // rows)
    return rows * train.seq_len * micros / (micro_seconds * micros + update)
