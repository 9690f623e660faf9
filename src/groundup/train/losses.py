"""Language-model losses that never hold the logits of a whole batch.

Shape letters: B sequences, T tokens, D width, V vocabulary, N rows (target tokens of a batch), C rows of a chunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from groundup.data.batches import Batch
from groundup.model.transformer import Transformer


@dataclass
class LossSum:
    """A loss as a sum over `count` things (target tokens), so that micro batches and ranks add up exactly.

    Shapes: every tensor (); `metrics` are further sums over the same things.
    """

    loss_sum: Tensor
    count: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


LossFn = Callable[[Transformer, Batch], LossSum]


def lm_loss(model: Transformer, batch: Batch) -> LossSum:
    """Cross-entropy over the batch's target tokens, in nats.

    Why: logits of tokens that carry no loss are never computed; in SFT these are most of them.
    """
    hidden, targets, _ = _target_rows(model, batch)
    loss_sum, num_correct = chunked_cross_entropy(
        hidden, model.head_weight, targets, is_compiled=model.is_compiled
    )
    count = torch.tensor(len(targets), device=targets.device)
    return LossSum(loss_sum, count, {"num_correct": num_correct})


def token_logps(model: Transformer, batch: Batch) -> Tensor:
    """Log-probability in nats of each target token, 0 where `is_target` is False. Shapes: (B, T) float32."""
    hidden, targets, rows = _target_rows(model, batch)
    logps = _TokenLogps.apply(hidden, model.head_weight, targets, _chunk_rows(hidden), model.is_compiled)
    return logps.new_zeros(batch.tokens.numel()).index_copy(0, rows, logps).view(batch.tokens.shape)


def _target_rows(model: Transformer, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (N, D) and targets (N,) where `is_target`, and which rows of (B*T) they are."""
    hidden = model(batch.tokens, batch.positions, batch.document_ids)
    rows = batch.is_target.flatten().nonzero().squeeze(1)
    return hidden.flatten(0, 1).index_select(0, rows), batch.targets.flatten()[rows], rows


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor | None = None,
    *,
    chunk_rows: int | None = None,
    is_compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum over rows of row_weight * -log softmax(weight @ hidden)[target] in nats, and how many targets score highest.

    Shapes: hidden (N, D), weight (V, D), targets (N,) int64, row_weights (N,) -> () float32, ().
    Why: the gradient is made while the logits of a chunk are in the processor's cache, so that logits are computed once
    and live for one chunk; under autocast they are bfloat16, the softmax float32.
    """
    if row_weights is None:
        row_weights = torch.ones(len(targets), device=hidden.device)
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    result: tuple[Tensor, Tensor] = _ChunkedCrossEntropy.apply(
        hidden, weight, targets, row_weights, chunk_rows or _chunk_rows(hidden), wants_gradient, is_compiled
    )
    return result


def _chunk_rows(hidden: Tensor) -> int:
    """Measured: 256 rows of logits stay in a CPU's cache; a GPU needs more to be filled."""
    return 256 if hidden.device.type == "cpu" else 4096


def _score(logits: Tensor, targets: Tensor, upstream: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities of the targets, whether each scores highest, and all but the target's column of the gradient.

    Shapes: logits (C, V), targets (C,), upstream (C,): d loss / d logp -> (C,) float32, (C,) bool, (C, V) as the logits.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = wide.amax(-1)
    shares = (wide - top[:, None]).exp()
    total = shares.sum(-1)
    taken = wide.gather(1, targets[:, None]).squeeze(1)
    logps = taken - top - total.log()
    if upstream is None:
        return logps, taken >= top, None
    return logps, taken >= top, (shares * (-upstream / total)[:, None]).to(logits.dtype)


_score_compiled = torch.compile(_score, dynamic=False)


class _Chunks:
    """The rows of a batch against the vocabulary, a chunk at a time, with gradients summed on the way."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int, is_compiled: bool) -> None:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        self.hidden, self.weight, self.targets = hidden.to(dtype), weight.to(dtype), targets
        self.chunk_rows, self.is_compiled = chunk_rows, is_compiled

    def scores(self, upstream: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """Of each chunk: its rows, logps (C,), is_correct (C,) and the gradient (C, V) of sum(upstream * logps)."""
        for start in range(0, len(self.targets), self.chunk_rows):
            rows = slice(start, start + self.chunk_rows)
            targets = self.targets[rows]
            chunk_upstream = None if upstream is None else upstream[rows]
            # The last, shorter chunk would compile again for every new length.
            score = _score_compiled if self.is_compiled and len(targets) == self.chunk_rows else _score
            logps, is_correct, gradient = score(self.hidden[rows] @ self.weight.T, targets, chunk_upstream)
            if gradient is not None and chunk_upstream is not None:
                at_target = chunk_upstream * (1 - logps.exp())
                gradient.scatter_(1, targets[:, None], at_target[:, None].to(gradient.dtype))
            yield rows, logps, is_correct, gradient


class _GradientSums:
    """d loss / d hidden (N, D) and d loss / d weight (V, D), the latter summed over chunks in at least float32."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.hidden = torch.empty_like(hidden)
        self.weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))

    def add(self, chunks: _Chunks, rows: slice, gradient: Tensor) -> None:
        self.hidden[rows] = gradient @ chunks.weight
        self.weight += gradient.T @ chunks.hidden[rows]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        row_weights: Tensor,
        chunk_rows: int,
        wants_gradient: bool,
        is_compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        chunks = _Chunks(hidden, weight, targets, chunk_rows, is_compiled)
        sums = _GradientSums(hidden, weight) if wants_gradient else None
        loss_sum = row_weights.new_zeros(())
        num_correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for rows, logps, is_correct, gradient in chunks.scores(-row_weights if wants_gradient else None):
            loss_sum = loss_sum - (row_weights[rows] * logps).sum()
            num_correct += is_correct.sum()
            if sums is not None and gradient is not None:
                sums.add(chunks, rows, gradient)
        if sums is not None:
            ctx.save_for_backward(sums.hidden, sums.weight)
            ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(num_correct)
        return loss_sum, num_correct

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scaled = (weight_gradient * upstream[0]).to(ctx.weight_dtype)
        return hidden_gradient * upstream[0], scaled, None, None, None, None, None


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int, is_compiled: bool
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.chunks = _Chunks(hidden, weight, targets, chunk_rows, is_compiled)
        logps = [logps for _, logps, _, _ in ctx.chunks.scores(None)]
        return torch.cat(logps) if logps else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, _ = ctx.saved_tensors
        sums = _GradientSums(hidden, weight)
        for rows, _, _, gradient in ctx.chunks.scores(upstream[0]):
            sums.add(ctx.chunks, rows, gradient)
        return sums.hidden, sums.weight.to(weight.dtype), None, None, None
