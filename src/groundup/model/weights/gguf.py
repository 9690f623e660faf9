"""Models in GGUF files, llama.cpp's format: weights, shape and vocabulary in one file.

Source: llama.cpp's converter, which puts query and key rows of a Llama into Meta's order.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType
from gguf.quants import quant_shape_to_byte_shape, quantize
from torch import Tensor

from groundup.base.errors import UserError
from groundup.base.files import atomic_file
from groundup.base.progress import say, track
from groundup.model.config import ModelConfig, RopeScaling
from groundup.model.transformer import rope_frequencies
from groundup.model.weights import layout
from groundup.model.weights.fields import Fields, checked
from groundup.model.weights.gguf_file import read_gguf_file
from groundup.model.weights.layout import Stored, WeightsFile

Quantisation = Literal["f32", "f16", "bf16", "q8_0"]

_ARCHITECTURE = "llama"
_TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_Q8_BLOCK = 32
_ROPE_FACTORS = "rope_freqs.weight"
_TOP_NAMES = {layout.EMBED: "token_embd.weight", layout.NORM: "output_norm.weight", layout.HEAD: "output.weight"}
_BLOCK_NAMES = {
    layout.ATTENTION_NORM: "attn_norm.weight",
    layout.WQ: "attn_q.weight",
    layout.WK: "attn_k.weight",
    layout.WV: "attn_v.weight",
    layout.WO: "attn_output.weight",
    layout.FFN_NORM: "ffn_norm.weight",
    layout.W1: "ffn_gate.weight",
    layout.W3: "ffn_up.weight",
    layout.W2: "ffn_down.weight",
}


def gguf_name(part: str) -> str:
    """The tensor name in GGUF files."""
    if part in _TOP_NAMES:
        return _TOP_NAMES[part]
    _, layer, local = part.split(".", 2)
    return f"blk.{layer}.{_BLOCK_NAMES[local]}"


def open_gguf(path: Path) -> tuple[WeightsFile, dict[str, Any]]:
    """Open a file of architecture "llama"; also returns its `tokenizer.*` fields.

    Raises: UserError for another architecture or arithmetic that is not a Llama's, CorruptFile for a broken file.
    """
    file = read_gguf_file(path)
    tensors = dict(file.tensors)
    factors = tensors.pop(_ROPE_FACTORS, None)
    config = _read_config(path, file.fields, tensors)
    if factors is not None:
        config = _with_rope_factors(path, config, factors)
    parts = layout.match_parts(path, config, tensors, gguf_name)
    fields = {key: value for key, value in file.fields.items() if key.startswith("tokenizer.")}
    return WeightsFile(config, layout.from_interleaved_parts(config, parts), {}), fields


def save_gguf(
    path: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    vocabulary: Mapping[str, Any],
    *,
    name: str,
    quantisation: Quantisation = "f16",
) -> None:
    """Write a file that llama.cpp opens; `vocabulary` are its `tokenizer.*` fields. Norms stay float32.

    Choice: q8_0 needs rows of a multiple of 32 values; matrices with other rows are written as f16, and said so.
    """
    kind, file_type = _TYPES[quantisation]
    kinds = {part: _tensor_kind(shape, kind) for part, shape in layout.part_shapes(config).items()}
    odd = [part for part, other in kinds.items() if other not in (kind, GGMLQuantizationType.F32)]
    if odd:
        say(f"note: rows of {len(odd)} matrices, e.g. {gguf_name(odd[0])}, do not fill q8_0 blocks; they stay f16")
    with atomic_file(path) as temporary:
        writer = GGUFWriter(temporary, _ARCHITECTURE)
        _add_config(writer, config, name, file_type)
        for key, value in vocabulary.items():
            _add_field(writer, key, value)
        factors = _rope_factors(config)
        if factors is not None:
            writer.add_tensor_info(_ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        shapes = layout.part_shapes(config)
        for part, tensor_kind in kinds.items():
            _add_tensor_info(writer, gguf_name(part), shapes[part], tensor_kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        parts = layout.unfuse_interleaved(config, state)
        try:
            for part, tensor in track(parts, f"writing {path.name}", len(kinds), "tensors"):
                values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
                writer.write_tensor_data(quantize(values, kinds[part]))
        except OSError as error:  # numpy's, which says how much it wrote and not why
            raise layout.cannot_write(path, error) from None
        finally:
            writer.close()


def _tensor_kind(shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if kind == GGMLQuantizationType.Q8_0 and shape[-1] % _Q8_BLOCK:
        return GGMLQuantizationType.F16
    return kind


def _add_tensor_info(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
    byte_shape = quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), math.prod(byte_shape), raw_dtype=kind)


def _add_config(writer: GGUFWriter, config: ModelConfig, name: str, file_type: LlamaFileType) -> None:
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)


def _add_field(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        assert isinstance(value, list), f"{key} is a {type(value).__name__}"
        writer.add_array(key, value)


def _read_config(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, Stored]) -> ModelConfig:
    architecture = fields.get("general.architecture")
    if architecture != _ARCHITECTURE:
        raise UserError(f"{path}: architecture {architecture!r} is not supported", f"supported: {_ARCHITECTURE}")
    if fields.get("split.count", 1) != 1:
        raise UserError(f"{path}: one of {fields['split.count']} pieces", "merge them with llama.cpp's gguf-split")
    embedding = tensors.get(_TOP_NAMES[layout.EMBED])
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{path}: missing tensor {_TOP_NAMES[layout.EMBED]}")
    read = Fields(path, fields, f"{_ARCHITECTURE}.")
    for key, plain in (("expert_count", 0), ("attention.sliding_window", 0), ("rope.scale_linear", 1.0)):
        read.require(key, (plain,), plain)
    n_heads = read.integer("attention.head_count")
    head_dim = read.integer("attention.key_length", embedding.shape[1] // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        read.require(key, (head_dim,), head_dim)
    return checked(
        path,
        ModelConfig,
        vocab_size=embedding.shape[0],
        dim=read.integer("embedding_length"),
        n_layers=read.integer("block_count"),
        n_heads=n_heads,
        n_kv_heads=read.integer("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        ffn_dim=read.integer("feed_forward_length"),
        max_positions=read.integer("context_length"),
        norm_eps=_shortest(read.number("attention.layer_norm_rms_epsilon")),
        rope_theta=read.number("rope.freq_base", 10_000.0),
        rope_scaling=_read_scaling(path, read),
        tie_embeddings=_TOP_NAMES[layout.HEAD] not in tensors,
    )


def _read_scaling(path: Path, read: Fields) -> RopeScaling | None:
    kind = read.values.get(f"{_ARCHITECTURE}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise UserError(
            f"{path}: {_ARCHITECTURE}.rope.scaling.type = {kind!r} is not supported", "supported: none, linear"
        )
    return checked(path, RopeScaling, "linear", read.number("rope.scaling.factor"))


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_factors(config: ModelConfig) -> np.ndarray | None:
    """What llama.cpp divides each frequency by, for Llama 3's scaling. Shapes: (K/2,) float32."""
    if config.rope_scaling is None or config.rope_scaling.kind != "llama3":
        return None
    plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    return (plain / rope_frequencies(config)).numpy()


def _with_rope_factors(path: Path, config: ModelConfig, stored: Stored) -> ModelConfig:
    """The configuration whose scaling gives the stored factors.

    Choice: files keep the factors, not what they were made of; only Llama 3's own constants are recognised.
    """
    factors = stored.read().float().flatten()
    scaling = RopeScaling("llama3", factor=max(1.0, _shortest(float(factors.max()))))
    scaled = dataclasses.replace(config, rope_scaling=scaling)
    expected = torch.from_numpy(_rope_factors(scaled))
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-4):
        raise UserError(f"{path}: tensor {_ROPE_FACTORS} is not Llama 3's rope scaling", "load the Hugging Face folder")
    return scaled
