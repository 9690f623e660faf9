"""Stage `ppo`: a chat model, reward models and prompts -> a model whose responses are rewarded more."""

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from groundup.align.learner import PolicyModels
from groundup.align.ppo import Setup, Watch, train_ppo
from groundup.align.ppo_config import PolicyConfig
from groundup.align.reward import SAFETY_THRESHOLD, RewardScorer, check_same_tokens
from groundup.align.rollouts import PromptSet, encode_prompts
from groundup.align.watches import ModelOpinion, rubric_opinion
from groundup.base.artifacts import LOGS
from groundup.base.errors import UserError
from groundup.base.progress import say
from groundup.base.records import Prompt, read_jsonl
from groundup.data.prompts import TRAIN_FILE, text_asked
from groundup.data.splits import split_held_out
from groundup.model.lora import LoraConfig, has_adapters, read_adapter_info
from groundup.model.scalar import ScalarCheckpoint, ScalarModel, load_scalar
from groundup.model.transformer import Transformer
from groundup.stages.job import Job
from groundup.stages.trained_model import ADAPTER, Bases, SaveDtype, Trainable, open_trainable, write_weights
from groundup.train.parallel import connect

VERSION = 1
RUBRIC = "rubric"


class PPOConfig(PolicyConfig):
    """Policy optimisation against the newest reward models. Source: section 3.2.3."""

    value_from: Literal["policy", "reward"] = Field(
        default="policy", description="whose weights the value model starts with, below a head of zeros"
    )
    held_out_fraction: float = Field(
        default=0.05, ge=0, lt=1,
        description="share of the training prompts on which the early stop goes; those that versions are compared on "
        "decide nothing here",
    )  # fmt: skip
    watch: str | None = Field(
        default=RUBRIC,
        description="second opinion for the divergence alarm: rubric (rules for tasks and safety), the folder of a "
        "reward model that is not trained against, or null",
    )
    safety_threshold: float = Field(
        default=SAFETY_THRESHOLD, ge=0, le=1, description="safety score below which safety alone is the reward"
    )
    lora: LoraConfig | None = Field(
        default=None,
        description="train adapters on one frozen base shared by policy, reference, value and reward models; null: all "
        "weights",
    )
    save_dtype: SaveDtype = Field(default="float32", description="of the weights in the model folder")


@dataclass(frozen=True)
class _Opened:
    checkpoint: Trainable
    """The policy's."""
    models: PolicyModels
    scorer: RewardScorer


def raw_inputs(config: PPOConfig) -> list[Path]:
    """The watching reward model."""
    return [] if config.watch in (None, RUBRIC) else [Path(str(config.watch))]


def run(config: PPOConfig, job: Job) -> dict[str, Any]:
    """Optimise the policy; metrics are those of the last iteration, why it stopped, and the counts of prompts."""
    ranks = connect()
    if config.lora is not None and ranks.world_size > 1 and _would_shard(config, ranks.device.type):
        raise UserError(
            f"{job.name}: adapters cannot be sharded over ranks", f"set {_key(job)}.parallel=ddp, or train all weights"
        )
    opened = _open(config, job)
    checkpoint = opened.checkpoint
    prompts, held_out = _read_prompts(config, job, opened)
    watch: Watch | None = None
    if config.watch == RUBRIC:
        watch = rubric_opinion
    elif config.watch is not None:
        watch = ModelOpinion(load_scalar(Path(config.watch)), ranks.device)
    setup = Setup(opened.models, opened.scorer, prompts, held_out, checkpoint.tokenizer, checkpoint.chat, watch)
    result = train_ppo(setup, config, job.work, seed=job.seed, name=job.name)
    sizes = write_weights(job.out, checkpoint, config.save_dtype)
    if ranks.is_first:
        shutil.copytree(job.work / LOGS, job.out / LOGS)
    counts = {"train": _counts(prompts), "held_out": None if held_out is None else _counts(held_out)}
    return {**sizes, **result.summary(), "prompts": counts}


def _key(job: Job) -> str:
    return "ppo" if job.name.endswith("-ppo") else job.name.replace("-", "_")


