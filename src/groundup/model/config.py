"""The shape of a Llama-family model: validated fields, the published presets, and what a shape costs."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal

from groundup.base.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """How rotation frequencies are slowed for contexts longer than those trained on.

    "linear" divides every frequency by `factor`. "llama3" divides those that make at most `low_freq_factor` turns in
    `original_max_positions`, keeps those that make at least `high_freq_factor`, and interpolates between them.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise UserError(f"rope_scaling.kind = {self.kind!r} is not supported", "use 'linear' or 'llama3'")
        if self.factor < 1:
            raise UserError(f"rope_scaling.factor = {self.factor} must be at least 1")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise UserError(
                f"rope_scaling: low_freq_factor {self.low_freq_factor} must be positive and below "
                f"high_freq_factor {self.high_freq_factor}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model; plain integers and floats, so that compiled code never meets a validating object.

    Source: section 2.2, Table 1, and the params.json files of the released models.
    """

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    max_positions: int = 4096
    """Context length in tokens that the model is meant for; not a limit of the code."""
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "max_positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"model: {name} = {value!r} must be a positive integer")
        for name in ("norm_eps", "rope_theta"):
            if not getattr(self, name) > 0:
                raise UserError(f"model: {name} = {getattr(self, name)!r} must be positive")
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"model: n_heads = {self.n_heads} is not a multiple of n_kv_heads = {self.n_kv_heads}",
                "every key/value head serves the same number of query heads",
            )
        if self.head_dim % 2:
            raise UserError(
                f"model: head_dim = {self.head_dim} must be even", "rotary positions turn pairs of channels"
            )


def ffn_width(dim: int, multiple_of: int = 256, multiplier: float | None = None) -> int:
    """Hidden width of the SwiGLU network: two thirds of 4 x dim, times `multiplier`, rounded up to `multiple_of`.

    Source: the released model code; 70B uses multiple_of 4096 and multiplier 1.3.
    """
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


def _released(dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int) -> ModelConfig:
    return ModelConfig(32_000, dim, n_layers, n_heads, n_kv_heads, 128, ffn_dim)


def _small(
    vocab_size: int, dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int, max_positions: int
) -> ModelConfig:
    return ModelConfig(
        vocab_size, dim, n_layers, n_heads, n_kv_heads, dim // n_heads, ffn_dim, max_positions, tie_embeddings=True
    )


PRESETS: dict[str, ModelConfig] = {
    # Llama 2; the shape of 34B, which was not released, is Code Llama's.
    "7b": _released(4096, 32, 32, 32, ffn_width(4096)),
    "13b": _released(5120, 40, 40, 40, ffn_width(5120)),
    "34b": _released(8192, 48, 64, 8, ffn_width(8192, multiplier=1.0)),
    "70b": _released(8192, 80, 64, 8, ffn_width(8192, 4096, 1.3)),
    # llama2.c's shapes, except 1m and 5m (ours) and 1b (TinyLlama's).
    "260k": _small(512, 64, 5, 8, 4, ffn_width(64, 4), 512),
    "1m": _small(4096, 128, 3, 4, 2, ffn_width(128, 8), 512),
    "5m": _small(4096, 256, 6, 4, 2, ffn_width(256, 16), 512),
    "15m": _small(32_000, 288, 6, 6, 6, ffn_width(288, 32), 256),
    "42m": _small(32_000, 512, 8, 8, 8, ffn_width(512, 32), 1024),
    "110m": _small(32_000, 768, 12, 12, 12, ffn_width(768, 32), 1024),
    "1b": ModelConfig(32_000, 2048, 22, 32, 4, 64, 5632, 2048),
}


def preset(name: str, **changes: Any) -> ModelConfig:
    """The preset `name` with fields replaced; head and FFN widths follow a changed `dim` or `n_heads` unless given.

    Raises: UserError for an unknown preset or field, naming the nearest known one.
    """
    if name not in PRESETS:
        raise UserError(f"unknown model preset {name!r}", _nearest(name, list(PRESETS)))
    base = PRESETS[name]
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    for key in changes:
        if key not in fields:
            raise UserError(f"unknown model key {key!r}", _nearest(key, fields))
    derived: dict[str, int] = {}
    dim, n_heads = changes.get("dim", base.dim), changes.get("n_heads", base.n_heads)
    if "n_heads" in changes and base.n_kv_heads == base.n_heads:
        derived["n_kv_heads"] = n_heads
    if "dim" in changes or "n_heads" in changes:
        if dim % n_heads and "head_dim" not in changes:
            raise UserError(f"model: dim = {dim} is not a multiple of n_heads = {n_heads}", "or give head_dim")
        derived["head_dim"] = dim // n_heads
    if "dim" in changes:
        derived["ffn_dim"] = ffn_width(dim, 32)
    return dataclasses.replace(base, **{**derived, **changes})


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _layer_matmul_parameters(config: ModelConfig) -> int:
    query, key_value = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return config.dim * (2 * query + 2 * key_value) + 3 * config.dim * config.ffn_dim


def num_parameters(config: ModelConfig) -> int:
    """Trainable parameters, embeddings included, tied ones counted once."""
    embeddings = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    return embeddings + config.n_layers * (_layer_matmul_parameters(config) + 2 * config.dim) + config.dim


def flops_per_token(config: ModelConfig, T: int) -> int:
    """Floating-point operations to train on one token of a sequence of `T` tokens: forward and backward.

    Why: matrix products only (2 operations a multiply-add, backward twice the forward, causal attention at half); what
    is computed again is not counted, so that the ratio to a matmul's rate is the model-FLOP utilisation.
    """
    matmuls = config.n_layers * _layer_matmul_parameters(config) + config.vocab_size * config.dim
    attention = config.n_layers * config.n_heads * config.head_dim * T
    return 6 * (matmuls + attention)
