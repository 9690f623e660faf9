"""Stage `collect`: prompts and one or two chat models -> graded comparisons, a batch each round."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field, field_validator, model_validator

from groundup.align.collect import (
    VARIANTS,
    CollectReport,
    Request,
    Sampled,
    Sampling,
    Variant,
    count_comparisons,
    draw_slice,
    judge_pairs,
    make_pairs,
    plan_requests,
    prompt_fault,
    sample_responses,
)
from groundup.align.durable import DurableLines
from groundup.align.human import RATINGS_FILE, TASKS, HumanJudge
from groundup.align.judges import Judge
from groundup.align.llm_judge import LLMJudge, LLMJudgeConfig
from groundup.align.rubric import RubricJudge
from groundup.base.artifacts import Artifact
from groundup.base.config import Config
from groundup.base.errors import UserError
from groundup.base.files import write_json
from groundup.base.progress import say
from groundup.base.records import Comparison, Prompt, read_jsonl
from groundup.base.seeds import derive_seed
from groundup.data.comparisons import (
    HELD_OUT_FILE,
    TRAIN_FILE,
    ComparisonReport,
    read_comparisons,
    write_comparisons,
)
from groundup.data.sources import find_source
from groundup.data.splits import split_held_out
from groundup.infer.engine import Engine
from groundup.infer.quantize import SamplingWeights, sampling_weights
from groundup.model.checkpoint import load_checkpoint
from groundup.model.weights.hf import CONFIG
from groundup.model.weights.hf_config import read_hf_config
from groundup.stages.job import Job
from groundup.text.chat import ChatFormat, load_chat_format
from groundup.text.tokenizer import load_tokenizer

VERSION = 2
REPORT_FILE = "report.json"
ANNOTATION = "annotation"
D = TypeVar("D", Prompt, Comparison)


class CollectConfig(Config):
    """Collection of comparisons.

    Source: section 3.2.1: two model variants, varied temperature, four ratings, a safety label, batches, a held-out
    part of each. Choice: the paper gives neither temperatures nor lengths.
    """

    round: int = Field(default=1, ge=1, description="number of the batch; the pipeline sets it")
    judge: Literal["rubric", "llm", "human", "import"] = Field(
        default="rubric",
        description="rules, a language model behind an endpoint, people, or comparisons made elsewhere",
    )
    helpfulness: int | None = Field(
        default=1000, ge=0, description="prompts of this criterion that a round draws (import: comparisons); null: all"
    )
    safety: int | None = Field(default=1000, ge=0, description="the same for safety")
    temperatures: tuple[float, ...] = Field(
        default=(0.7, 1.0, 1.3), min_length=1, description="each pair draws two of them"
    )
    top_p: float = Field(default=1.0, gt=0, le=1, description="draw from the smallest set of tokens so probable")
    max_new_tokens: int = Field(
        default=256, gt=0, description="longest response; prompts that leave less room in the context are dropped"
    )
    weights: SamplingWeights = Field(
        default="auto", description="form of the models for sampling; auto: bf16 where the machine computes in it"
    )
    max_slots: int = Field(default=128, gt=0, description="responses generated at a time")
    chunk_responses: int = Field(default=256, gt=0, description="responses between two savings to the disk")
    held_out_fraction: float = Field(default=0.1, ge=0, lt=1, description="share of the prompts kept for testing")
    prompts_seed: int = Field(
        default=0, description="order in which rounds draw prompts, and which are held out; the same in all rounds"
    )
    bad_words: Path | None = Field(
        default=None, description="rubric: file of further bad words, one a line; null: the built-in ones alone"
    )
    llm: LLMJudgeConfig | None = Field(default=None, description="the endpoint of the judge llm")
    annotation_folder: Path | None = Field(
        default=None, description="human: where tasks and ratings are exchanged; null: in the stage's work folder"
    )
    comparisons: tuple[str, ...] = Field(
        default=(), description="import: files, folders, or names of `groundup data list`; one or a list"
    )
    format: str | None = Field(default=None, description="import: format of the files; null: told from their records")

    @field_validator("comparisons", mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("temperatures")
    @classmethod
    def _not_negative(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if min(value) < 0 or len(set(value)) < len(value):
            raise ValueError("temperatures are different numbers, 0 or more")
        return value

    @model_validator(mode="after")
    def _complete(self) -> "CollectConfig":
        if self.judge == "llm" and self.llm is None:
            raise ValueError("judge llm needs the section llm (url, model)")
        if self.judge == "import" and not self.comparisons:
            raise ValueError("judge import needs comparisons: files or names")
        if self.helpfulness == 0 and self.safety == 0:
            raise ValueError("helpfulness and safety are both 0: there is nothing to collect")
        return self


@dataclass(frozen=True)
class _Variant:
    """A model artifact, without its weights."""

    path: Path
    name: str
    chat: ChatFormat
    max_positions: int

    @staticmethod
    def open(artifact: Artifact) -> "_Variant":
        chat = load_chat_format(artifact.path, load_tokenizer(artifact.path))
        max_positions = read_hf_config(artifact.file(CONFIG)).max_positions
        return _Variant(artifact.path, f"{artifact.path.name}@{artifact.id[:12]}", chat, max_positions)


def raw_inputs(config: CollectConfig) -> list[Path]:
    """The sources that are not names of the catalogue, and the list of bad words."""
    sources = config.comparisons if config.judge == "import" else ()
    files = [Path(source) for source in sources if Path(source).exists() or find_source(source) is None]
    return [*files, *([config.bad_words] if config.bad_words is not None else [])]


def run(config: CollectConfig, job: Job) -> dict[str, Any]:
    """Collect a batch; metrics count comparisons by criterion, rating and safety label, and all that was dropped."""
    if config.judge == "import":
        comparisons, metrics = _import(config, job)
    else:
        comparisons, metrics = _collect(config, job, _judge(config, job))
    if not comparisons:
        raise UserError(
            f"{job.name}: not one comparison; counts: {metrics}", "draw more prompts, or mend what drops them"
        )
    # By what is asked, so that a prompt that is drawn again in a later round stays on its side.
    train, held_out = split_held_out(comparisons, config.held_out_fraction, config.prompts_seed, _asked)
    write_comparisons(job.out / TRAIN_FILE, train)
    write_comparisons(job.out / HELD_OUT_FILE, held_out)
    counts = {"train": len(train), "held_out": len(held_out), **count_comparisons(comparisons)}
    metrics = {"round": config.round, "judge": config.judge, **counts, **metrics}
    write_json(job.out / REPORT_FILE, metrics)
    for key, value in metrics.items():
        say(f"{job.name}: {key}: {value}")
    return metrics


def _asked(comparison: Comparison) -> str:
    return "\n".join(f"{message.role}: {message.content}" for message in comparison.prompt)


def _judge(config: CollectConfig, job: Job) -> Judge:
    """Made before anything is generated, so that what is missing shows first."""
    if config.judge == "llm":
        assert config.llm is not None
        return LLMJudge(config.llm, job.work / "answers.jsonl")
    if config.judge == "human":
        return HumanJudge(_annotation_folder(config, job), config.round)
    return RubricJudge(config.bad_words)


def _annotation_folder(config: CollectConfig, job: Job) -> Path:
    return config.annotation_folder / job.name if config.annotation_folder else job.work / ANNOTATION


def _import(config: CollectConfig, job: Job) -> tuple[list[Comparison], dict[str, Any]]:
    read_report, report = ComparisonReport(), CollectReport()
    read = [c for source in config.comparisons for c in read_comparisons(source, read_report, config.format)]
    batch = [replace(comparison, batch=config.round) for comparison in _draw(config, job, read, report)]
    counts = {key: report.metrics()[key] for key in ("available", "drawn", "next_prompt")}
    return batch, {**counts, "read": read_report.metrics()}


def _draw(config: CollectConfig, job: Job, items: Sequence[D], report: CollectReport) -> list[D]:
    """The round's prompts or comparisons of each criterion: those that follow the ones of the previous round.

    Without a previous round's artifact, all rounds count as equally large.
    """
    previous = job.inputs.get("previous")
    everything: list[D] = []
    for criterion, count in (("helpfulness", config.helpfulness), ("safety", config.safety)):
        some = [item for item in items if item.criterion == criterion]
        seed = derive_seed(config.prompts_seed, criterion)
        size = len(some) if count is None else min(count, len(some))
        start = (config.round - 1) * size if previous is None else previous.metrics["next_prompt"][criterion]
        drawn = draw_slice(some, size, start, seed)
        report.available[criterion], report.drawn[criterion] = len(some), size
        report.next_prompt[criterion] = start + size
        if count is not None and size < count:
            say(f"{job.name}: {criterion} = {count}, but there are only {len(some)}")
        if start + size > len(some):
            say(f"{job.name}: {criterion}: earlier rounds drew all {len(some)}; this one draws some again")
        everything += drawn
    return everything


def _collect(config: CollectConfig, job: Job, judge: Judge) -> tuple[list[Comparison], dict[str, Any]]:
    report = CollectReport()
    variants = {role: _Variant.open(job.inputs[role]) for role in VARIANTS if role in job.inputs}
    pool = [Prompt.from_json(row) for row in read_jsonl(job.inputs["prompts"].file(TRAIN_FILE))]
    prompts = _usable(config, _draw(config, job, pool, report), variants, report)
    roles: list[Variant] = [*variants]
    sampling = Sampling(config.temperatures, config.top_p, config.max_new_tokens)
    requests = plan_requests(prompts, sampling, (roles[0], roles[-1]), job.seed)
    sampled: dict[Request, Sampled] = {}
    for role, variant in variants.items():
        own = [request for both in requests for request in both if request.variant == role]
        with DurableLines(job.work / f"responses-{role}.jsonl") as done:
            responses = sample_responses(
                partial(_open_engine, config, variant.path), variant.chat, prompts, own, sampling, done,
                chunk_responses=config.chunk_responses, title=f"{job.name}: responses of {variant.name}",
            )  # fmt: skip
        sampled |= zip(own, responses, strict=True)
    names = {role: variant.name for role, variant in variants.items()}
    pairs = make_pairs(prompts, requests, sampled, names, variants["model"].chat, report)
    comparisons = judge_pairs(pairs, judge, config.round, job.name, report)
    if config.judge == "human":
        for name in (TASKS, RATINGS_FILE):
            (job.out / ANNOTATION).mkdir(exist_ok=True)
            shutil.copyfile(_annotation_folder(config, job) / name, job.out / ANNOTATION / name)
    return comparisons, {"models": names, **report.metrics()}


def _usable(
    config: CollectConfig, prompts: list[Prompt], variants: Mapping[Variant, _Variant], report: CollectReport
) -> list[Prompt]:
    """The prompts that every variant can answer; the others are counted."""
    usable = []
    for prompt in prompts:
        faults = [
            prompt_fault(variant.chat, prompt, variant.max_positions - config.max_new_tokens)
            for variant in variants.values()
        ]
        fault = next((fault for fault in faults if fault is not None), None)
        if fault is None:
            usable.append(prompt)
        else:
            report.dropped[fault] += 1
    if not usable:
        raise UserError(
            f"collect: none of {len(prompts)} prompts drawn can be answered: {dict(report.dropped)}",
            f"max_new_tokens = {config.max_new_tokens} is taken from the models' contexts first; lower it",
        )
    return usable


def _open_engine(config: CollectConfig, path: Path) -> Engine:
    """The weights are in memory from now on, one variant's at a time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = load_checkpoint(path)
    model = checkpoint.model.to(device).eval()
    weights = sampling_weights(config.weights, device)
    return Engine(model, checkpoint.tokenizer, max_slots=config.max_slots, weights=weights)