def _would_shard(config: PPOConfig, device: str) -> bool:
    return config.parallel == "fsdp" or (config.parallel == "auto" and device == "cuda")


def _open(config: PPOConfig, job: Job) -> _Opened:
    """All models; with adapters, those of one base share its tensors."""
    path = job.inputs["policy"].path
    bases: Bases = {}
    checkpoint = open_trainable(path, config.lora, job.seed, bases=bases)
    rewards = {role: _open_reward(job, role, config, bases, checkpoint) for role in ("rm_helpful", "rm_safety")}
    helpful = rewards["rm_helpful"]
    if helpful is None:
        raise UserError(f"{job.name}: no helpfulness reward model", "give one as rm_helpful")
    scorer = RewardScorer(helpful, rewards["rm_safety"], threshold=config.safety_threshold)
    value = None
    if config.advantage == "gae":
        source = path if config.value_from == "policy" else job.inputs["rm_helpful"].path
        found = open_trainable(source, config.lora, job.seed, scalar=True, init="zero", bases=bases).model
        assert isinstance(found, ScalarModel)
        found.score.weight.data.zero_()
        value = found
    reference = _reference(checkpoint, path, job.seed, bases)
    return _Opened(checkpoint, PolicyModels(checkpoint.model, reference, value), scorer)


def _reference(checkpoint: Trainable, path: Path, seed: int, bases: Bases) -> Transformer:
    """The policy as it is now; with adapters, on the same base."""
    if not has_adapters(checkpoint.model):
        return copy.deepcopy(checkpoint.model)
    return open_trainable(path, checkpoint.lora, seed, bases=bases).model


def _open_reward(job: Job, role: str, config: PPOConfig, bases: Bases, policy: Trainable) -> ScalarModel | None:
    """A reward model that reads the policy's tokens; with adapters, on the base it was trained on."""
    if role not in job.inputs:
        return None
    path = job.inputs[role].path
    if config.lora is not None and (path / ADAPTER).exists():
        own = read_adapter_info(path / ADAPTER).config
        found = open_trainable(path, own, 0, scalar=True, bases=bases)
        assert isinstance(found.model, ScalarModel)
        reward = ScalarCheckpoint(found.model, found.config, found.tokenizer, found.chat)
    else:
        reward = load_scalar(path)
    check_same_tokens(path, reward, policy.tokenizer, policy.chat)
    return reward.model


def _read_prompts(config: PPOConfig, job: Job, opened: _Opened) -> tuple[PromptSet, PromptSet | None]:
    """Training and held-out prompts that leave room for a whole response."""
    context = min(opened.checkpoint.config.max_positions, opened.scorer.max_tokens)
    room = context - config.max_new_tokens
    if room < 1:
        raise UserError(
            f"{job.name}: max_new_tokens = {config.max_new_tokens} leaves no room for a prompt in {context} tokens",
            f"lower {_key(job)}.max_new_tokens",
        )
    prompts = [Prompt.from_json(row) for row in read_jsonl(job.inputs["prompts"].file(TRAIN_FILE))]
    wants_held_out = config.evaluate_every is not None and config.held_out_fraction > 0
    held_out: list[Prompt] = []
    if wants_held_out:
        prompts, held_out = split_held_out(prompts, config.held_out_fraction, job.seed, text_asked)
    found = encode_prompts(prompts, opened.checkpoint.chat, room, f"{job.name}: prompts")
    _tell(job, "prompts", found)
    if not wants_held_out:
        return found, None
    if not held_out:
        if connect().is_first:
            say(f"{job.name}: no held-out prompts, so no early stop; the last policy is kept")
        return found, None
    kept = encode_prompts(held_out, opened.checkpoint.chat, room, f"{job.name}: held-out prompts")
    _tell(job, "held-out prompts", kept)
    return found, kept


def _counts(prompts: PromptSet) -> dict[str, Any]:
    return {"used": len(prompts.prompts), "dropped": prompts.dropped}


def _tell(job: Job, what: str, prompts: PromptSet) -> None:
    if connect().is_first:
        notes = "".join(f"; {count} {reason}, dropped" for reason, count in prompts.dropped.items())
        say(f"{job.name}: {len(prompts.prompts)} {what}{notes}")
