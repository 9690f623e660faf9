"""Policy and value model with their optimizer: gradient steps, the best policy so far, and what a checkpoint holds."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from groundup.align.experience import (
    Arithmetic,
    Experience,
    mini_batches,
    narrow_linears,
    policy_objective,
    value_objective,
)
from groundup.align.ppo_config import PolicyConfig
from groundup.base.errors import UserError
from groundup.base.progress import say
from groundup.model.lora import has_adapters
from groundup.model.scalar import ScalarModel
from groundup.model.transformer import Transformer
from groundup.train.checkpoint import trainable
from groundup.train.guard import StepGuard
from groundup.train.loop import prepare_model
from groundup.train.optim import make_optimizer, scale_and_clip
from groundup.train.parallel import is_sharded, own_part
from groundup.train.step import StepSums, accumulate

STEP_0_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""How far an iteration's first ratio may lie from 1, and an unchanged policy's log-probabilities from the reference's.
Both are exactly 0 where equal forward passes round equally."""

MAX_SHAPES = 512
"""Lengths that blocks are compiled for, twice each: with gradients and, for the reference, without."""


@dataclass(frozen=True)
class PolicyModels:
    """The models of a run; with adapters their frozen parts are the same tensors."""

    policy: Transformer
    """Trained in place."""
    reference: Transformer
    """The policy as it starts; frozen."""
    value: ScalarModel | None
    """Trained in place; None for advantage=group."""


@dataclass
class SkipCount:
    """Gradient steps that were not taken."""

    total: int = 0
    in_a_row: int = 0


