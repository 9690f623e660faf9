"""One decoding step: a new token for each active sequence.

It runs the modules of the model, so that it computes what training computed; what lies between the matrix products is
done by compiled kernels where there are some (`native.py`), else by torch, and each way is tested against the other.
"""

import torch
from torch import Tensor

from groundup.infer.kernels.native import StepKernels
from groundup.model.cache import SlotCache
from groundup.model.transformer import Block, Transformer, rotate


def decode_step(
    model: Transformer,
    cache: SlotCache,
    tokens: Tensor,
    starts: list[int],
    frequencies: Tensor,
    kernels: StepKernels | None,
) -> Tensor:
    """Hidden states of one new token for each of slots 0, 1, ..., which stands at the position `starts` says.

    Shapes: tokens (B,) int64; frequencies (K/2,), what `rope_frequencies` gives -> (B, D).
    """
    if kernels is None:
        return _torch_step(model, cache, tokens, starts, frequencies)
    cache.reserve(len(starts), max(starts) + 1)
    positions = torch.tensor(starts)
    angles = positions[:, None].float() * frequencies  # (B, K/2)
    cos, sin = angles.cos(), angles.sin()
    # The residual stream in float32, as in training under autocast.
    x = model.embed(tokens).float()  # (B, D)
    addend = None
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        qkv = block.attention.wqkv(kernels.add_rms_norm(x, addend, block.attention_norm))
        mixed = kernels.attend(qkv, cos, sin, cache.keys[layer], cache.values[layer], positions)
        addend = block.attention.wo(mixed)
        both = block.ffn.w13(kernels.add_rms_norm(x, addend, block.ffn_norm))
        addend = block.ffn.w2(kernels.silu_mul(both))
    return kernels.add_rms_norm(x, addend, model.norm)


def _torch_step(model: Transformer, cache: SlotCache, tokens: Tensor, starts: list[int], frequencies: Tensor) -> Tensor:
    """Why: attention of one query is read-bound; on CPUs two batched products over the cache take half the time of
    scaled_dot_product_attention, which calls a matrix product for every row and head."""
    cache.begin(0, starts, 1)
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
