"""The optimizer and its learning rate."""

import math

import torch
from torch import Tensor, nn

from groundup.train.config import TrainConfig
from groundup.train.parallel import whole


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over all trainable weights. Source: section 2.2.

    Choice: the paper gives one weight decay and no groups. Vectors (norm gains) are not decayed: pulling a gain towards
    zero rescales a layer instead of making its weights small.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )


def lr_at(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate of step 0, 1, ... total_steps - 1: linear warm-up to the peak, then a half cosine.

    Choice: the first step already learns (peak / warm-up steps) and the last one has exactly the final rate.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(config.warmup_fraction * total_steps)
    done = step + 1
    if done <= warmup:
        return config.lr * done / warmup
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (done - warmup) / (total_steps - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine)


def scale_and_clip(parameters: list[nn.Parameter], count: float, clip: float) -> float:
    """Turn gradients of a sum over `count` things into those of the mean, shrink them to norm `clip`; returns the norm
    before shrinking.

    Why: one division, after everything has been added up, so that neither micro batches nor ranks with unequal numbers
    of targets weigh more or less than their tokens.
    """
    gradients: list[Tensor] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = float(whole(torch.nn.utils.get_total_norm(gradients))) / count
    if math.isfinite(norm):
        torch._foreach_mul_(gradients, min(1.0, clip / max(norm, 1e-12)) / count)
    return norm
