"""Our logits are those of transformers' Llama with the same weights."""

import dataclasses

import pytest
import torch
from torch import Tensor

from groundup.model.config import ModelConfig, RopeScaling
from groundup.model.transformer import Transformer

transformers = pytest.importorskip("transformers")

BASE = ModelConfig(vocab_size=61, dim=32, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=8, ffn_dim=48, max_positions=64)
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
T = 19


def make_pair(config: ModelConfig) -> tuple[Transformer, torch.nn.Module]:
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {
            "rope_type": config.rope_scaling.kind,
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_positions,
        }
        if config.rope_scaling.kind == "linear":
            rope = {key: rope[key] for key in ("rope_type", "rope_theta", "factor")}
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_positions,
            rms_norm_eps=config.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=config.tie_embeddings,
            initializer_range=0.2,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    ours = Transformer(config)
    ours.load_state_dict(our_state(theirs.state_dict(), config))
    return ours, theirs


def our_state(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    ours = {"embed.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    if not config.tie_embeddings:
        ours["head.weight"] = state["lm_head.weight"]
    for i in range(config.n_layers):
        theirs = {
            key.removeprefix(f"model.layers.{i}."): value
            for key, value in state.items()
            if key.startswith(f"model.layers.{i}.")
        }
        block = {
            "attention_norm": theirs["input_layernorm.weight"],
            "attention.wqkv": torch.cat([theirs[f"self_attn.{x}_proj.weight"] for x in "qkv"]),
            "attention.wo": theirs["self_attn.o_proj.weight"],
            "ffn_norm": theirs["post_attention_layernorm.weight"],
            "ffn.w13": torch.cat([theirs["mlp.gate_proj.weight"], theirs["mlp.up_proj.weight"]]),
            "ffn.w2": theirs["mlp.down_proj.weight"],
        }
        ours |= {f"blocks.{i}.{name}.weight": value for name, value in block.items()}
    return ours


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2},
        {"n_kv_heads": 1},
        {"tie_embeddings": True},
        {"rope_theta": 1e6},
        {"norm_eps": 1e-2},
        {"head_dim": 16, "n_kv_heads": 2},
        {"rope_scaling": RopeScaling("linear", 4.0)},
        {"rope_scaling": LLAMA3, "rope_theta": 500.0},
    ],
    ids=["mha", "gqa", "mqa", "tied", "theta", "eps", "wide-heads", "linear-rope", "llama3-rope"],
)
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_logits(changes: dict[str, object], wants_gradient: bool) -> None:
    ours, theirs = make_pair(dataclasses.replace(BASE, **changes))  # type: ignore[arg-type]
    tokens = torch.randint(0, 61, (2, T), generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(wants_gradient):
        logits = ours.logits(ours(tokens))
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_padded_logits(side: str, wants_gradient: bool) -> None:
    ours, theirs = make_pair(dataclasses.replace(BASE, n_kv_heads=2))
    tokens = torch.randint(0, 61, (2, T), generator=torch.Generator().manual_seed(1))
    is_real = torch.ones(2, T, dtype=torch.int64)
    padded = slice(0, 6) if side == "left" else slice(T - 6, T)
    is_real[1, padded] = 0
    positions = (is_real.cumsum(-1) - 1).clamp(min=0)
    with torch.set_grad_enabled(wants_gradient):
        logits = ours.logits(ours(tokens, positions, is_real))
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=is_real, position_ids=positions).logits
    torch.testing.assert_close(logits[is_real == 1], expected[is_real == 1], atol=1e-4, rtol=0)
