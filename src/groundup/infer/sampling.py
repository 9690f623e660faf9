"""From logits to tokens, for rows that each have their own parameters.

Shape letters: B rows, V vocabulary, C candidates. Every random number is a pure function of (seed, sample, position in
the response), so that the sampled text does not depend on what else is in the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from groundup.base.errors import UserError
from groundup.base.generation import SamplingParams, TopLogps

_BLOCK = 128
"""Vocabularies are scanned in two levels, over blocks and inside one: several times faster than in one pass."""
_CANDIDATES = (64, 1024)
"""Sizes to try for the sorted head of a distribution before all of it is sorted."""


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Raises: UserError naming the field and its value."""
    wrong = {
        "max_new_tokens must be at least 1": params.max_new_tokens < 1,
        "temperature must be 0 or more": not params.temperature >= 0 or params.temperature == float("inf"),
        "top_p must be within 0 and 1": not 0 <= params.top_p <= 1,
        "top_k must be 0 or more": params.top_k < 0,
        "num_samples must be at least 1": params.num_samples < 1,
        "stop must not hold an empty string": "" in params.stop,
        "top_logps must be 0 or more": params.top_logps < 0,
        "logit_bias must hold finite numbers": not all(math.isfinite(bias) for _, bias in params.logit_bias),
        "frequency_penalty must be a finite number": not math.isfinite(params.frequency_penalty),
        "presence_penalty must be a finite number": not math.isfinite(params.presence_penalty),
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise UserError(f"sampling: {message}, and it is {getattr(params, message.split()[0])!r}")
    for token, _ in params.logit_bias:
        if not 0 <= token < vocab_size:
            raise UserError(f"sampling: logit_bias names token {token}, and the vocabulary is 0..{vocab_size - 1}")


@dataclass(frozen=True)
class RowParams:
    """The parameters of B rows as tensors, made once for as long as the rows stay the same."""

    temperatures: Tensor
    top_ps: Tensor
    top_ks: Tensor
    keys: NDArray[np.uint64]
    is_greedy: Tensor
    is_truncated: Tensor
    all_greedy: bool
    any_truncated: bool
    any_logps: bool
    most_tops: int
    """The largest `top_logps`."""


def stack_params(params: Sequence[SamplingParams], keys: Sequence[int], device: torch.device) -> RowParams:
    """`keys` are the rows' random streams, 63-bit numbers."""
    is_greedy = [p.temperature == 0 for p in params]
    is_truncated = [p.temperature > 0 and (p.top_p < 1 or p.top_k > 0) for p in params]
    return RowParams(
        temperatures=torch.tensor([p.temperature or 1.0 for p in params], device=device),
        top_ps=torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device),
        top_ks=torch.tensor([p.top_k for p in params], device=device),
        keys=np.array(keys, dtype=np.uint64),
        is_greedy=torch.tensor(is_greedy, device=device),
        is_truncated=torch.tensor(is_truncated, device=device),
        all_greedy=all(is_greedy),
        any_truncated=any(is_truncated),
        any_logps=any(p.want_logps for p in params),
        most_tops=max(p.top_logps for p in params),
    )


