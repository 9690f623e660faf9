"""Stage `rejection`: the newest model, reward models and prompts -> candidates with scores, and the best of each."""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from pydantic import Field, PositiveFloat

from groundup.align.bank import BEST_FILE, Winner, write_winners
from groundup.align.rejection import CandidateConfig, PromptSamples, compare_temperatures, faults, sample_to_file
from groundup.align.reward import RewardScorer, load_scorer
from groundup.align.sweep import RewardCurve, best_temperature
from groundup.base.errors import UserError
from groundup.base.files import write_json
from groundup.base.progress import say
from groundup.base.records import Prompt, read_jsonl
from groundup.base.seeds import derive_seed
from groundup.data.batches import permute
from groundup.data.prompts import TRAIN_FILE
from groundup.infer.engine import Engine
from groundup.infer.quantize import SamplingWeights, sampling_weights
from groundup.model.checkpoint import Checkpoint, load_checkpoint
from groundup.stages.job import Job
from groundup.train.loop import choose_precision

VERSION = 2
SAMPLES_FILE, SWEEP_FILE = "samples.jsonl", "sweep.json"


class RejectionConfig(CandidateConfig):
    """Best of K.

    Source: section 3.2.3; figure 8 for temperatures, which are tuned anew for each version. Choice: the paper gives
    neither K nor the number of prompts.
    """

    round: int = Field(default=1, gt=0, description="round of alignment, from 1; written into the bank of samples")
    num_prompts: int | None = Field(
        default=None, gt=0, description="prompts to sample for, drawn from the training prompts; null: all of them"
    )
    temperatures: tuple[PositiveFloat, ...] = Field(
        default=(0.7, 0.9, 1.1, 1.3),
        min_length=1,
        description="tried on some of the prompts; the one with the highest expected reward is used. One: no trial",
    )
    sweep_prompts: int = Field(default=32, gt=0, description="prompts on which the temperatures are tried")
    weights: SamplingWeights = Field(
        default="auto", description="form of the weights to generate with; auto: bf16 where the machine computes in it"
    )
    max_slots: int = Field(default=128, gt=0, description="responses generated at once")


@dataclass(frozen=True)
class _Sampling:
    """What stays the same in all samplings of one job."""

    config: RejectionConfig
    job: Job
    checkpoint: Checkpoint
    engine: Engine
    scorer: RewardScorer

    def draw(self, prompts: Sequence[Prompt], temperature: float, purpose: str) -> list[PromptSamples]:
        """Candidates for the prompts, by way of a file in the work folder."""
        return sample_to_file(
            self.job.work / f"{purpose}-{temperature}.jsonl",
            self.engine,
            self.checkpoint.chat,
            prompts,
            self.scorer,
            self.config,
            temperature=temperature,
            seed=derive_seed(self.job.seed, purpose),
            name=f"{self.job.name}, {purpose} at temperature {temperature:g}",
        )


def run(config: RejectionConfig, job: Job) -> dict[str, Any]:
    """Sample, score and choose; metrics count prompts, candidates and whatever could not be used."""
    sampling = _open(config, job)
    prompts, counts = _draw_prompts(config, job, sampling)
    sweep, sweep_tokens = _sweep(sampling, prompts)
    temperature = best_temperature(sweep) if sweep else config.temperatures[0]
    samples = sampling.draw(prompts, temperature, "samples")
    (curve,) = compare_temperatures([samples])
    _check_scores_differ(job, samples)
    shutil.copyfile(job.work / f"samples-{temperature}.jsonl", job.out / SAMPLES_FILE)
    winners = _winners(config, job, samples)
    write_winners(job.out / BEST_FILE, winners)
    write_json(job.out / SWEEP_FILE, {"sweep": [c.to_json() for c in sweep], "samples": curve.to_json()})
    tokens = sweep_tokens + _num_tokens(samples)
    metrics = {"prompts": counts, **_metrics(samples, winners, curve), "tokens": tokens}
    say(
        f"{job.name}: mean reward {metrics['mean_reward']:.3f}, of the best of {config.num_samples} "
        f"{metrics['mean_best_reward']:.3f} (temperature {temperature:g}); {len(winners)} winners of "
        f"{len(prompts)} prompts"
    )
    return metrics


def _open(config: RejectionConfig, job: Job) -> _Sampling:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = load_checkpoint(job.inputs["model"].path)
    safety = job.inputs.get("rm_safety")
    scorer = load_scorer(
        job.inputs["rm_helpful"].path,
        None if safety is None else safety.path,
        checkpoint.tokenizer,
        checkpoint.chat,
        dtype=torch.bfloat16 if choose_precision("auto", device) == "bf16" else None,
        device=device,
    )
    model = checkpoint.model.to(device).eval()
    weights = sampling_weights(config.weights, device)
    engine = Engine(model, checkpoint.tokenizer, max_slots=config.max_slots, weights=weights)
    return _Sampling(config, job, checkpoint, engine, scorer)


