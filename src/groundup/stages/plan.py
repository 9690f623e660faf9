"""What a run will cost before it runs: parameters, FLOPs, memory, disk and time of each stage.

Everything is arithmetic on the recipe but for the rates, which a short calibration measures on this machine. What is
assumed is said in a stage's notes.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from groundup.base.artifacts import Artifact
from groundup.base.progress import console
from groundup.data.curate import CurateConfig
from groundup.data.readers import source_bytes
from groundup.model.config import ModelConfig, flops_per_token, num_parameters
from groundup.stages.calibrate import ASSUMED_UTILISATION, Machine, free_disk_bytes
from groundup.stages.import_model import ImportConfig
from groundup.stages.pipeline import Pipeline, Stage, work_folder
from groundup.stages.pretrain import PretrainConfig
from groundup.stages.report import ReportConfig
from groundup.stages.sft import SFTConfig
from groundup.stages.shards import ShardsConfig
from groundup.stages.tokenizer import TokenizerConfig
from groundup.train.config import TrainConfig

CURATE_BYTES_PER_SECOND = 1.5e6
"""Per core, with language, quality and near-duplicate checks."""
ENCODE_BYTES_PER_SECOND = 5e6
"""Per core."""
TOKENIZER_BYTES_PER_SECOND = 5e6
KEPT_FRACTION = 0.8
"""Of the raw text, after curation."""
PROCESS_BYTES = 0.6e9
"""Python, torch and buffers, before any model."""
STATE_BYTES = 16
"""A parameter in training: float32 weight and gradient, and AdamW's two moments."""
CHECKPOINT_BYTES = 12
"""A parameter in a training checkpoint: weight and moments."""
GPU_BYTES = 80e9


@dataclass
class StagePlan:
    """One row of the plan; None is what nobody can know before earlier stages have run."""

    stage: str
    artifact: str
    state: str
    parameters: int | None = None
    tokens: float | None = None
    flops: float | None = None
    memory_bytes: float | None = None
    disk_bytes: float | None = None
    seconds: float | None = None
    notes: list[str] = field(default_factory=list)


def bytes_per_token(vocab_size: int) -> float:
    """English text in UTF-8 per token of a BPE vocabulary: 2.0 at 512, 3.1 at 4,096, 4.2 at 32,000."""
    return 0.37 * math.log2(vocab_size) - 1.3


def training_memory_bytes(model: ModelConfig, train: TrainConfig) -> float:
    """Weights, gradients, optimizer state and the activations of one micro batch, on one device alone.

    Choice: activations are counted at two bytes, with every matrix product's input and output kept; with activation
    checkpointing only the blocks' inputs and one block's inside.
    """
    heads = (model.n_heads + 2 * model.n_kv_heads) * model.head_dim
    inside = 2 * (8 * model.dim + 3 * heads + 4 * model.ffn_dim)
    layers = model.n_layers * 4 * model.dim + inside if train.activation_checkpointing else model.n_layers * inside
    tokens = min(train.micro_rows, train.batch_rows) * train.seq_len
    return num_parameters(model) * STATE_BYTES + tokens * layers + PROCESS_BYTES