def sample(logits: Tensor, rows: RowParams, positions: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Draw one token a row; the log-probabilities are those `token_logps` gives, None when no row wants them.

    Shapes: logits (B, V) float32 -> (B,) int64, (B,) float32.
    Choice: top-k first, then top-p among what top-k left, as transformers does. Greedy rows have the
    log-probabilities of temperature 1.
    """
    if rows.all_greedy:
        tokens = argmax(logits)
        return tokens, token_logps(logits, tokens) if rows.any_logps else None
    scaled = logits / rows.temperatures[:, None]
    uniforms = torch.from_numpy(hash_uniforms(rows.keys, np.array(positions, dtype=np.uint64))).to(logits.device)
    if rows.any_truncated:
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        cut, whole = rows.is_truncated.nonzero()[:, 0], (~rows.is_truncated).nonzero()[:, 0]
        tokens[cut] = draw_truncated(scaled[cut], rows.top_ks[cut], rows.top_ps[cut], uniforms[cut])
        tokens[whole] = draw(scaled[whole], uniforms[whole])
    else:
        tokens = draw(scaled, uniforms)
    tokens = torch.where(rows.is_greedy, argmax(logits), tokens)
    return tokens, token_logps(scaled, tokens) if rows.any_logps else None


def top_logps(logits: Tensor, rows: RowParams, params: Sequence[SamplingParams]) -> list[TopLogps | None]:
    """The most likely tokens of each row that asks for them, under the distribution of `sample`'s log-probabilities;
    tokens that cannot come are left out.

    Shapes: logits (B, V) float32.
    """
    scaled = logits if rows.all_greedy else logits / rows.temperatures[:, None]
    values, indices = scaled.topk(min(rows.most_tops, logits.shape[1]), -1)
    logps, ids = (values - scaled.logsumexp(-1, keepdim=True)).tolist(), indices.tolist()
    return [
        [(token, logp) for token, logp in zip(ids[row][: p.top_logps], logps[row]) if logp > float("-inf")]
        if p.top_logps
        else None
        for row, p in enumerate(params)
    ]


def argmax(logits: Tensor) -> Tensor:
    """The first largest entry of each row. Shapes: (B, V) -> (B,) int64."""
    B, V = logits.shape
    if V % _BLOCK:
        return logits.argmax(-1)
    blocks = logits.view(B, -1, _BLOCK)
    best = blocks.amax(-1).argmax(-1)  # (B,)
    return best * _BLOCK + blocks[torch.arange(B, device=logits.device), best].argmax(-1)


def token_logps(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities in nats of `tokens` under softmax(logits). Shapes: (..., V), (...) -> (...) float32."""
    chosen = logits.gather(-1, tokens[..., None])[..., 0]
    return chosen - logits.logsumexp(-1)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sampling from softmax(logits). Shapes: (B, V), (B,) float64 in [0, 1) -> (B,) int64."""
    B, V = logits.shape
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()
    padded = F.pad(weights, (0, -V % _BLOCK)) if V % _BLOCK else weights
    blocks = padded.view(B, padded.shape[1] // _BLOCK, _BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64)
    block = _invert(sums, uniforms)
    before = sums.cumsum(-1).gather(1, block[:, None])[:, 0] - sums.gather(1, block[:, None])[:, 0]
    inside = blocks[torch.arange(B, device=logits.device), block].double()  # (B, 128)
    rest = ((uniforms * sums.sum(-1) - before) / inside.sum(-1)).clamp(0, 1)
    return block * _BLOCK + _invert(inside, rest)


def draw_truncated(logits: Tensor, top_ks: Tensor, top_ps: Tensor, uniforms: Tensor) -> Tensor:
    """Sampling from the most likely tokens only: at most `top_ks` of them (0: all), and of these the fewest whose
    probability together reaches `top_ps`.

    Shapes: (B, V), (B,) int64, (B,) float64, (B,) float64 -> (B,) int64.
    Source: a token is dropped when the tokens before it, in falling order, already exceed top-p.
    Why: sorting 32,000 entries costs ten times a decoding step, and most nuclei have a few dozen tokens. How many
    candidates a row sorts depends on that row alone.
    """
    V = logits.shape[1]
    tokens = torch.empty_like(top_ks)
    left = torch.arange(len(logits), device=logits.device)
    for count in (*(size for size in _CANDIDATES if size < V), V):
        rows, ks, ps = logits[left], top_ks[left], top_ps[left]
        values, indices = rows.topk(count, -1)  # (rows, C), falling
        weights = (values - values[:, :1]).double().exp_()
        rank = torch.arange(count, device=logits.device)
        weights = weights.masked_fill_((rank >= ks[:, None]) & (ks > 0)[:, None], 0)
        all_weight = (rows - values[:, :1]).exp_().sum(-1, dtype=torch.float64)
        total = torch.where((ks > 0) & (ks <= count), weights.sum(-1), all_weight)
        reached = weights.cumsum(-1)
        is_kept = (reached - weights) <= ps[:, None] * total[:, None]
        is_done = ((ks > 0) & (ks <= count)) | ((ks == 0) & (reached[:, -1] > ps * total))
        is_done |= torch.tensor(count == V, device=logits.device)
        chosen = _invert(weights * is_kept, uniforms[left])
        tokens[left] = torch.where(is_done, indices.gather(1, chosen[:, None])[:, 0], tokens[left])
        left = left[~is_done]
        if len(left) == 0:
            break
    return tokens


def hash_uniforms(keys: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (key, position): the splitmix64 generator at that position of the key's stream."""
    with np.errstate(over="ignore"):
        z = keys + (positions + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    uniforms: NDArray[np.float64] = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniforms


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds uniform * total. Shapes: (B, C) float64, (B,) -> (B,) int64."""
    reached = weights.cumsum(-1)
    target = (uniforms * reached[:, -1])[:, None]
    index = torch.searchsorted(reached, target, right=True)[:, 0]
    # A uniform next to 1 can round to the total: then the last index that has weight.
    last = (weights > 0).long().cumsum(-1).argmax(-1)
    return torch.minimum(index, last)
