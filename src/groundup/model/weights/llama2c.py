"""llama2.c's flat files: a header and float32 tensors one after the other, versions 0 and 1, and tokenizer.bin.

Source: llama2.c's export.py and run.c. Query and key rows are in Meta's order.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundup.base.errors import CorruptFile, UserError
from groundup.base.files import atomic_file
from groundup.model.config import ModelConfig, num_parameters
from groundup.model.weights import layout
from groundup.model.weights.fields import checked
from groundup.model.weights.layout import Stored, WeightsFile

_MAGIC = 0x616B3432
_HEADER_V0, _HEADER_V1 = struct.Struct("<7i"), struct.Struct("<Ii7iB")
_HEADER_BYTES_V1 = 256
_FLOAT_BYTES = 4
_NORM_EPS, _ROPE_THETA = 1e-5, 10_000.0
"""Constants of run.c, which the files do not hold."""
_ATTENTION, _FFN = (layout.WQ, layout.WK, layout.WV, layout.WO), (layout.W1, layout.W2, layout.W3)
_TABLES = "rotation tables"
_TOKEN = struct.Struct("<fi")


def open_llama2c(path: Path) -> WeightsFile:
    """Open a model file of version 0 or 1.

    Raises: CorruptFile if the size is not what the header says, UserError for another version.
    """
    with path.open("rb") as file:
        header = file.read(_HEADER_V1.size)
    if len(header) < _HEADER_V1.size:
        raise CorruptFile(f"{path}: {len(header)} bytes is too short for a llama2.c model")
    version = 0
    if struct.unpack_from("<I", header)[0] == _MAGIC:
        version = struct.unpack_from("<i", header, 4)[0]
        if version != 1:
            raise UserError(
                f"{path}: llama2.c version {version} is not supported", "version 2 is int8; export version 1"
            )
    fields = _HEADER_V1.unpack(header)[2:] if version else (*_HEADER_V0.unpack(header[: _HEADER_V0.size]), None)
    config = _config(path, fields)
    start = _HEADER_BYTES_V1 if version else _HEADER_V0.size
    if _FLOAT_BYTES * num_parameters(config) > path.stat().st_size:
        raise CorruptFile(
            f"{path}: shorter than the {num_parameters(config)} parameters of its header", "fetch it again"
        )
    order = list(_order_v1(config) if version else _order_v0(config))
    expected = start + _FLOAT_BYTES * sum(count for _, count in order)
    if path.stat().st_size != expected:
        raise CorruptFile(f"{path}: {path.stat().st_size} bytes, but its header needs {expected}", "fetch it again")
    parts, shapes = {}, layout.part_shapes(config)
    for name, count in order:
        if name in shapes:
            parts[name] = Stored(shapes[name], torch.float32, partial(_read, path, start, shapes[name]))
        start += _FLOAT_BYTES * count
    return WeightsFile(config, layout.from_interleaved_parts(config, parts), {})


def save_llama2c(path: Path, config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """Write a version 1 file (float32).

    Raises: UserError where run.c's constants differ from the model's.
    """
    _check_can_save(config)
    values = (config.dim, config.ffn_dim, config.n_layers, config.n_heads, config.n_kv_heads)
    header = _HEADER_V1.pack(_MAGIC, 1, *values, config.vocab_size, config.max_positions, config.tie_embeddings)
    tensors = dict(layout.unfuse(config, state))
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(header.ljust(_HEADER_BYTES_V1, b"\0"))
        for part, _ in _order_v1(config):
            heads = layout.rotary_heads(config, part)
            tensor = tensors[part].detach().to("cpu", torch.float32)
            tensor = tensor if heads is None else layout.to_interleaved(tensor, heads)
            file.write(tensor.contiguous().numpy().astype("<f4", copy=False).data)


def llama2c_tokenizer(fields: Mapping[str, Any]) -> bytes:
    """The tokenizer.bin of a vocabulary given as GGUF fields.

    Raises: UserError if it is not a SentencePiece vocabulary, the only kind run.c reads.
    """
    if fields["tokenizer.ggml.model"] != "llama":
        raise UserError("llama2.c reads SentencePiece vocabularies only, not byte-level BPE", "write hf or gguf")
    controls = (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"])
    texts = [
        (f"\n{piece}\n" if index in controls else piece.replace("▁", " ")).encode()
        for index, piece in enumerate(fields["tokenizer.ggml.tokens"])
    ]
    rows = zip(fields["tokenizer.ggml.scores"], texts, strict=True)
    longest = struct.pack("<i", max(map(len, texts)))
    return longest + b"".join(_TOKEN.pack(score, len(text)) + text for score, text in rows)


def _config(path: Path, fields: tuple[int | None, ...]) -> ModelConfig:
    dim, ffn_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_positions, tied = (int(f or 0) for f in fields)
    if fields[-1] is None:
        # Version 0 says "untied" by a negative vocabulary size.
        tied, vocab_size = vocab_size > 0, abs(vocab_size)
    if n_heads < 1 or dim % n_heads:
        raise CorruptFile(f"{path}: not a llama2.c model (its header says dim {dim}, {n_heads} heads)")
    return checked(
        path, ModelConfig, vocab_size=vocab_size, dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads,
        head_dim=dim // n_heads, ffn_dim=ffn_dim, max_positions=max_positions, norm_eps=_NORM_EPS,
        rope_theta=_ROPE_THETA, tie_embeddings=bool(tied),
    )  # fmt: skip


def _order_v0(config: ModelConfig) -> Iterator[tuple[str, int]]:
    """Names in file order, each with its number of floats; the rotation tables are no part of the model."""
    yield from _sized(config, layout.EMBED)
    for group in (layout.ATTENTION_NORM, *_ATTENTION, layout.FFN_NORM, *_FFN):
        yield from _sized(config, group)
    yield from _sized(config, layout.NORM)
    yield _TABLES, config.max_positions * config.head_dim
    if not config.tie_embeddings:
        yield from _sized(config, layout.HEAD)


def _order_v1(config: ModelConfig) -> Iterator[tuple[str, int]]:
    for group in (layout.ATTENTION_NORM, layout.FFN_NORM, layout.NORM, layout.EMBED, *_ATTENTION, *_FFN):
        yield from _sized(config, group)
    if not config.tie_embeddings:
        yield from _sized(config, layout.HEAD)


def _sized(config: ModelConfig, part: str) -> Iterator[tuple[str, int]]:
    """The part, in every block if it is a block's."""
    shapes = layout.part_shapes(config)
    names = [part] if part in shapes else [layout.block_part(layer, part) for layer in range(config.n_layers)]
    for name in names:
        yield name, math.prod(shapes[name])


def _read(path: Path, start_bytes: int, shape: tuple[int, ...]) -> Tensor:
    values = np.fromfile(path, dtype="<f4", count=math.prod(shape), offset=start_bytes)
    return torch.from_numpy(values).view(shape)


def _check_can_save(config: ModelConfig) -> None:
    differs = {
        "norm_eps": config.norm_eps != _NORM_EPS,
        "rope_theta": config.rope_theta != _ROPE_THETA,
        "rope_scaling": config.rope_scaling is not None,
        "head_dim": config.head_dim * config.n_heads != config.dim,
    }
    for name, is_different in differs.items():
        if is_different:
            raise UserError(f"llama2.c cannot run a model with {name} = {getattr(config, name)}", "write hf or gguf")
