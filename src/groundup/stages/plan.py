"""What a run will cost before it runs: parameters, FLOPs, memory, disk and time of each stage.

Everything is arithmetic on the recipe but for the rates, which a short calibration measures on this machine. What is
assumed is said in a stage's notes.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from groundup.base.artifacts import Artifact
from groundup.base.progress import console
from groundup.data.curate import CurateConfig
from groundup.data.dialogues import read_dialogues
from groundup.data.packages import archive_folder
from groundup.data.readers import source_bytes
from groundup.data.refusals import refused_sources
from groundup.data.sources import REFUSALS, find_source, get_source, is_named, package_of
from groundup.model.attention import MAX_KEPT_TOKENS
from groundup.model.checkpoint import open_checkpoint
from groundup.model.config import ModelConfig, flops_per_token, num_parameters
from groundup.model.weights.hf_config import read_hf_config
from groundup.stages.calibrate import ASSUMED_UTILISATION, Machine, free_disk_bytes
from groundup.stages.collect import CollectConfig
from groundup.stages.dpo import DPOConfig
from groundup.stages.evaluate import EvaluateConfig
from groundup.stages.import_model import ImportConfig
from groundup.stages.pipeline import Pipeline, named_inputs, work_folder
from groundup.stages.plan_table import StagePlan, notes, plan_table, short_number
from groundup.stages.ppo import PPOConfig
from groundup.stages.pretrain import PretrainConfig
from groundup.stages.prompts import PromptsConfig
from groundup.stages.rejection import RejectionConfig
from groundup.stages.report import ReportConfig
from groundup.stages.reward import RewardConfig
from groundup.stages.sft import SFTConfig
from groundup.stages.shards import ShardsConfig
from groundup.stages.table import Stage
from groundup.stages.tokenizer import TokenizerConfig
from groundup.stages.tune import TuneConfig
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
BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2}
IMPORT_BYTES_PER_SECOND = 100e6
"""A model read, checked and written: SmolLM2's 270 MB take 2 s, or 10 s when its package is unpacked first."""
DECODE_UTILISATION = 0.15
"""Share of the matmul rate that decoding in batches reaches (docs/benchmarks.md)."""
DECODE_PARAMETERS_PER_SECOND = 4e9
"""Weights read a second while sampling; about 16 GB/s."""


def bytes_per_token(vocab_size: int) -> float:
    """English text in UTF-8 per token of a BPE vocabulary: 2.0 at 512, 3.1 at 4,096, 4.2 at 32,000."""
    return 0.37 * math.log2(vocab_size) - 1.3


