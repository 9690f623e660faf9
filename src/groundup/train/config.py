"""How a model is trained; shared by every stage that trains."""

import math
from typing import Literal

from pydantic import Field, model_validator

from groundup.base.config import Config


class TrainConfig(Config):
    """Length, optimizer, precision and safety of a training run. Source: section 2.2 (pre-training), 3.1 (SFT)."""

    steps: int | None = Field(default=None, gt=0, description="optimizer steps; where given, epochs do not count")
    epochs: float | None = Field(default=None, gt=0, description="passes over the data; instead of steps")
    batch_rows: int = Field(
        default=64, gt=0, description="rows of one optimizer step, over all ranks and micro batches"
    )
    micro_rows: int = Field(default=8, gt=0, description="rows of one forward and backward pass on one rank")
    seq_len: int = Field(default=512, gt=1, description="tokens in a row")

    lr: float = Field(default=3e-4, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="shape of the learning rate after warm-up"
    )
    final_lr_fraction: float = Field(
        default=0.1, ge=0, le=1, description="learning rate of the last step over the peak"
    )
    warmup_steps: int | None = Field(
        default=None, ge=0, description="steps of linear warm-up; instead of warmup_fraction"
    )
    warmup_fraction: float = Field(default=0.03, ge=0, lt=1, description="share of all steps that warm up")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay of the gradient's mean")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="AdamW's decay of the gradient's square")
    eps: float = Field(default=1e-5, gt=0, description="added to AdamW's denominator")
    weight_decay: float = Field(default=0.1, ge=0, description="decoupled decay of the weight matrices")
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")

    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto",
        description="of the arithmetic; weights and optimizer stay float32. auto: bf16 where the machine has it",
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto", description="torch.compile of the blocks; auto: where the run is long enough to pay it back"
    )
    activation_checkpointing: bool = Field(
        default=False, description="compute activations twice instead of keeping them"
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto", description="how torchrun's ranks share the work; auto: fsdp on GPUs, ddp on CPUs"
    )

    checkpoint_every_steps: int | None = Field(default=None, gt=0, description="steps between checkpoints")
    checkpoint_every_minutes: float | None = Field(default=5.0, gt=0, description="minutes between checkpoints")
    keep_checkpoints: int = Field(
        default=2, gt=0, description="newest checkpoints kept; more than one survives a bad disk block"
    )
    log_every_steps: int = Field(default=1, gt=0, description="steps between rows of the metrics log")
    evaluate_every_steps: int | None = Field(
        default=None, gt=0, description="steps between held-out losses; the end has one"
    )
    sample_every_steps: int | None = Field(
        default=None, gt=0, description="steps between sample texts; the end has one"
    )

    spike_window: int = Field(default=128, ge=0, description="steps whose losses say what is usual; 0: no spike guard")
    spike_sigmas: float = Field(
        default=6.0, gt=0, description="standard deviations above the mean that make a loss a spike"
    )
    max_skipped_in_a_row: int = Field(
        default=5, gt=0, description="steps skipped one after another before the run stops"
    )

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if self.steps is None and self.epochs is None:
            raise ValueError("give steps or epochs")
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run. `steps` goes before `epochs`, so that one override is enough."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * steps_per_epoch))

    def trajectory(self, total_steps: int) -> dict[str, object]:
        """The values that decide what is learned; a checkpoint is only continued under the same ones."""
        names = (
            "batch_rows", "seq_len", "lr", "schedule", "final_lr_fraction", "warmup_steps", "warmup_fraction", "beta1",
            "beta2", "eps", "weight_decay", "clip", "precision", "spike_window", "spike_sigmas",
        )  # fmt: skip
        return {"total_steps": total_steps, **{name: getattr(self, name) for name in names}}
