"""The training loop of every stage."""

import contextlib
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from groundup.base.artifacts import LOGS
from groundup.base.errors import UserError
from groundup.base.memory import keep_freed_memory
from groundup.base.metrics import MetricsLog
from groundup.base.progress import Progress, say
from groundup.data.batches import BatchSource
from groundup.model.lora import has_adapters
from groundup.model.transformer import Transformer, checkpoint_blocks, compile_blocks
from groundup.train.checkpoint import Checkpoints, frozen_digest
from groundup.train.config import TrainConfig
from groundup.train.guard import StepGuard
from groundup.train.losses import LossFn
from groundup.train.meter import TIMING_KEYS, Meter
from groundup.train.optim import lr_at, make_optimizer, scale_and_clip
from groundup.train.parallel import Ranks, connect, is_sharded, reshard, shard_model
from groundup.train.step import StepSums, accumulate, seed_step

Evaluate = Callable[[Transformer, int], dict[str, float]]
Sample = Callable[[Transformer, int], str]
Precision = Literal["bf16", "fp32"]
CHECKPOINTS = "checkpoints"
COMPILING_PAYS_FLOPS = {"cpu": 2e13, "cuda": 2e16}
"""Arithmetic of one rank above which compiling pays: about three minutes of two CPU cores or of a large GPU. A fixed
number and not a timing, because compiled and eager code round differently and a resumed run must choose the same."""


@dataclass(frozen=True)
class FitResult:
    """What a run did from its first step on, however often it was interrupted."""

    steps: int
    skipped_steps: int
    tokens: int
    target_tokens: int
    seconds: float
    last_row: dict[str, float]
    """The numbers in the last row of the metrics log."""

    def summary(self) -> dict[str, float]:
        """What a manifest says about the run."""
        return {
            **{key: value for key, value in self.last_row.items() if key not in TIMING_KEYS},
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
            "tokens": self.tokens,
            "target_tokens": self.target_tokens,
            "train_seconds": self.seconds,
            "tokens_per_second": round(self.tokens / max(self.seconds, 1e-9), 1),
            "peak_memory_gb": self.last_row["memory_gb"],
        }