def training_memory_bytes(model: ModelConfig, train: TrainConfig, device_type: str) -> float:
    """Weights, gradients, optimizer state and the activations of one micro batch, on one device alone.

    Choice: activations are counted at two bytes, with every matrix product's input and output kept (within 15% of what
    eager training keeps on a CPU, where attention's shares of short rows come on top); with activation checkpointing
    only the blocks' inputs and one block's inside.
    """
    heads = (model.n_heads + 2 * model.n_kv_heads) * model.head_dim
    inside = 2 * (8 * model.dim + 3 * heads + 4 * model.ffn_dim)
    if device_type == "cpu" and train.seq_len <= MAX_KEPT_TOKENS:
        inside += model.n_heads * train.seq_len
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
        self.saved_bytes = 2
        self.prompts: int | None = None
        """Of the training part."""
        self.held_out_prompts: int | None = None
        self.comparisons = 0
        self.winners = 0
        self.response_tokens = 128
        """Of a prompt with its response, assumed."""
        self._unfinished: set[str] = set()
        self._estimates: dict[str, Callable[[StagePlan, Any, Artifact | None], None]] = {
            "curate": self._curate, "tokenizer": self._tokenizer, "shards": self._shards, "pretrain": self._pretrain,
            "import": self._import, "sft_v1": self._sft, "sft_v2": self._sft, "report": self._report,
            "prompts": self._prompts, "collect": self._collect, "reward_helpful": self._reward,
            "reward_safety": self._reward, "rejection": self._rejection, "tune": self._tune, "dpo": self._dpo,
            "ppo": self._ppo, "evaluate": self._evaluate,
        }  # fmt: skip

    def plan(self, stages: Sequence[Stage]) -> list[StagePlan]:
        return [self._row(stage) for stage in stages]

    def _row(self, stage: Stage) -> StagePlan:
        made_from = set(self.pipeline.input_names(stage).values())
        is_stale = bool(made_from & self._unfinished) or (bool(stage.takes) and bool(self._unfinished))
        missing = [path for path in named_inputs(stage.load(), self.pipeline.config(stage)) if not path.exists()]
        is_stale |= bool(missing)
        artifact = None if is_stale else self.pipeline.finished(stage)
        name = stage.key if stage.round is None else f"{stage.key} {stage.round}"
        row = StagePlan(name, stage.artifact, "finished" if artifact else "to run")
        if artifact is None:
            if not is_stale and self._was_begun(stage):
                row.state = "to go on"
            self._unfinished.add(stage.artifact)
        row.notes += [f"{path} is not there yet" for path in missing]
        self._estimates[stage.key](row, self.pipeline.config(stage), artifact)
        if artifact is not None:
            row.seconds = 0.0
            row.disk_bytes = float(sum(entry["bytes"] for entry in artifact.manifest["files"].values()))
        elif row.memory_bytes is not None and row.memory_bytes > self.machine.memory_bytes:
            row.notes.append(self._too_large(row))
        return row

    def _was_begun(self, stage: Stage) -> bool:
        return work_folder(self.pipeline.out, stage, self.pipeline.fingerprint(stage)).exists()

    def _too_large(self, row: StagePlan) -> str:
        assert row.memory_bytes is not None
        have = f"this machine has {self.machine.memory_bytes / 1e9:,.1f} GB free ({self.machine.name})"
        note = f"does not fit here: needs {row.memory_bytes / 1e9:,.1f} GB, {have}"
        if row.flops is None or row.parameters is None:
            return note
        gpus = math.ceil(row.parameters * STATE_BYTES / (0.9 * GPU_BYTES))
        return f"{note}; with torchrun and parallel: fsdp, weights and optimizer need {gpus} or more GPUs of 80 GB"

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

    def _pretrain(self, row: StagePlan, config: PretrainConfig, artifact: Artifact | None) -> None:
        if self.vocab_size is None:
            row.notes.append("vocabulary size unknown: the recipe has no tokenizer section")
            return
        self.model = config.model.resolve(self.vocab_size, config.seq_len)
        self._training(row, config, self.corpus_tokens, BYTES_OF_DTYPE[config.save_dtype])
        if self.corpus_tokens and row.tokens and row.tokens > 4 * self.corpus_tokens:
            row.notes.append(f"reads the corpus {row.tokens / self.corpus_tokens:.1f} times")

    def _import(self, row: StagePlan, config: ImportConfig, artifact: Artifact | None) -> None:
        self.model = _config_of(config.source) if artifact is None else read_hf_config(artifact.file("config.json"))
        if self.model is None:
            row.notes.append(f"shape unknown before {config.source} is fetched")
            return
        row.parameters = num_parameters(self.model)
        row.disk_bytes = float(row.parameters * BYTES_OF_DTYPE[config.dtype])
        row.memory_bytes = PROCESS_BYTES + row.parameters * (BYTES_OF_DTYPE["float32"] + BYTES_OF_DTYPE[config.dtype])
        row.seconds = 5 + row.disk_bytes / IMPORT_BYTES_PER_SECOND

    def _sft(self, row: StagePlan, config: SFTConfig, artifact: Artifact | None) -> None:
        sizes = [_dialogue_bytes(source) for source in config.dialogues]
        unknown = [source for source, size in zip(config.dialogues, sizes, strict=True) if size is None]
        if config.steps is None and unknown:
            row.notes.append(f"size unknown before it is fetched or read: {', '.join(unknown)}")
        if self.model is None:
            row.notes.append("the model's shape is unknown")
            return
        dialogue_tokens = None
        if not unknown:
            dialogue_tokens = sum(size or 0 for size in sizes) / bytes_per_token(self.model.vocab_size)
        self._training(row, config, dialogue_tokens, BYTES_OF_DTYPE[config.save_dtype])

    def _training(self, row: StagePlan, train: TrainConfig, epoch_tokens: float | None, saved_bytes: int) -> None:
        assert self.model is not None
        self.saved_bytes = saved_bytes
        row.parameters = num_parameters(self.model)
        row.memory_bytes = training_memory_bytes(self.model, train, self.machine.device.type)
        row.disk_bytes = row.parameters * (CHECKPOINT_BYTES * (train.keep_checkpoints + 1) + saved_bytes)
        step_tokens = train.batch_rows * train.seq_len
        if train.steps is None and epoch_tokens is None:
            return
        steps = train.total_steps(math.ceil((epoch_tokens or 0) / step_tokens))
        row.tokens = float(steps * step_tokens)
        row.flops = row.tokens * flops_per_token(self.model, train.seq_len)
        if row.state == "finished":
            return
        fits = row.memory_bytes < self.machine.memory_bytes
        rate = self.machine.training_rate(self.model, train, measure=self.measure and fits)
        row.seconds = row.tokens / rate.tokens_per_second
        how = "measured" if rate.is_measured else f"assumed: {ASSUMED_UTILISATION:.0%} of this machine's matmul rate"
        row.notes.append(
            f"{steps:,} steps of {step_tokens:,} tokens; {short_number(rate.tokens_per_second)} tokens/s ({how})"
        )

    def _prompts(self, row: StagePlan, config: PromptsConfig, artifact: Artifact | None) -> None:
        row.memory_bytes, row.seconds = PROCESS_BYTES, 10.0
        if artifact is not None:
            self.prompts = artifact.metrics["train"]["prompts"]
            self.held_out_prompts = artifact.metrics["held_out"]["prompts"]

    def _collect(self, row: StagePlan, config: CollectConfig, artifact: Artifact | None) -> None:
        drawn = (config.helpfulness, config.safety)
        self.comparisons += sum(self.prompts or 0 if count is None else count for count in drawn)
        if config.judge != "import":
            self._sampling(row, 2 * self.comparisons, config.max_new_tokens, models=2)

    def _reward(self, row: StagePlan, config: RewardConfig, artifact: Artifact | None) -> None:
        self._on_comparisons(row, config)

    def _dpo(self, row: StagePlan, config: DPOConfig, artifact: Artifact | None) -> None:
        self._on_comparisons(row, config)

    def _on_comparisons(self, row: StagePlan, config: RewardConfig | DPOConfig) -> None:
        if self.model is None:
            row.notes.append("the model's shape is unknown")
            return
        pairs_a_row = max(1, config.seq_len // (2 * self.response_tokens))
        rows = config.model_copy(update={"batch_rows": math.ceil(config.batch_rows / pairs_a_row)})
        row.notes.append(f"{self.comparisons:,} comparisons of 2 x {self.response_tokens} tokens assumed")
        self._training(row, rows, 2.0 * self.comparisons * self.response_tokens, BYTES_OF_DTYPE[config.save_dtype])

    def _rejection(self, row: StagePlan, config: RejectionConfig, artifact: Artifact | None) -> None:
        prompts = self.prompts if config.num_prompts is None else config.num_prompts
        if prompts is None:
            row.notes.append("the number of prompts is unknown before they are read")
            return
        tried = len(config.temperatures) * config.sweep_prompts if len(config.temperatures) > 1 else 0
        self.winners += prompts
        self._sampling(row, (prompts + tried) * config.num_samples, config.max_new_tokens, models=3)

    def _tune(self, row: StagePlan, config: TuneConfig, artifact: Artifact | None) -> None:
        if self.model is None:
            row.notes.append("the model's shape is unknown")
            return
        dialogues = self.winners * (1 + (config.dialogues_per_winner if config.dialogues else 0))
        self._training(row, config, dialogues * self.response_tokens, BYTES_OF_DTYPE[config.save_dtype])

    def _ppo(self, row: StagePlan, config: PPOConfig, artifact: Artifact | None) -> None:
        responses = config.iterations * config.batch_rows
        self._sampling(row, responses, config.max_new_tokens, models=5)
        if self.model is None or row.seconds is None or row.tokens is None:
            return
        row.notes.append(f"at most {config.iterations} iterations; it stops earlier when held-out prompts gain nothing")
        # Policy and value model learn (three forward passes' worth each); four models only read.
        passes = row.tokens * num_parameters(self.model) * 2 * (2 * 3 + 4)
        row.flops = (row.flops or 0) + passes
        row.seconds += passes / (ASSUMED_UTILISATION * max(self.machine.matmul_flops.values()))
        state = STATE_BYTES if config.lora is None else BYTES_OF_DTYPE["float32"] / 5
        row.memory_bytes = PROCESS_BYTES + num_parameters(self.model) * (2 * state + 3 * BYTES_OF_DTYPE["float32"])

    def _evaluate(self, row: StagePlan, config: EvaluateConfig, artifact: Artifact | None) -> None:
        held_out = self.held_out_prompts
        if held_out is None:
            row.notes.append("the number of held-out prompts is unknown before they are read")
            return
        versions = sum(stage.kind == "model" and stage.artifact != "base" for stage in self.pipeline.stages)
        asked = held_out if config.max_prompts is None else min(held_out, 2 * config.max_prompts)
        self._sampling(row, versions * asked * config.samples_per_prompt, config.max_new_tokens, models=1)

    def _sampling(self, row: StagePlan, responses: float, max_new_tokens: int, *, models: int) -> None:
        """Responses drawn in batches; half of the longest length is assumed to be used."""
        if self.model is None:
            row.notes.append("the model's shape is unknown")
            return
        parameters = num_parameters(self.model)
        row.parameters = parameters
        row.tokens = responses * max_new_tokens / 2
        row.flops = 2.0 * row.tokens * parameters
        row.memory_bytes = PROCESS_BYTES + models * 1.5 * BYTES_OF_DTYPE["float32"] * parameters
        row.seconds = 5 + row.flops / (DECODE_UTILISATION * max(self.machine.matmul_flops.values()))
        row.notes.append(f"{short_number(responses)} responses of {max_new_tokens // 2} tokens assumed")

    def _report(self, row: StagePlan, config: ReportConfig, artifact: Artifact | None) -> None:
        row.disk_bytes, row.seconds = 1e6, 5.0
        if self.model is not None and config.prompts:
            tokens = len(config.prompts) * config.max_new_tokens
            row.memory_bytes = PROCESS_BYTES + 1.5 * self.saved_bytes * num_parameters(self.model)
            row.seconds += tokens * num_parameters(self.model) / DECODE_PARAMETERS_PER_SECOND


def _config_of(model: str) -> ModelConfig | None:
    """The shape of a model to import; None for a named one that has not been fetched yet."""
    path = Path(model).expanduser()
    if not path.exists():
        entry = find_source(model)
        if entry is None or not (archive_folder() / package_of(entry).archive).exists():
            return None
        path = get_source(model)
    return open_checkpoint(path)[0].config


def _dialogue_bytes(source: str) -> int | None:
    """Size of a source of dialogues; None for a named source that has not been fetched yet, and for a missing path."""
    if Path(source).exists() or not is_named(source):
        return source_bytes(source)
    entries = map(find_source, refused_sources(source) if source.startswith(REFUSALS) else [source])
    if not all(entry is None or (archive_folder() / package_of(entry).archive).exists() for entry in entries):
        return None
    return sum(len(message.content) for dialogue in read_dialogues(source) for message in dialogue.messages)


def show_plan(pipeline: Pipeline, *, as_json: bool) -> None:
    """The whole plan on standard output."""
    machine = Machine()
    rows = Planner(pipeline, machine, measure=True).plan(pipeline.select(None))
    disk_free = free_disk_bytes(pipeline.out)
    if as_json:
        facts = {
            "machine": {
                "name": machine.name, "memory_bytes": machine.memory_bytes, "disk_free_bytes": disk_free,
                "matmul_flops_per_second": machine.matmul_flops,
            },
            "stages": [dataclasses.asdict(row) for row in rows],
        }  # fmt: skip
        print(json.dumps(facts, indent=2))
        return
    rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in machine.matmul_flops.items())
    out = Console()
    out.print(
        f"{machine.name}, {machine.memory_bytes / 1e9:.1f} GB of memory free, {disk_free / 1e9:,.1f} GB of disk free; "
        f"one large matmul: {rates}",
        highlight=False,
        soft_wrap=True,
    )
    out.print(plan_table(rows, detailed=True))
    for line in notes(rows):
        out.print(line, highlight=False, soft_wrap=True)
    needed = sum(row.disk_bytes or 0 for row in rows if row.state != "finished")
    if needed > disk_free:
        out.print(
            f"warning: {needed / 1e9:,.1f} GB of disk are needed, {disk_free / 1e9:,.1f} GB are free at {pipeline.out}"
        )


def show_short_plan(pipeline: Pipeline, stages: Sequence[Stage]) -> None:
    """What `run` is about to do, on standard error; rates come from one matrix product, so it takes a second."""
    rows = Planner(pipeline, Machine(), measure=False).plan(stages)
    console.print(plan_table(rows, detailed=False))
