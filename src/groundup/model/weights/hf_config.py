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
from groundup.model.weights.layout import checked_config

_REFUSED = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1, None),
}
"""Keys that change the arithmetic, and the values that leave it Llama 2's."""
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
_LLAMA3_KEYS = {
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_positions",
}


def read_hf_config(path: Path) -> ModelConfig:
    """The shape in a config.json.

    Raises: UserError naming file, key and value for anything whose arithmetic is not a Llama's.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}")
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise UserError(f"{path}: model_type = {kind!r} is not supported", f"supported: {', '.join(_DEFAULTS)}")
    values = {**_DEFAULTS[kind], **values}
    for key, allowed in _REFUSED.items():
        if key in values and values[key] not in allowed:
            raise UserError(f"{path}: {key} = {values[key]!r} is not supported", f"only {allowed[0]!r} is")
    dim, n_heads = _integer(path, values, "hidden_size"), _integer(path, values, "num_attention_heads")
    theta, scaling = _read_rope(path, values)
    return checked_config(
        path,
        vocab_size=_integer(path, values, "vocab_size"),
        dim=dim,
        n_layers=_integer(path, values, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=_integer(path, values, "num_key_value_heads", n_heads),
        head_dim=_integer(path, values, "head_dim", dim // n_heads),
        ffn_dim=_integer(path, values, "intermediate_size"),
        max_positions=_integer(path, values, "max_position_embeddings"),
        norm_eps=_number(path, values, "rms_norm_eps", _DEFAULT_NORM_EPS),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
    )


def _integer(path: Path, values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{path}: {key} = {value!r} must be a positive integer")
    return value


def _number(path: Path, values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{path}: {key} = {value!r} must be a number")
    return float(value)


def _read_rope(path: Path, values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = values.get(key) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: {key} = {rope!r} must be an object")
    top = _number(path, values, "rope_theta", _DEFAULT_ROPE_THETA)
    theta = _number(path, rope, "rope_theta", top)
    if values.get("rope_theta") is not None and theta != top:
        raise UserError(f"{path}: rope_theta = {top} but {key}.rope_theta = {theta}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{path}: {key}.partial_rotary_factor = {rope['partial_rotary_factor']!r} is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise UserError(f"{path}: {key}.rope_type = {kind!r} is not supported", "supported: default, linear, llama3")
    factor = _number(path, rope, "factor")
    if kind == "linear":
        return theta, RopeScaling("linear", factor)
    numbers = {ours: _number(path, rope, theirs) for theirs, ours in _LLAMA3_KEYS.items()}
    return theta, RopeScaling(
        "llama3",
        factor,
        low_freq_factor=numbers["low_freq_factor"],
        high_freq_factor=numbers["high_freq_factor"],
        original_max_positions=int(numbers["original_max_positions"]),
    )


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
        values.update({theirs: getattr(scaling, ours) for theirs, ours in _LLAMA3_KEYS.items()})
    return values