@dataclass
class _Done:
    """How far a run is; saved with every checkpoint."""

    step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    tokens: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    last_row: dict[str, float] = field(default_factory=dict)


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

    Under torchrun every rank calls this with the same arguments; where the model gets sharded it stays so
    (`parallel.unsharded`). `evaluate` and `sample` run on every rank, without gradients. Metrics go to `work/logs`
    (rank 0), checkpoints to `work/checkpoints`.

    Raises: `UserError` for a batch without targets, too many bad steps in a row, a full disk.
    """
    keep_freed_memory()
    run = _Run(model, batches, loss_fn, config, work, seed, name)
    with run.log_and_progress():
        for step in range(run.done.step, run.total_steps):
            row = run.take_step(step)
            run.finish_step(step + 1, row, run.call_back(step + 1, evaluate, sample))
    # So that what comes after draws the same numbers whether or not this process took the last step.
    seed_step(seed, run.total_steps, run.ranks.rank)
    return run.result()


class _Run:
    """What the steps of one call of `fit` share."""

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
        self.model, self.batches, self.loss_fn, self.config = model, batches, loss_fn, config
        self.work, self.seed, self.name = work, seed, name
        self.ranks = connect()
        self.total_steps = config.total_steps(batches.steps_per_epoch)
        self.precision = choose_precision(config.precision, self.ranks.device)
        prepare_model(model, config, self.ranks, self.precision, self.total_steps)
        self.optimizer = make_optimizer(model, config)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.checkpoints = Checkpoints(work / CHECKPOINTS, config.keep_checkpoints, self.ranks)
        self.identity = {**config.trajectory(self.total_steps), "seed": seed, "data": _first_batch_digest(batches)}
        if (frozen := frozen_digest(model)) is not None:
            self.identity["frozen"] = frozen
        self.done = self._restore()
        self.guard = StepGuard(config.spike_window, config.spike_sigmas, self.done.losses)
        flops = model.flops_per_token(config.seq_len)
        self.meter = Meter(self.ranks.device, self.precision, self.ranks.world_size, flops, self.done.seconds)
        self.last_checkpoint = time.monotonic()
        self.metrics: MetricsLog | None = None
        self.progress: Progress | None = None

    def _restore(self) -> _Done:
        state = self.checkpoints.load_newest(self.model, self.optimizer, self.identity)
        if state is None:
            return _Done()
        done = _Done(**state)
        if self.ranks.is_first:
            say(f"{self.name}: continuing after step {done.step} of {self.total_steps}")
        return done

    @contextlib.contextmanager
    def log_and_progress(self) -> Iterator[None]:
        """On rank 0, the metrics log (rows after the checkpoint are cut away; they come again) and the progress bar."""
        if not self.ranks.is_first:
            yield
            return
        self.metrics = MetricsLog(self.work / LOGS, self.done.step + 1)
        with contextlib.closing(self.metrics), Progress(self.name, self.total_steps, "steps", self.done.step) as bar:
            self.progress = bar
            yield

    def take_step(self, step: int) -> dict[str, Any]:
        """One optimizer step, or a refusal to take it; returns its row for the metrics log."""
        seed_step(self.seed, step, self.ranks.rank)
        micro_batches = self.batches.micro_batches(step, self.ranks.rank, self.ranks.world_size, self.config.micro_rows)
        sums = accumulate(
            self.model,
            micro_batches,
            self.loss_fn,
            self.parameters,
            self.ranks,
            self.precision,
            self._is_time_to_save(),
        )
        if sums.count == 0:
            raise UserError(
                f"{self.name}: the batch of step {step + 1} has no target token, so there is nothing to learn from it",
                "look at it with `groundup show-batch`; are all responses cut away by seq_len?",
            )
        lr = lr_at(step, self.total_steps, self.config)
        grad_norm = scale_and_clip(self.parameters, sums.count, self.config.clip)
        loss = sums.loss_sum / sums.count
        refusal = self.guard.refuse(loss, grad_norm)
        if refusal is None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self._count(step, sums, refusal)
        means = {key.replace("num_", "share_"): value / sums.count for key, value in sums.metrics.items()}
        row = {"loss": loss, "lr": lr, "grad_norm": grad_norm, **means}
        row = {key: value for key, value in row.items() if math.isfinite(value)}
        return {**row, "tokens": self.done.tokens, "target_tokens": self.done.target_tokens, "skipped": refusal}

    def _count(self, step: int, sums: StepSums, refusal: str | None) -> None:
        done = self.done
        done.step = step + 1
        done.tokens += sums.tokens
        done.target_tokens += int(sums.count)
        self.meter.count(sums.tokens)
        self.save_now = sums.flags > 0
        if refusal is None:
            done.skipped_in_a_row = 0
            return
        done.skipped_steps += 1
        done.skipped_in_a_row += 1
        where = self._where(sums.bad_micro_batches)
        if where or self.ranks.is_first:
            say(f"{self.name}: step {step + 1} skipped: {refusal}{where}")
        if done.skipped_in_a_row >= self.config.max_skipped_in_a_row:
            raise UserError(
                f"{self.name}: {done.skipped_in_a_row} steps in a row were skipped, the last (step {step + 1}) because "
                f"{refusal}{where}",
                "lower lr, lengthen the warm-up or set precision=fp32; `groundup show-batch` shows the rows",
            )

    def _where(self, bad_micro_batches: list[int]) -> str:
        """Names the micro batches whose loss is not finite."""
        if not bad_micro_batches:
            return ""
        numbers = ", ".join(str(index + 1) for index in bad_micro_batches)
        return f" in micro batch {numbers} of rank {self.ranks.rank} ({self.config.micro_rows} rows each)"

    def call_back(self, step: int, evaluate: Evaluate | None, sample: Sample | None) -> dict[str, Any]:
        """The held-out loss and the sample text that are due after `step` steps."""
        row: dict[str, Any] = {}
        is_last = step == self.total_steps
        with torch.no_grad(), self.meter.paused():
            if evaluate is not None and (is_last or _is_due(step, self.config.evaluate_every_steps)):
                with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                    row |= evaluate(self.model, step)
            if sample is not None and (is_last or _is_due(step, self.config.sample_every_steps)):
                row["sample"] = sample(self.model, step)
                if self.ranks.is_first:
                    say(f"{self.name}, after step {step}: {row['sample']}")
        reshard(self.model)
        return row

    def finish_step(self, step: int, row: dict[str, Any], from_callbacks: dict[str, Any]) -> None:
        """Log the step if that is due or it has something special to say; write a checkpoint if one is due."""
        is_last = step == self.total_steps
        is_special = bool(from_callbacks) or row["skipped"] is not None
        row |= from_callbacks
        if is_last or is_special or _is_due(step, self.config.log_every_steps):
            row |= self.meter.read()
            self.done.last_row = {key: value for key, value in row.items() if isinstance(value, int | float)}
            if self.metrics is not None:
                self.metrics.log(step, row)
        if self.progress is not None:
            loss = f"loss {row['loss']:.4f}" if "loss" in row else "step skipped"
            rate = self.done.last_row.get("tokens_per_second", 0.0)
            self.progress.advance(1, f"{loss}  {rate:,.0f} tokens/s")
        if is_last or self.save_now or _is_due(step, self.config.checkpoint_every_steps):
            self._save(step)

    def _save(self, step: int) -> None:
        self.done.losses, self.done.seconds = self.guard.losses, round(self.meter.seconds, 3)
        if self.metrics is not None:
            self.metrics.sync()
        with self.meter.paused():
            self.checkpoints.save(self.model, self.optimizer, step, self.identity, asdict(self.done))
        self.last_checkpoint = time.monotonic()

    def _is_time_to_save(self) -> bool:
        """Asked on rank 0 only, whose answer all ranks get with the sums of the step."""
        minutes = self.config.checkpoint_every_minutes
        return self.ranks.is_first and minutes is not None and time.monotonic() - self.last_checkpoint > 60 * minutes

    def result(self) -> FitResult:
        done = self.done
        return FitResult(
            done.step, done.skipped_steps, done.tokens, done.target_tokens, round(self.meter.seconds, 3), done.last_row
        )


def choose_precision(wanted: Literal["auto", "bf16", "fp32"], device: torch.device) -> Precision:
    """`auto`: bf16 where the device multiplies bf16 matrices in hardware."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if any(capabilities.get(key) for key in ("avx512_bf16", "amx_bf16", "bf16")) else "fp32"


