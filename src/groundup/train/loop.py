"""The training loop of every stage."""

import contextlib
import hashlib
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from groundup.base.errors import UserError
from groundup.base.files import sha256_json
from groundup.base.metrics import MetricsLog
from groundup.base.progress import Progress, say
from groundup.base.seeds import derive_seed
from groundup.data.batches import Batch, BatchSource, micro_ranges
from groundup.model.config import flops_per_token
from groundup.model.transformer import Transformer, checkpoint_blocks, compile_blocks
from groundup.train.checkpoint import Checkpoints
from groundup.train.config import TrainConfig
from groundup.train.guard import StepGuard
from groundup.train.losses import LossFn
from groundup.train.meter import Meter
from groundup.train.optim import lr_at, make_optimizer, scale_and_clip
from groundup.train.parallel import Ranks, connect, is_sharded, shard_model, sum_gradients

Evaluate = Callable[[Transformer, int], dict[str, float]]
Sample = Callable[[Transformer, int], str]
LOGS = "logs"
CHECKPOINTS = "checkpoints"
COMPILE_PAYS_FLOPS = {"cpu": 3e13, "cuda": 2e16}
"""Training arithmetic above which compiling pays: about five minutes of a two-core laptop, three of a large GPU."""


@dataclass(frozen=True)
class FitResult:
    """What a run did, from its first step on, however often it was interrupted."""

    steps: int
    skipped_steps: int
    tokens: int
    target_tokens: int
    seconds: float
    metrics: dict[str, float]
    """The last row of the metrics log, without text."""


@dataclass
class _Done:
    """How far the run is; saved with every checkpoint."""

    step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    tokens: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Sums:
    """What the micro batches of all ranks add up to."""

    loss: float
    count: float
    tokens: int
    metrics: dict[str, float]
    wants_checkpoint: bool


def fit(
    model: Transformer,
    batches: BatchSource,
    loss_fn: LossFn,
    config: TrainConfig,
    work: Path,
    *,
    seed: int,
    name: str = "train",
    evaluate: Evaluate | None = None,
    sample: Sample | None = None,
) -> FitResult:
    """Train `model` in place and return what was done; continues from the newest checkpoint in `work`, if there is one.

    Under torchrun every rank calls this with the same arguments; where the model is sharded it stays so
    (`parallel.unsharded`). `evaluate` and `sample` run on every rank, without gradients. Only rank 0 writes: checkpoints
    below `work/checkpoints`, metrics below `work/logs`.

    Raises: `UserError` for a batch without targets, too many bad steps in a row, a full disk.
    """
    run = _Run(model, batches, loss_fn, config, work, seed, name)
    run.restore()
    with run.open_log(), run.progress:
        for step in range(run.done.step, run.total_steps):
            row = run.take_step(step)
            row |= run.call_back(step + 1, evaluate, sample)
            run.log(step + 1, row)
            run.checkpoint_if_due(step + 1)
    run.seed_step(run.total_steps)
    return run.result()


class _Run:
    """The parts that a run's steps share."""

    def __init__(
        self,
        model: Transformer,
        batches: BatchSource,
        loss_fn: LossFn,
        config: TrainConfig,
        work: Path,
        seed: int,
        name: str,
    ) -> None:
        self.model, self.batches, self.loss_fn, self.config, self.work, self.seed = (
            model, batches, loss_fn, config, work, seed
        )  # fmt: skip
        self.ranks = connect()
        self.total_steps = config.total_steps(batches.steps_per_epoch)
        self.precision = choose_precision(config.precision, self.ranks.device)
        prepare_model(model, config, self.ranks, self.precision, self.total_steps)
        self.optimizer = make_optimizer(model, config)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.checkpoints = Checkpoints(work / CHECKPOINTS, config.keep_checkpoints, self.ranks)
        self.identity = {**config.trajectory(self.total_steps), "seed": seed, "data": _fingerprint(batches)}
        self.done = _Done()
        self.guard = StepGuard(config.spike_window, config.spike_sigmas, [])
        self.last_row: dict[str, Any] = {}
        self.last_checkpoint = time.monotonic()
        self.name = name

    def restore(self) -> None:
        """Continue where the newest checkpoint ends."""
        state = self.checkpoints.load_newest(self.model, self.optimizer)
        if state is not None:
            different = sorted(key for key in self.identity if state["identity"].get(key) != self.identity[key])
            if different:
                raise UserError(
                    f"{self.checkpoints.folder}: made with another {', '.join(different)}",
                    "give this run another folder, or delete that one to begin again",
                )
            self.done, self.last_row = _Done(**state["done"]), state["last_row"]
            if self.ranks.is_first:
                say(f"{self.name}: continuing after step {self.done.step} of {self.total_steps}")
        self.guard = StepGuard(self.config.spike_window, self.config.spike_sigmas, self.done.losses)
        self.meter = Meter(
            self.ranks.device, self.precision, self.ranks.world_size,
            flops_per_token(self.model.config, self.config.seq_len), self.done.seconds,
        )  # fmt: skip
        self.progress = (
            Progress(self.name, self.total_steps, "steps", self.done.step)
            if self.ranks.is_first
            else contextlib.nullcontext()
        )

    @contextlib.contextmanager
    def open_log(self) -> Any:
        """Metrics of the steps from here on; rows after the checkpoint are cut away, they come again."""
        self.metrics = MetricsLog(self.work / LOGS, self.done.step + 1) if self.ranks.is_first else None
        try:
            yield
        finally:
            if self.metrics is not None:
                self.metrics.close()
