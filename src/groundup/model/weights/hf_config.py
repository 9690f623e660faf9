"""config.json of Hugging Face Llama folders: what of it we can run, and how ours is written.

Source: transformers' LlamaConfig and MistralConfig (defaults of absent keys), versions 4 and 5.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from groundup.base.errors import UserError
from groundup.base.files import read_json
from groundup.model.config import ModelConfig, RopeScaling
from groundup.model.weights.fields import Fields, checked

_ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1, None),
}
"""Keys that may change the arithmetic, with the values that leave it Llama 2's."""
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu", "max_position_embeddings": 2048},
    # A Mistral without a sliding window is a Llama; its class has one unless config.json says null.
    "mistral": {
        "hidden_act": "silu",
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "num_key_value_heads": 8,
    },
}
_DEFAULT_NORM_EPS = 1e-6
_DEFAULT_ROPE_THETA = 10_000.0


def read_hf_config(path: Path) -> ModelConfig:
    """The shape in a config.json.

    Raises: UserError naming file, key and value for anything whose arithmetic is not a Llama's.
    """
    values = Fields(path, read_json(path)).values
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise UserError(f"{path}: model_type = {kind!r} is not supported", f"supported: {', '.join(_DEFAULTS)}")
    read = Fields(path, {**_DEFAULTS[kind], **values})
    for key, allowed in _ALLOWED.items():
        if key in read.values:
            read.require(key, allowed)
    dim, n_heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    theta, scaling = _read_rope(path, read)
    return checked(
        path,
        ModelConfig,
        vocab_size=read.integer("vocab_size"),
        dim=dim,
        n_layers=read.integer("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=read.integer("num_key_value_heads", n_heads),
        head_dim=read.integer("head_dim", dim // n_heads),
        ffn_dim=read.integer("intermediate_size"),
        max_positions=read.integer("max_position_embeddings"),
        norm_eps=read.number("rms_norm_eps", _DEFAULT_NORM_EPS),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=read.boolean("tie_word_embeddings", False),
    )


def _read_rope(path: Path, read: Fields) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    key = "rope_scaling" if read.values.get("rope_scaling") else "rope_parameters"
    values = read.values.get(key) or {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: {key} = {values!r} must be an object")
    rope = Fields(path, {f"{key}.{name}": value for name, value in values.items()}, f"{key}.")
    top = read.number("rope_theta", _DEFAULT_ROPE_THETA)
    theta = rope.number("rope_theta", top)
    if read.values.get("rope_theta") is not None and theta != top:
        raise UserError(f"{path}: rope_theta = {top} but {key}.rope_theta = {theta}")
    rope.require("partial_rotary_factor", (1,), 1)
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise UserError(f"{path}: {key}.rope_type = {kind!r} is not supported", "supported: default, linear, llama3")
    constants: dict[str, float] = {}
    if kind == "llama3":
        constants = {name: rope.number(name) for name in ("low_freq_factor", "high_freq_factor")}
        constants["original_max_positions"] = rope.integer("original_max_position_embeddings")
    return theta, checked(path, RopeScaling, kind, rope.number("factor"), **constants)


def write_hf_config(config: ModelConfig, dtype: torch.dtype, token_ids: Mapping[str, int | None]) -> dict[str, Any]:
    """config.json of a model.

    Why: rope and type are given under their old and new names, so that programs built on transformers 4 and 5 agree.
    """
    rope = _rope_values(config)
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": dtype_name,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "initializer_range": 0.02,
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.max_positions,
        "mlp_bias": False,
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rope_scaling": None if config.rope_scaling is None else rope,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype_name,
        "use_cache": True,
        "vocab_size": config.vocab_size,
        **token_ids,
    }


def _rope_values(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "default"}
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        values["low_freq_factor"] = scaling.low_freq_factor
        values["high_freq_factor"] = scaling.high_freq_factor
        values["original_max_position_embeddings"] = scaling.original_max_positions
    return values
