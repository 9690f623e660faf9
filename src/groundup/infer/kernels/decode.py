"""One decoding step: the seam for a compiled one.

The engine calls `decode_step` for every step after the prompts; a faster implementation takes its place here and is
tested against this one. It runs the modules of the model, so that it computes what training computed.
"""

import torch
from torch import Tensor

from groundup.model.cache import SlotCache
from groundup.model.transformer import Block, Transformer, rotate


def decode_step(model: Transformer, cache: SlotCache, tokens: Tensor, frequencies: Tensor) -> Tensor:
    """Hidden states of one new token for each slot that `cache.begin` named.

    Shapes: tokens (B,) int64; frequencies (K/2,), what `rope_frequencies` gives -> (B, D).
    Why: attention of one query is read-bound; on CPUs two batched products over the cache take half the time of
    scaled_dot_product_attention, which calls a matrix product for every row and head.
    """
    G = model.config.n_kv_heads
    B = len(tokens)
    x = model.embed(tokens)  # (B, D)
    angles = cache.positions[:, :, None, None].float() * frequencies  # (B, 1, 1, K/2)
    rotation = angles.cos(), angles.sin()
    assert cache.is_visible is not None, "there are no earlier tokens"
    bias = torch.zeros(cache.is_visible.shape, device=x.device).masked_fill_(~cache.is_visible, float("-inf"))
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        attention = block.attention
        qkv = attention.wqkv(block.attention_norm(x)).view(B, 1, -1, attention.head_dim)  # (B, 1, H+2G, K)
        turned = rotate(qkv[:, :, :-G], rotation)  # (B, 1, H+G, K): queries and keys
        keys, values = cache.store(layer, turned[:, :, -G:], qkv[:, :, -G:])
        mixed = _attend_one(turned[:, :, :-G], keys, values, bias)
        x = x + attention.wo(mixed.to(x.dtype))
        x = x + block.ffn(block.ffn_norm(x))
    out: Tensor = model.norm(x)
    return out


def _attend_one(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Attention of one query per row.

    Shapes: q (B, 1, H, K); keys, values (B, G, S, K); bias (B, 1, 1, S) -> (B, H*K).
    """
    B, _, H, K = q.shape
    G = keys.shape[1]
    queries = q.reshape(B, G, H // G, K).to(keys.dtype)
    scores = torch.matmul(queries, keys.transpose(-1, -2))  # (B, G, H/G, S)
    shares = torch.add(bias, scores, alpha=K**-0.5).softmax(-1).to(values.dtype)
    return torch.matmul(shares, values).reshape(B, H * K)