class Planner:
    """Goes through the stages in order and carries along what the ones so far will have made."""

    def __init__(self, pipeline: Pipeline, machine: Machine, *, measure: bool) -> None:
        self.pipeline, self.machine, self.measure = pipeline, machine, measure
        self.cores = os.cpu_count() or 1
        self.text_bytes: float | None = None
        self.vocab_size: int | None = None
        self.corpus_tokens: float | None = None
        self.model: ModelConfig | None = None
        self._unfinished: set[str] = set()
        self._estimates: dict[str, Callable[[StagePlan, Any, Artifact | None], None]] = {
            "curate": self._curate, "tokenizer": self._tokenizer, "shards": self._shards, "pretrain": self._pretrain,
            "import": self._import, "sft_v1": self._sft, "sft_v2": self._sft, "report": self._report,
        }  # fmt: skip

    def plan(self, stages: Sequence[Stage]) -> list[StagePlan]:
        return [self._row(stage) for stage in stages]

    def _row(self, stage: Stage) -> StagePlan:
        made_from = set(self.pipeline.input_names(stage).values()) if not stage.takes_all else set()
        is_stale = bool(made_from & self._unfinished) or (stage.takes_all and bool(self._unfinished))
        artifact = None if is_stale else self.pipeline.finished(stage)
        row = StagePlan(stage.key, stage.artifact, "finished" if artifact else "to run")
        if artifact is None:
            if not is_stale and self._was_begun(stage):
                row.state = "to go on"
            self._unfinished.add(stage.artifact)
        self._estimates[stage.key](row, self.pipeline.config(stage), artifact)
        if artifact is not None:
            row.seconds = 0.0
        elif row.memory_bytes is not None and row.memory_bytes > self.machine.memory_bytes:
            row.notes.append(self._too_large(row.memory_bytes))
        return row

    def _was_begun(self, stage: Stage) -> bool:
        return work_folder(self.pipeline.out, stage, self.pipeline.fingerprint(stage)).exists()

    def _too_large(self, memory_bytes: float) -> str:
        gpus = math.ceil(memory_bytes / (0.9 * GPU_BYTES))
        have = f"this machine has {self.machine.memory_bytes / 1e9:,.1f} GB free ({self.machine.name})"
        return (
            f"does not fit here: needs {memory_bytes / 1e9:,.1f} GB, {have}; with torchrun and parallel: fsdp it spreads "
            f"over {gpus} or more GPUs of 80 GB"
        )

    def _curate(self, row: StagePlan, config: CurateConfig, artifact: Artifact | None) -> None:
        row.memory_bytes = PROCESS_BYTES
        if artifact is not None:
            self.text_bytes = float(artifact.metrics["train"]["characters"])
            return
        sizes = [(entry, source_bytes(entry.source)) for entry in config.sources]
        unknown = [entry.source for entry, size in sizes if size is None]
        if unknown:
            row.notes.append(f"size unknown before it is read: {', '.join(unknown)}")
            return
        raw = sum(size or 0 for _, size in sizes)
        self.text_bytes = KEPT_FRACTION * sum((size or 0) * entry.weight for entry, size in sizes)
        row.notes.append(f"{raw / 1e6:,.1f} MB of raw text; {KEPT_FRACTION:.0%} of it assumed to be kept")
        row.memory_bytes += 0.1 * raw
        row.disk_bytes = 0.4 * self.text_bytes
        row.seconds = raw / (CURATE_BYTES_PER_SECOND * self.cores)

    def _tokenizer(self, row: StagePlan, config: TokenizerConfig, artifact: Artifact | None) -> None:
        self.vocab_size = config.vocab_size
        row.disk_bytes = 80.0 * config.vocab_size
        if artifact is not None:
            self.vocab_size = int(artifact.metrics["vocab_size"])
        elif config.source is not None:
            row.seconds = 1.0
            row.notes.append(f"taken from {config.source}; {config.vocab_size} pieces assumed")
        elif self.text_bytes is not None:
            sample = min(self.text_bytes, config.sample_chars)
            row.memory_bytes = PROCESS_BYTES + 10 * sample
            row.seconds = 1 + sample / TOKENIZER_BYTES_PER_SECOND

    def _shards(self, row: StagePlan, config: ShardsConfig, artifact: Artifact | None) -> None:
        row.memory_bytes = PROCESS_BYTES
        if artifact is not None:
            self.corpus_tokens = float(artifact.metrics["train"]["tokens"])
        elif self.text_bytes is not None and self.vocab_size is not None:
            self.corpus_tokens = self.text_bytes / bytes_per_token(self.vocab_size)
            row.seconds = 1 + self.text_bytes / (ENCODE_BYTES_PER_SECOND * self.cores)
            row.notes.append(f"{bytes_per_token(self.vocab_size):.1f} bytes per token assumed")
        if self.corpus_tokens is not None and self.vocab_size is not None:
            row.tokens = self.corpus_tokens
            row.disk_bytes = self.corpus_tokens * (2 if self.vocab_size <= 1 << 16 else 4)
