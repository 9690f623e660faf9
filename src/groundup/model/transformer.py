"""The Llama 2 transformer.

Shape letters: B sequences, T tokens, S cached positions, D width, H query heads, G key/value heads, K channels per
head, F FFN width, V vocabulary, L layers.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from groundup.base.seeds import derive_seed
from groundup.model.attention import Documents, attend, prepare_documents
from groundup.model.config import ModelConfig, flops_per_token

INIT_STD = 0.02
Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary angles, each (B or 1, T, 1, K/2) float32."""


class KeyValueCache(Protocol):
    """Where the keys and values of earlier tokens are kept; see `groundup.model.cache`."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store k, v (B, T, G, K) of these tokens and return all keys and values (B, G, S, K) and which are visible
        (B, 1, T, S); None means that the T tokens are the whole cache (causal) or that T is 1 and sees all of it."""


class RMSNorm(nn.Module):
    """x / rms(x) * gain, the mean square in float32. Source: section 2.2."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each channel pair. Shapes: (K/2,) float32, on the CPU."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # Turns that a pair makes within the original context: many are kept, few are slowed.
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn channel pairs (j, j + K/2) of each head by the token's angles, in float32. Shapes: x (B, T, heads, K)."""
    cos, sin = rotation
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query causal self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        self.head_dim = config.head_dim
        self.wqkv = nn.Linear(config.dim, sum(self.heads) * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, documents: Documents, cache: KeyValueCache | None) -> Tensor:
        """The heads' mixtures of values, which `wo` then brings into the residual stream. Shapes: -> (B, T, H*K)."""
        B, T, _ = x.shape
        q, k, v = self.wqkv(x).view(B, T, sum(self.heads), self.head_dim).split(self.heads, 2)  # (B, T, H|G|G, K)
        q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is None:
            out = attend(q, k, v, documents)
        else:
            keys, values, is_visible = cache.update(self.layer, k, v)
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), keys, values, attn_mask=is_visible,
                is_causal=is_visible is None and T > 1, enable_gqa=q.shape[2] != keys.shape[1],
            ).transpose(1, 2)  # fmt: skip
        return out.flatten(2)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(gate) * up). Source: section 2.2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w13 = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, -1)  # (B, T, F) each
        out: Tensor = self.w2(F.silu(gate) * up)
        return out


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.is_compiled = False
        self.is_checkpointed = False
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        documents: Documents = None,
        cache: KeyValueCache | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Shapes: x (B, T, D) -> (B, T, D), or (N, D) at `rows` (N,), places in B*T."""
        is_compiled = self.is_compiled and torch.is_grad_enabled()
        if rows is None:
            return self._run(_run_block_compiled if is_compiled else _run_block, x, rotation, documents, cache)
        mixed = self._run(_mix_compiled if is_compiled else _mix, x, rotation, documents, cache)
        return _add_up(self, x.flatten(0, 1).index_select(0, rows), mixed.flatten(0, 1).index_select(0, rows))

    def _run(self, function: Callable[..., Tensor], *inputs: object) -> Tensor:
        if self.is_checkpointed and torch.is_grad_enabled():
            out: Tensor = checkpoint(function, self, *inputs, use_reentrant=False)
            return out
        return function(self, *inputs)


def _run_block(
    block: Block, x: Tensor, rotation: Rotation, documents: Documents, cache: KeyValueCache | None
) -> Tensor:
    return _add_up(block, x, _mix(block, x, rotation, documents, cache))


def _mix(block: Block, x: Tensor, rotation: Rotation, documents: Documents, cache: KeyValueCache | None) -> Tensor:
    mixed: Tensor = block.attention(block.attention_norm(x), rotation, documents, cache)
    return mixed


def _add_up(block: Block, x: Tensor, mixed: Tensor) -> Tensor:
    """What of a block concerns each token alone."""
    x = x + block.attention.wo(mixed)
    out: Tensor = x + block.ffn(block.ffn_norm(x))
    return out


# One compiled function for all blocks of all models: the block is an argument and its weights are inputs of the graph,
# so that equal shapes share one graph, a block's hooks (FSDP's) stay outside, and a copied model runs its own weights.
_run_block_compiled = torch.compile(_run_block, dynamic=False)
_mix_compiled = torch.compile(_mix, dynamic=False)


class Transformer(nn.Module):
    """Tokens in, hidden states out; the loss and the sampler multiply by `head_weight` where they need logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        # No second module for tied weights: moving a model off the meta device would untie them.
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        # Not a buffer: `.to(bfloat16)` would round the angles and `to_empty` would leave garbage.
        self._frequencies = rope_frequencies(config)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm; with `rows`, at these places of the flattened tokens alone.

        Shapes: tokens, positions, document_ids (B, T) int64 -> (B, T, D); rows (N,) int64 -> (N, D).
        Why: padding needs no argument of its own; give it another document id than the text. Where the other places
        are not read, most of the last block needs not be computed for them: a tenth of an eight-layer model.
        """
        assert cache is None or document_ids is None, "a cache holds one document per row"
        rotation = self._rotation(tokens, positions)
        documents = prepare_documents(document_ids, self.is_compiled)
        x = self.embed(tokens)  # (B, T, D)
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            x = block(x, rotation, documents, cache, rows if layer == last else None)
        out: Tensor = self.norm(x)
        return out

    def _rotation(self, tokens: Tensor, positions: Tensor | None) -> Rotation:
        if self._frequencies.device != tokens.device:
            self._frequencies = self._frequencies.to(tokens.device)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
        angles = positions[:, :, None, None].float() * self._frequencies  # (B or 1, T, 1, K/2)
        return angles.cos(), angles.sin()

    @property
    def is_compiled(self) -> bool:
        """Whether training runs the compiled block."""
        first = self.blocks[0]
        assert isinstance(first, Block)
        return first.is_compiled

    @property
    def head_weight(self) -> Tensor:
        """The matrix from hidden states to logits. Shapes: (V, D)."""
        return self.embed.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token scores. Shapes: (..., D) -> (..., V) float32."""
        return F.linear(hidden, self.head_weight).float()

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations to train on one token of a sequence of `T` tokens."""
        return flops_per_token(self.config, T)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every weight from its own random stream, so that the result depends on neither device nor order.

        Choice: the paper does not give an initialisation. Normal with standard deviation 0.02; the two matrices of a
        layer that write into the residual stream are scaled by 1/sqrt(2L), so that its variance does not grow with
        depth; gains 1.
        """
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            std = residual_std if name.endswith((".wo.weight", ".w2.weight")) else INIT_STD
            generator = torch.Generator("cpu").manual_seed(derive_seed(seed, "init", name))
            drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu").normal_(
                0.0, std, generator=generator
            )
            parameter.copy_(drawn)


def compile_blocks(model: Transformer) -> None:
    """Run the blocks compiled when training; sampling, scoring and evaluation stay eager.

    Why: one block's graph serves all layers, so that compiling takes seconds and not the minute a whole model takes.
    Shapes are fixed in training; elsewhere they vary, and each new one would compile again.
    """
    for block in model.blocks:
        assert isinstance(block, Block)
        block.is_compiled = True


def checkpoint_blocks(model: Transformer) -> None:
    """Keep only each block's input for the backward pass and compute the rest again: a third more arithmetic."""
    for block in model.blocks:
        assert isinstance(block, Block)
        block.is_checkpointed = True
