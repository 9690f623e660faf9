"""Prompt tokens of several sequences in one forward, without padding.

Shape letters: N tokens of all segments, T tokens of one, S cached positions, D width, H query heads, G key/value heads,
K channels per head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from groundup.model.cache import SlotCache
from groundup.model.transformer import Block, Transformer, rotate


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one sequence; what stands before `start` is in the slot already."""

    slot: int
    start: int
    tokens: Sequence[int]


def prefill(model: Transformer, cache: SlotCache, segments: Sequence[Segment], frequencies: Tensor) -> Tensor:
    """Hidden states of all segments, one after the other; their keys and values are left in the cache.

    Shapes: frequencies (K/2,), what `rope_frequencies` gives -> (N, D).
    Why: every product but attention's takes all tokens together, as one matrix; attention is computed sequence by
    sequence, so that no length is rounded up to another's and nothing depends on the neighbours.
    """
    lengths = [len(segment.tokens) for segment in segments]
    tokens = torch.tensor([token for segment in segments for token in segment.tokens], device=frequencies.device)
    positions = cache.begin_packed([(s.slot, s.start, len(s.tokens)) for s in segments])  # (N,)
    angles = positions[:, None, None].float() * frequencies  # (N, 1, K/2)
    rotation = angles.cos(), angles.sin()
    masks = [_is_visible(segment, positions.device) for segment in segments]
    G = model.config.n_kv_heads
    x = model.embed(tokens)  # (N, D)
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        attention = block.attention
        qkv = attention.wqkv(block.attention_norm(x)).view(len(x), -1, attention.head_dim)  # (N, H+2G, K)
        turned = rotate(qkv[:, :-G], rotation)  # (N, H+G, K): queries and keys
        cache.write(layer, turned[:, -G:], qkv[:, -G:])
        mixed = []
        parts = zip(segments, masks, torch.split(turned, lengths), torch.split(qkv[:, -G:], lengths))
        for segment, is_visible, queries_and_keys, v in parts:
            q, k = queries_and_keys[:, :-G], queries_and_keys[:, -G:]  # (T, H|G, K)
            keys, values = k.transpose(0, 1), v.transpose(0, 1)  # (G, T, K)
            if segment.start > 0:
                end = segment.start + len(segment.tokens)
                keys, values = (part[layer][segment.slot, :, :end].to(q.dtype) for part in (cache.keys, cache.values))
            mixed.append(_attend(q, keys, values, is_visible))
        x = x + attention.wo(torch.cat(mixed))
        x = x + block.ffn(block.ffn_norm(x))
    out: Tensor = model.norm(x)
    return out


def _attend(q: Tensor, keys: Tensor, values: Tensor, is_visible: Tensor | None) -> Tensor:
    """Shapes: q (T, H, K); keys, values (G, S, K); is_visible (T, S), None when S = T -> (T, H*K)."""
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys[None], values[None], attn_mask=is_visible,
        is_causal=is_visible is None and len(q) > 1, enable_gqa=q.shape[1] != keys.shape[0],
    )  # fmt: skip
    return out[0].transpose(0, 1).flatten(1)


def _is_visible(segment: Segment, device: torch.device) -> Tensor | None:
    """Which positions each token of a segment sees, None when it is the whole sequence. Shapes: (T, S)."""
    if segment.start == 0:
        return None
    end = segment.start + len(segment.tokens)
    positions = torch.arange(end, device=device)
    return positions <= positions[segment.start :, None]
