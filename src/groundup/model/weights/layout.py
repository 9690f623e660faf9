"""What every weight format has in common: the unfused tensors of a Llama ("parts") and how they become our state dict.

A part is named as in our state dict, with `wqkv` split into wq, wk, wv and `w13` into w1 (gate) and w3 (up). Parts and
state dict hold query and key rows in rotate-half order: channel j of a head is turned together with channel j + K/2.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundup.base.errors import UserError
from groundup.model.config import ModelConfig

EMBED, NORM, HEAD = "embed.weight", "norm.weight", "head.weight"
ATTENTION_NORM, FFN_NORM = "attention_norm.weight", "ffn_norm.weight"
WQ, WK, WV, WO = "attention.wq.weight", "attention.wk.weight", "attention.wv.weight", "attention.wo.weight"
W1, W2, W3 = "ffn.w1.weight", "ffn.w2.weight", "ffn.w3.weight"
BLOCK_PARTS = (ATTENTION_NORM, WQ, WK, WV, WO, FFN_NORM, W1, W3, W2)

_FUSED = {"attention.wqkv.weight": (WQ, WK, WV), "ffn.w13.weight": (W1, W3)}
_SHOWN_NAMES = 4
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file that has not been read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    """The type that holds its values without loss; float32 for quantised tensors."""
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class WeightsFile:
    """An opened model: its shapes, its tensors by part, and what else the format says."""

    config: ModelConfig
    parts: dict[str, Stored]
    generation: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest type that holds every stored tensor without loss."""
        found = torch.bfloat16 if not self.parts else next(iter(self.parts.values())).dtype
        for stored in self.parts.values():
            found = torch.promote_types(found, stored.dtype)
        return found


def cannot_write(path: Path, error: Exception) -> UserError:
    """For libraries that report a full disk in exceptions of their own."""
    return UserError(f"{path}: cannot be written ({error})", "is the disk full? nothing that was there before is lost")


def block_part(layer: int, part: str) -> str:
    """The name of a part of block `layer`."""
    return f"blocks.{layer}.{part}"


def part_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every part a file of this model holds, in model order; a tied model has no head of its own."""
    width, query = config.dim, config.n_heads * config.head_dim
    key_value = config.n_kv_heads * config.head_dim
    block: dict[str, tuple[int, ...]] = {
        ATTENTION_NORM: (width,),
        WQ: (query, width),
        WK: (key_value, width),
        WV: (key_value, width),
        WO: (width, query),
        FFN_NORM: (width,),
        W1: (config.ffn_dim, width),
        W3: (config.ffn_dim, width),
        W2: (width, config.ffn_dim),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBED: (config.vocab_size, width)}
    for layer in range(config.n_layers):
        shapes.update({block_part(layer, part): shape for part, shape in block.items()})
    shapes[NORM] = (width,)
    if not config.tie_embeddings:
        shapes[HEAD] = (config.vocab_size, width)
    return shapes


def match_parts(
    where: Path, config: ModelConfig, found: Mapping[str, Stored], foreign_name: Callable[[str], str]
) -> dict[str, Stored]:
    """The tensors of a file by part.

    `found` is by the format's own names, `foreign_name` gives such a name for a part.

    Raises: UserError for a missing, unexpected or wrongly shaped tensor, before anything is read.
    """
    if config.n_layers > len(found):
        raise UserError(f"{where}: {len(found)} tensors cannot be a model of {config.n_layers} layers")
    shapes = part_shapes(config)
    names = {foreign_name(part): part for part in shapes}
    missing, unexpected = [n for n in names if n not in found], [n for n in found if n not in names]
    if missing or unexpected:
        groups = {"missing": missing, "unexpected": unexpected}
        problems = "; ".join(f"{word} {_listed(group)}" for word, group in groups.items() if group)
        raise UserError(f"{where}: tensors do not fit the model's configuration: {problems}")
    for name, part in names.items():
        has_shape, needs_shape = list(found[name].shape), list(shapes[part])
        if has_shape != needs_shape:
            raise UserError(f"{where}: tensor {name} has shape {has_shape}, the configuration needs {needs_shape}")
    return {part: found[name] for name, part in names.items()}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


def fuse(config: ModelConfig, parts: Mapping[str, Stored], dtype: torch.dtype) -> dict[str, Tensor]:
    """Read every part once, into memory of our own, as the state dict of a `Transformer` in `dtype`.

    Why: nothing keeps pointing into a mapped file, and at no time are two copies of the model in memory.
    """
    state: dict[str, Tensor] = {}
    for name in state_names(config):
        sources = [parts[part] for part in fused_parts(name)]
        rows = sum(source.shape[0] for source in sources)
        target = torch.empty((rows, *sources[0].shape[1:]), dtype=dtype)
        start = 0
        for source in sources:
            target[start : start + source.shape[0]].copy_(source.read())
            start += source.shape[0]
        state[name] = target
    return state


def unfuse(config: ModelConfig, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every part of a state dict with its tensor, as views, in model order."""
    shapes = part_shapes(config)
    for name in state_names(config):
        start = 0
        for part in fused_parts(name):
            stop = start + shapes[part][0]
            yield part, state[name][start:stop]
            start = stop
        assert start == state[name].shape[0], f"{name} has {state[name].shape[0]} rows, not {start}"


def state_names(config: ModelConfig) -> list[str]:
    """Names in our state dict, in model order, without the head of a tied model."""
    names: dict[str, None] = {}
    fused_name = {part: name for name, group in _FUSED.items() for part in group}
    for part in part_shapes(config):
        prefix, local = _split_block(part)
        names[prefix + fused_name.get(local, local)] = None
    return list(names)


def fused_parts(name: str) -> tuple[str, ...]:
    """The parts whose rows, in this order, make up a tensor of our state dict."""
    prefix, local = _split_block(name)
    return tuple(prefix + part for part in _FUSED.get(local, (local,)))


def _split_block(name: str) -> tuple[str, str]:
    matched = re.match(r"(blocks\.\d+\.)(.*)", name)
    return (matched[1], matched[2]) if matched else ("", name)


def rotary_heads(config: ModelConfig, part: str) -> int | None:
    """How many heads' rows a part holds if rotary embedding turns them, else None."""
    local = _split_block(part)[1]
    return {WQ: config.n_heads, WK: config.n_kv_heads}.get(local)


def to_rotate_half(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from Meta's order (turned channels adjacent) to ours (half a head apart).

    Shapes: (heads*K, D) -> (heads*K, D).
    """
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `to_rotate_half`."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def from_interleaved_parts(config: ModelConfig, parts: Mapping[str, Stored]) -> dict[str, Stored]:
    """Parts whose query and key rows are in Meta's order, as parts in ours."""
    return {part: _unpermuted(stored, rotary_heads(config, part)) for part, stored in parts.items()}


def _unpermuted(stored: Stored, heads: int | None) -> Stored:
    if heads is None:
        return stored
    return Stored(stored.shape, stored.dtype, lambda: to_rotate_half(stored.read(), heads))


def unfuse_interleaved(config: ModelConfig, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """`unfuse` with query and key rows in Meta's order."""
    for part, tensor in unfuse(config, state):
        heads = rotary_heads(config, part)
        yield part, tensor if heads is None else to_interleaved(tensor, heads)
