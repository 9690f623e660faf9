"""From logits to tokens, for rows that each have their own parameters.

Shape letters: B rows, V vocabulary, C candidates. Every random number is a pure function of (seed, sample, position in
the response), so that the sampled text does not depend on what else is in the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
_ATTEMPTS = 9
_STREAM = np.uint64(0xD1B54A32D192ED03)
"""Between the random streams of the attempts at one token."""


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
class RowGroup:
    """Rows of a batch that are drawn in the same way."""

    kind: Literal["greedy", "whole", "nucleus", "sorted"]
    places: list[int]
    index: Tensor
    top_ps: Tensor
    top_ks: Tensor
    keys: NDArray[np.uint64]


@dataclass(frozen=True)
class RowParams:
    """The parameters of B rows, made once for as long as the rows stay the same."""

    temperatures: Tensor
    groups: list[RowGroup]
    any_logps: bool
    most_tops: int
    """The largest `top_logps`."""

    @property
    def all_greedy(self) -> bool:
        return [group.kind for group in self.groups] == ["greedy"]


def stack_params(params: Sequence[SamplingParams], keys: Sequence[int], device: torch.device) -> RowParams:
    """`keys` are the rows' random streams, 63-bit numbers."""
    kinds = [_kind(p) for p in params]
    groups = []
    for kind in dict.fromkeys(kinds):
        places = [place for place, each in enumerate(kinds) if each == kind]
        groups.append(
            RowGroup(
                kind,
                places,
                torch.tensor(places, device=device),
                torch.tensor([params[place].top_p for place in places], dtype=torch.float64, device=device),
                torch.tensor([params[place].top_k for place in places], device=device),
                np.array([keys[place] for place in places], dtype=np.uint64),
            )
        )
    return RowParams(
        temperatures=torch.tensor([p.temperature or 1.0 for p in params], device=device),
        groups=groups,
        any_logps=any(p.want_logps for p in params),
        most_tops=max(p.top_logps for p in params),
    )


def _kind(params: SamplingParams) -> Literal["greedy", "whole", "nucleus", "sorted"]:
    if params.temperature == 0:
        return "greedy"
    if params.top_k > 0:
        return "sorted"
    return "nucleus" if params.top_p < 1 else "whole"


def sample(logits: Tensor, rows: RowParams, positions: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Draw one token a row; the log-probabilities are those `token_logps` gives, None when no row wants them.

    Shapes: logits (B, V) float32 -> (B,) int64, (B,) float32.
    Choice: top-k first, then top-p among what top-k left, as transformers does. Greedy rows have the
    log-probabilities of temperature 1.
    """
    scaled = logits if rows.all_greedy else logits / rows.temperatures[:, None]
    if len(rows.groups) == 1:
        tokens = _draw_group(scaled, rows.groups[0], positions)
    else:
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        for group in rows.groups:
            tokens[group.index] = _draw_group(scaled[group.index], group, positions)
    return tokens, token_logps(scaled, tokens) if rows.any_logps else None


def _draw_group(logits: Tensor, group: RowGroup, positions: Sequence[int]) -> Tensor:
    """Shapes: logits (b, V) of the group's rows -> (b,) int64."""
    if group.kind == "greedy":
        return argmax(logits)
    attempts = _ATTEMPTS if group.kind == "nucleus" else 1
    streams = group.keys + np.arange(attempts, dtype=np.uint64)[:, None] * _STREAM
    at = np.array([positions[place] for place in group.places], dtype=np.uint64)
    uniforms = torch.from_numpy(hash_uniforms(streams, at)).to(logits.device)  # (attempts, b)
    if group.kind == "nucleus":
        return draw_nucleus(logits, group.top_ps, uniforms)
    if group.kind == "sorted":
        return draw_truncated(logits, group.top_ks, group.top_ps, uniforms[0])
    return draw(logits, uniforms[0])


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
    blocks = _weights(logits)
    return _draw_of_blocks(blocks, blocks.sum(-1, dtype=torch.float64), uniforms)


def _weights(logits: Tensor) -> Tensor:
    """exp(logit - largest) in blocks, filled up with 0. Shapes: (B, V) -> (B, blocks, _BLOCK)."""
    B, V = logits.shape
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()
    padded = F.pad(weights, (0, -V % _BLOCK)) if V % _BLOCK else weights
    return padded.view(B, -1, _BLOCK)


def _draw_of_blocks(blocks: Tensor, sums: Tensor, uniforms: Tensor) -> Tensor:
    """Shapes: blocks (B, blocks, _BLOCK), their sums (B, blocks) float64, (B,) -> (B,) int64."""
    block = _invert(sums, uniforms)
    before = sums.cumsum(-1).gather(1, block[:, None])[:, 0] - sums.gather(1, block[:, None])[:, 0]
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block].double()  # (B, _BLOCK)
    rest = ((uniforms * sums.sum(-1) - before) / inside.sum(-1)).clamp(0, 1)
    return block * _BLOCK + _invert(inside, rest)


def draw_nucleus(logits: Tensor, top_ps: Tensor, uniforms: Tensor) -> Tensor:
    """Top-p sampling; tokens of equal probability are within the nucleus together or not at all.

    Shapes: (B, V), (B,) float64, (attempts, B) float64 -> (B,) int64.
    Why: a token drawn from all of the distribution is within the nucleus when those likelier than it do not exceed
    top-p, and one that is not is drawn again: at top-p 0.9 that is 1.1 draws, and nothing is sorted. Sorting takes
    longer than a decoding step of a small model. Rows that keep failing are sorted in the end; the distribution is the
    same.
    """
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    left = torch.arange(len(logits), device=logits.device)
    blocks, bounds = _weights(logits), top_ps
    for attempt in uniforms[:-1]:
        sums = blocks.sum(-1, dtype=torch.float64)
        drawn = _draw_of_blocks(blocks, sums, attempt[left])
        flat = blocks.flatten(1)
        is_likelier = torch.gt(flat, flat.gather(1, drawn[:, None]), out=torch.empty_like(flat))
        is_outside = (is_likelier * flat).sum(-1) > bounds * sums.sum(-1)
        tokens[left] = drawn
        if not is_outside.any():
            return tokens
        left, blocks, bounds = left[is_outside], blocks[is_outside], bounds[is_outside]
    every = torch.zeros(len(left), dtype=torch.int64, device=logits.device)
    tokens[left] = draw_truncated(logits[left], every, top_ps[left], uniforms[-1, left])
    return tokens


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