class Learner:
    """Takes the gradient steps of `models.policy` and `models.value`, with one AdamW over both."""

    def __init__(
        self, models: PolicyModels, config: PolicyConfig, arithmetic: Arithmetic, max_tokens: int, name: str
    ) -> None:
        """`max_tokens` is the length of the longest prompt with a response."""
        assert (models.value is None) == (config.advantage == "group"), "PPO has a value model, GRPO none"
        self.models, self.config, self.arithmetic, self.name = models, config, arithmetic, name
        optimizer_config = config.optimizer(max_tokens)
        if not has_adapters(models.reference):
            # Nobody trains a reference's adapters either, but they ask for gradients as the policy's do: compiled code
            # with and without them rounds differently, and the divergence is to begin at exactly 0.
            models.reference.requires_grad_(False)
        for model in (models.policy, models.reference, models.value):
            if model is not None:
                prepare_model(model, optimizer_config, arithmetic.ranks, arithmetic.precision, config.iterations)
        if arithmetic.precision == "bf16" and not (is_sharded(models.reference) or has_adapters(models.policy)):
            narrow_linears(models.reference)  # with adapters its tensors are the policy's, too
        if models.policy.is_compiled:
            torch._dynamo.config.recompile_limit = MAX_SHAPES
        self.optimizer = make_optimizer(models.policy, optimizer_config)
        self.saved = nn.ModuleDict({"policy": models.policy, "best": nn.ParameterDict()})
        """Its trainable parameters are what a checkpoint holds."""
        self._trained = {"policy": (models.policy, policy_objective(config))}
        if models.value is not None:
            value_config = optimizer_config.model_copy(update={"lr": config.value_lr or config.lr})
            for group in make_optimizer(models.value, value_config).param_groups:
                self.optimizer.add_param_group(group)
            self.saved["value"] = models.value
            self._trained["value"] = (models.value, value_objective(config))
        self.skips = SkipCount()
        self._guard = StepGuard(0, 1.0, [])

    # ---- the best policy

    def remember_best(self) -> None:
        """Keep a copy of the policy's trained weights as they are now."""
        best = self.saved["best"]
        assert isinstance(best, nn.ParameterDict)
        for name, parameter in trainable(self.models.policy).items():
            key = name.replace(".", "/")
            if key not in best:  # counted as trainable so that checkpoints hold it; no optimizer knows it
                best[key] = nn.Parameter(parameter.detach().clone())
            else:
                best[key].data.copy_(parameter.detach())

    def restore_best(self) -> None:
        """Put the weights that were remembered back into the policy."""
        best = self.saved["best"]
        assert isinstance(best, nn.ParameterDict)
        for name, parameter in trainable(self.models.policy).items():
            parameter.data.copy_(best[name.replace(".", "/")].data)

    # ---- gradient steps

    def learn(self, experience: Experience, seed: int) -> dict[str, float]:
        """All gradient steps of one iteration; returns means over the steps that were taken."""
        config = self.config
        count = len(experience.rollouts.responses)
        steps = [
            rows
            for epoch in range(config.ppo_epochs)
            for rows in mini_batches(count, config.mini_batch_rows, seed, epoch)
        ]
        results = [self._step(experience, rows, is_first=number == 0) for number, rows in enumerate(steps)]
        taken = [result for result in results if result is not None]
        row = {name: math.fsum(result[name] for result in taken) / len(taken) for name in (taken[0] if taken else ())}
        return row if len(taken) == len(steps) else {**row, "skipped_steps": len(steps) - len(taken)}

    def _step(self, experience: Experience, rows: list[int], is_first: bool) -> dict[str, float] | None:
        """One step of AdamW for policy and value model, or None where the gradient forbids it."""
        config, ranks = self.config, self.arithmetic.ranks
        parts = experience.rollouts.micro_batches(rows, ranks, config.micro_rows)
        row: dict[str, float] = {}
        refusal = None
        for kind, (model, objective) in self._trained.items():
            parameters = list(trainable(model).values())
            batches = [experience.batch(part, config.micro_rows if model.is_compiled else None) for part in parts]
            sums = accumulate(model, list(batches), objective, parameters, ranks, self.arithmetic.precision)
            norm = scale_and_clip(parameters, sums.count, config.clip)
            if is_first and kind == "policy":
                allowed = STEP_0_TOLERANCE[self.arithmetic.precision] * len(parts) * ranks.world_size
                gap = sums.metrics["ratio_gap"]
                assert not gap > allowed, f"ratios of the first gradient step lie {gap} off 1"
            refusal = refusal or self._guard.refuse(sums.loss_sum / sums.count, norm)
            row |= _step_row(kind, sums, norm)
        if refusal is not None:
            self._skip(refusal)
            return None
        self.optimizer.step()
        self.skips.in_a_row = 0
        return row

    def _skip(self, refusal: str) -> None:
        self.skips.total += 1
        self.skips.in_a_row += 1
        if self.arithmetic.ranks.is_first:
            say(f"{self.name}: a gradient step was skipped: {refusal}")
        if self.skips.in_a_row >= self.config.max_skipped_in_a_row:
            raise UserError(
                f"{self.name}: {self.skips.in_a_row} gradient steps in a row were skipped, the last because {refusal}",
                "lower lr or set precision=fp32",
            )


def _step_row(kind: str, sums: StepSums, norm: float) -> dict[str, float]:
    """What a step says in the metrics log; all but the norm are means over response tokens."""
    clip_fraction = sums.metrics["num_clipped"] / sums.count
    assert 0 <= clip_fraction <= 1
    row = {"loss": sums.loss_sum / sums.count, "grad_norm": norm, "clip_fraction": clip_fraction}
    if "approx_kl" in sums.metrics:
        row["approx_kl"] = sums.metrics["approx_kl"] / sums.count
    return {f"{kind}_{name}": value for name, value in row.items()}


def checksum(model: nn.Module) -> int:
    """The sum of all weights' bits that this rank holds, eight bytes at a time: changes with any bit, on any device."""
    total = 0
    for parameter in model.parameters():
        values = own_part(parameter.detach()).contiguous().flatten().view(torch.uint8)
        whole = values.numel() // 8 * 8
        total += int(values[:whole].view(torch.int64).sum()) + int(values[whole:].sum())
    return total