def prepare_model(
    model: Transformer, config: TrainConfig, ranks: Ranks, precision: Precision, total_steps: int
) -> None:
    """Move, checkpoint, compile and shard a model as the config and the machine ask for.

    Raises: `UserError` for a model with adapters and fsdp. Under `auto` such a model is not sharded: what is trained,
    and so added over the ranks, is small, and its base may be shared with other models.
    """
    if config.activation_checkpointing:
        checkpoint_blocks(model)
    if wants_compile(model, config, ranks, total_steps):
        compile_blocks(model)
    mode = config.parallel
    if mode == "auto":
        mode = "fsdp" if ranks.device.type == "cuda" and not has_adapters(model) else "ddp"
    if ranks.world_size > 1 and mode == "fsdp":
        if has_adapters(model):
            raise UserError("parallel = 'fsdp' cannot cut a base that models share", "with lora, use parallel=ddp")
        if not is_sharded(model):
            shard_model(model, ranks, precision)  # moves block by block: the whole may not fit on the device
    else:
        model.to(ranks.device)


def wants_compile(model: Transformer, config: TrainConfig, ranks: Ranks, total_steps: int) -> bool:
    """Whether the blocks run compiled; `auto` where the arithmetic is long enough and a C++ compiler is at hand."""
    if config.compile != "auto":
        return config.compile == "on"
    if ranks.device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "c++", "clang++"))):
        return False
    tokens = total_steps * config.batch_rows * config.seq_len / ranks.world_size
    return model.flops_per_token(config.seq_len) * tokens > COMPILING_PAYS_FLOPS[ranks.device.type]


def _is_due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0


def _first_batch_digest(batches: BatchSource) -> str:
    """Hex digest of the first global batch: other data, tokenizer, order or masking shows in it."""
    digest = hashlib.sha256()
    for batch in batches.micro_batches(0, 0, 1, batches.batch_rows):
        for tensor in (batch.tokens, batch.targets, batch.is_target):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
