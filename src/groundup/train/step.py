"""One optimizer step: micro batches to summed gradients, summed gradients to new weights."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from groundup.base.seeds import derive_seed
from groundup.data.batches import Batch
from groundup.model.transformer import Transformer
from groundup.train.losses import LossFn
from groundup.train.parallel import Ranks, is_sharded, sum_gradients


@dataclass(frozen=True)
class StepSums:
    """What the micro batches of all ranks add up to. The gradients left in the parameters belong to `loss_sum`."""

    loss_sum: float
    count: float
    """Things that carry loss: target tokens."""
    tokens: int
    """Tokens that went through the model."""
    metrics: dict[str, float]
    flags: float
    """The sum of what each rank passed in: a question asked of all ranks without a message of its own."""
    bad_micro_batches: list[int]
    """Those of this rank whose loss is NaN or Inf."""


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set torch's random numbers for one step.

    Why: they become a function of (seed, step, rank) like the data, so that a resumed run draws what an uninterrupted
    one draws and no generator state has to be saved.
    """
    torch.manual_seed(derive_seed(seed, "step", step, rank))


def accumulate(
    model: Transformer,
    micro_batches: list[Batch],
    loss_fn: LossFn,
    parameters: list[nn.Parameter],
    ranks: Ranks,
    precision: str,
    flag: bool = False,
) -> StepSums:
    """Gradients of the loss summed over all micro batches of all ranks, in the parameters' `.grad`."""
    for parameter in parameters:
        parameter.grad = None
    losses, counts, metrics, tokens = [], [], [], 0
    for micro_batch in micro_batches:
        batch = micro_batch.to(ranks.device)
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=precision == "bf16"):
            part = loss_fn(model, batch)
        part.loss_sum.backward()  # type: ignore[no-untyped-call]
        losses.append(part.loss_sum.detach().double())
        counts.append(part.count.double())
        metrics.append(part.metrics)
        tokens += batch.tokens.numel()
    if not is_sharded(model):
        sum_gradients(parameters, ranks)
    names = sorted(metrics[0])
    values = [torch.stack(losses).sum(), torch.stack(counts).sum(), *_wide([tokens, float(flag)], ranks.device)]
    values += [torch.stack([part[name].detach().double() for part in metrics]).sum() for name in names]
    loss_sum, count, all_tokens, flags, *metric_sums = ranks.all_sum(torch.stack(values)).tolist()
    bad = (
        [index for index, loss in enumerate(losses) if not bool(torch.isfinite(loss))]
        if not math.isfinite(loss_sum)
        else []
    )
    return StepSums(loss_sum, count, int(all_tokens), dict(zip(names, metric_sums, strict=True)), flags, bad)


def _wide(values: list[float], device: torch.device) -> tuple[Tensor, ...]:
    return torch.tensor(values, dtype=torch.float64, device=device).unbind()
