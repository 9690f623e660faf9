"""llama2.c's flat files: a header and float32 tensors one after the other, versions 0 and 1, and its tokenizer file.

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
from groundup.model.config import ModelConfig
from groundup.model.weights import layout
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
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
"""Kinds of pieces, as numbered in sentencepiece models and GGUF files."""


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
            raise UserError(f"{path}: llama2.c version {version} is not supported", "version 2 is int8; export version 1")
    fields = _HEADER_V1.unpack(header)[2:] if version else (*_HEADER_V0.unpack(header[: _HEADER_V0.size]), None)
    config = _config(path, fields)
    start = _HEADER_BYTES_V1 if version else _HEADER_V0.size
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
            tensor.contiguous().numpy().astype("<f4", copy=False).tofile(file)


def read_llama2c_tokenizer(path: Path, vocab_size: int) -> dict[str, Any]:
    """The pieces of a tokenizer.bin, as the fields a GGUF file holds for a sentencepiece vocabulary.

    Raises: CorruptFile unless the file holds exactly `vocab_size` pieces.
    """
    data = path.read_bytes()
    pieces, scores, kinds = [], [], []
    at = struct.calcsize("<i")
    for number in range(vocab_size):
        score, length = _TOKEN.unpack_from(data, at) if at + _TOKEN.size <= len(data) else (0.0, -1)
        at += _TOKEN.size
        if length < 0 or at + length > len(data):
            raise CorruptFile(f"{path}: ends at piece {number} of {vocab_size}", "is it this model's tokenizer?")
        piece, kind = _piece(path, number, data[at : at + length])
        pieces.append(piece)
        scores.append(score)
        kinds.append(kind)
        at += length
    if at != len(data):
        raise CorruptFile(f"{path}: holds more than the model's {vocab_size} pieces", "is it this model's tokenizer?")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def write_llama2c_tokenizer(path: Path, fields: Mapping[str, Any]) -> None:
    """Write the pieces of a sentencepiece vocabulary, given as GGUF fields, as a tokenizer.bin."""
    if fields["tokenizer.ggml.model"] != "llama":
        raise UserError(f"{path}: llama2.c reads sentencepiece vocabularies only, this is a byte-level BPE", "write hf or gguf")
    rows = []
    for number, piece in enumerate(fields["tokenizer.ggml.tokens"]):
        text = f"\n{piece}\n" if number in (1, 2) else piece.replace("▁", " ")
        rows.append((fields["tokenizer.ggml.scores"][number], text.encode()))
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<i", max(len(text) for _, text in rows)))
        for score, text in rows:
            file.write(_TOKEN.pack(score, len(text)) + text)


def _piece(path: Path, number: int, raw: bytes) -> tuple[str, int]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise CorruptFile(f"{path}: piece {number} is not UTF-8 text") from None
    if number == 0:
        return text, _UNKNOWN
    if number in (1, 2):
        return text.strip("\n"), _CONTROL
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return text, _BYTE
    return text.replace(" ", "▁"), _NORMAL


def _config(path: Path, fields: tuple[int | None, ...]) -> ModelConfig:
    dim, ffn_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_positions, tied = (int(f or 0) for f in fields)
    if fields[-1] is None:
        # Version 0 says "untied" by a negative vocabulary size.
        tied, vocab_size = vocab_size > 0, abs(vocab_size)
    if n_heads < 1 or dim % n_heads:
        raise CorruptFile(f"{path}: not a llama2.c model (its header says dim {dim}, {n_heads} heads)")
    return layout.checked_config(
        path, vocab_size=vocab_size, dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads,
        head_dim=dim // n_heads, ffn_dim=ffn_dim, max_positions=max_positions, norm_eps=_NORM_EPS,
        rope_theta=_ROPE_THETA, tie_embeddings=bool(tied),
    )  # fmt: skip


def _order_v0(config: ModelConfig) -> Iterator[tuple[str, int]]:
    """Names in file order with their number of floats; the rotation tables are not a part of the model."""
    groups = (layout.ATTENTION_NORM, *_ATTENTION, layout.FFN_NORM, *_FFN)
    tables = (_TABLES, config.max_positions * config.head_dim)
    yield from _order(config, [layout.EMBED], groups, [layout.NORM], tables)


def _order_v1(config: ModelConfig) -> Iterator[tuple[str, int]]:
    yield from _order(config, [], (layout.ATTENTION_NORM, layout.FFN_NORM), [layout.NORM, layout.EMBED])