def _draw_prompts(
    config: RejectionConfig, job: Job, sampling: _Sampling
) -> tuple[list[Prompt], dict[str, int | dict[str, int]]]:
    """The training prompts in an order of this round's own, without those that cannot be answered in full."""
    file = job.inputs["prompts"].file(TRAIN_FILE)
    found = [Prompt.from_json(row) for row in read_jsonl(file)]
    room = min(sampling.engine.max_tokens, sampling.scorer.max_tokens) - config.max_new_tokens
    order = permute(np.arange(len(found)), len(found), derive_seed(job.seed, "prompts", config.round))
    wanted = len(found) if config.num_prompts is None else config.num_prompts
    drawn: list[Prompt] = []
    dropped: Counter[str] = Counter()
    for index in order.tolist():
        if len(drawn) == wanted:
            break
        fault = _prompt_fault(sampling.checkpoint, found[index], room)
        if fault is None:
            drawn.append(found[index])
        else:
            dropped[fault] += 1
    if not drawn:
        raise UserError(
            f"{file}: none of {len(found)} prompts can be used ({dict(dropped)})",
            f"the context leaves {room} tokens to a prompt; lower max_new_tokens",
        )
    notes = "".join(f"; {count} {fault}" for fault, count in dropped.items())
    say(f"{job.name}: {len(drawn)} of {len(found)} prompts drawn{notes}")
    if len(drawn) < wanted:
        say(f"{job.name}: num_prompts = {wanted}, but there are no more than {len(drawn)}")
    return drawn, {"found": len(found), "drawn": len(drawn), "dropped": dict(dropped)}


def _prompt_fault(checkpoint: Checkpoint, prompt: Prompt, room: int) -> str | None:
    try:
        length = len(checkpoint.chat.encode_prompt(prompt.messages))
    except UserError:
        return "refused by the chat format"
    return "too long for the context" if length > room else None


def _sweep(sampling: _Sampling, prompts: Sequence[Prompt]) -> tuple[list[RewardCurve], int]:
    """The curve of each temperature on the first of the prompts, none where there is only one temperature; and how many
    tokens were sampled for that."""
    config = sampling.config
    if len(config.temperatures) == 1:
        return [], 0
    some = prompts[: config.sweep_prompts]
    samples = [sampling.draw(some, temperature, "sweep") for temperature in config.temperatures]
    curves = compare_temperatures(samples)
    for curve in curves:
        say(
            f"{sampling.job.name}: temperature {curve.temperature:g}: reward {curve.mean:.3f} on average, best of "
            f"{config.num_samples} {curve.expected_max[-1]:.3f} (standard error {curve.max_stderr[-1]:.3f})"
        )
    return curves, sum(map(_num_tokens, samples))


def _num_tokens(samples: Sequence[PromptSamples]) -> int:
    return sum(candidate.num_tokens for row in samples for candidate in row.candidates)


def _check_scores_differ(job: Job, samples: Sequence[PromptSamples]) -> None:
    comparable = [row for row in samples if sum(c.fault is None for c in row.candidates) > 1]
    if comparable and all(row.has_equal_scores for row in comparable):
        raise UserError(
            f"{job.name}: for each of {len(comparable)} prompts all candidates have one and the same score, so that "
            "there is no best one",
            "the model writes the same answer each time (raise the temperatures) or the reward model learned nothing",
        )


def _winners(config: RejectionConfig, job: Job, samples: Sequence[PromptSamples]) -> list[Winner]:
    safety = job.inputs.get("rm_safety")
    return [
        Winner(
            row.prompt, best.text, best.fault == "truncated", best.reward, best.helpful, best.safety,
            tuple(candidate.reward for candidate in row.candidates), row.temperature, config.round,
            job.inputs["model"].id, job.inputs["rm_helpful"].id, None if safety is None else safety.id,
        )
        for row in samples
        if (best := row.best) is not None
    ]  # fmt: skip


def _metrics(samples: Sequence[PromptSamples], winners: Sequence[Winner], curve: RewardCurve) -> dict[str, Any]:
    return {
        "temperature": curve.temperature,
        "candidates": {"drawn": sum(len(row.candidates) for row in samples), **faults(samples)},
        "winners": {
            "chosen": len(winners),
            "truncated": sum(winner.is_truncated for winner in winners),
            "prompts without a usable candidate": len(samples) - len(winners),
            "prompts with equal scores": sum(row.has_equal_scores for row in samples),
        },
        "mean_reward": fmean(candidate.reward for row in samples for candidate in row.candidates),
        "mean_best_reward": fmean(winner.reward for winner in winners),
    }
