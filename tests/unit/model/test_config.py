"""Shapes, presets and their costs, against the released models' numbers."""

import dataclasses

import pytest

from groundup.base.errors import UserError
from groundup.model.config import PRESETS, ModelConfig, RopeScaling, ffn_width, flops_per_token, num_parameters, preset
from groundup.model.transformer import Transformer


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("7b", 6_738_415_616),
        ("13b", 13_015_864_320),
        ("34b", 33_743_970_304),
        ("70b", 68_976_648_192),
        ("15m", 15_191_712),
        ("1b", 1_100_048_384),
    ],
)
def test_parameters_of_published_models(name: str, parameters: int) -> None:
    assert num_parameters(PRESETS[name]) == parameters


@pytest.mark.parametrize("name", ["260k", "1m", "5m", "15m", "42m"])
def test_num_parameters_is_what_the_model_holds(name: str) -> None:
    model = Transformer(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == num_parameters(PRESETS[name])


@pytest.mark.parametrize(("name", "millions"), [("260k", 0.26), ("1m", 1), ("5m", 5), ("42m", 42), ("110m", 110)])
def test_names_of_small_presets_say_their_size(name: str, millions: float) -> None:
    assert num_parameters(PRESETS[name]) / 1e6 == pytest.approx(millions, rel=0.1)


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "width"),
    [(4096, 256, None, 11008), (5120, 256, None, 13824), (8192, 256, 1.0, 22016), (8192, 4096, 1.3, 28672)],
)
def test_ffn_rule(dim: int, multiple_of: int, multiplier: float | None, width: int) -> None:
    assert ffn_width(dim, multiple_of, multiplier) == width


def test_flops_by_hand() -> None:
    """One layer, one head: 2 x (each matrix) + scores and mixture over half of T, three times (forward, backward)."""
    config = ModelConfig(
        vocab_size=10, dim=4, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=4, ffn_dim=6, tie_embeddings=True
    )
    forward = 2 * (4 * 4 * 4 + 3 * 4 * 6 + 10 * 4) + 2 * 2 * 4 * 8 / 2
    assert flops_per_token(config, 8) == 3 * forward


def test_preset_changes() -> None:
    assert preset("15m", vocab_size=4096) == dataclasses.replace(PRESETS["15m"], vocab_size=4096)
    wider = preset("15m", dim=512, n_heads=8)
    assert (wider.head_dim, wider.n_kv_heads, wider.ffn_dim) == (64, 8, 1376)
    assert preset("1m", dim=256).n_kv_heads == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_kv_heads": 3}, "n_kv_heads = 3"),
        ({"head_dim": 7}, "head_dim = 7"),
        ({"n_layers": 0}, "n_layers = 0"),
        ({"dim": 96.0}, "dim = 96.0"),
        ({"norm_eps": 0.0}, "norm_eps"),
    ],
)
def test_wrong_shapes_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        dataclasses.replace(PRESETS["1m"], **changes)  # type: ignore[arg-type]


def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean '70b'"):
        preset("70bb")
    with pytest.raises(UserError, match="did you mean 'n_layers'"):
        preset("1m", n_layer=2)
    with pytest.raises(UserError, match="multiple of n_heads"):
        preset("1m", dim=130)


def test_rope_scaling_is_checked() -> None:
    with pytest.raises(UserError, match="'yarn' is not supported"):
        RopeScaling("yarn", 2.0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least 1"):
        RopeScaling("linear", 0.5)
    with pytest.raises(UserError, match="low_freq_factor"):
        RopeScaling("llama3", 8.0, 4.0, 1.0)
