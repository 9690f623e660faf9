"""The module's contract: names, shapes, initialisation, rotary angles, life on the meta device."""

import copy
import math

import pytest
import torch

from groundup.model.config import ModelConfig, RopeScaling, preset
from groundup.model.transformer import RMSNorm, Transformer, rope_frequencies, rotate

CONFIG = ModelConfig(vocab_size=40, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=24)


def make(config: ModelConfig = CONFIG, seed: int = 0) -> Transformer:
    model = Transformer(config)
    model.init_weights(seed)
    return model


def test_state_names_and_shapes() -> None:
    shapes = {name: tuple(value.shape) for name, value in make().state_dict().items()}
    block = {
        "attention_norm.weight": (16,),
        "attention.wqkv.weight": ((4 + 2 * 2) * 8, 16),
        "attention.wo.weight": (16, 32),
        "ffn_norm.weight": (16,),
        "ffn.w13.weight": (48, 16),
        "ffn.w2.weight": (16, 24),
    }
    expected = {"embed.weight": (40, 16), "norm.weight": (16,), "head.weight": (40, 16)}
    expected |= {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    assert shapes == expected


def test_tied_embeddings_share_one_weight() -> None:
    model = make(preset("260k"))
    assert model.head_weight is model.embed.weight
    assert "head.weight" not in model.state_dict()


def test_initialisation_is_a_function_of_the_seed_and_has_the_documented_spread() -> None:
    config = preset("1m")
    first, again, other = make(config, 3), make(config, 3), make(config, 4)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.embed.weight, other.embed.weight)
    block = first.blocks[0]
    assert first.embed.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.attention.wqkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.ffn.w2.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * config.n_layers), rel=0.02)
    assert torch.equal(first.norm.weight, torch.ones(config.dim))


def test_survives_the_meta_device_and_bfloat16() -> None:
    with torch.device("meta"):
        model = Transformer(CONFIG)
    model.to_empty(device="cpu")
    model.init_weights(0)
    tokens = torch.randint(0, 40, (2, 9))
    torch.testing.assert_close(model(tokens), make()(tokens), rtol=0, atol=0)
    assert model.to(torch.bfloat16)(tokens).dtype == torch.bfloat16
    assert model._frequencies.dtype == torch.float32


def test_a_copy_runs_its_own_weights() -> None:
    model = make()
    clone = copy.deepcopy(model)
    tokens = torch.randint(0, 40, (1, 5))
    before = model(tokens)
    with torch.no_grad():
        clone.norm.weight.zero_()
    assert torch.equal(model(tokens), before)
    assert clone(tokens).abs().max() == 0


def test_training_and_inference_compute_the_same() -> None:
    """There is no dropout: a policy that learns is the policy that sampled."""
    tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    model = make()
    assert torch.equal(model.train()(tokens), model.eval()(tokens))
    assert not [module for module in model.modules() if "dropout" in type(module).__name__.lower()]


@pytest.mark.parametrize("way", ["eager", "checkpointed", "no gradients"])
def test_hidden_states_at_some_places_are_those_of_the_whole_forward(way: str) -> None:
    tokens = torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 9, [0] * 7 + [1] * 2])
    rows = torch.tensor([3, 8, 17, 24, 26])
    model, other = make(), make()
    for block in (*model.blocks, *other.blocks):
        block.is_checkpointed = way == "checkpointed"
    with torch.set_grad_enabled(way != "no gradients"):
        some = model(tokens, document_ids=documents, rows=rows)
        whole = other(tokens, document_ids=documents).flatten(0, 1)[rows]
    assert some.shape == (5, 16)
    torch.testing.assert_close(some, whole, rtol=1e-6, atol=1e-6)
    if way == "no gradients":
        return
    some.square().sum().backward()
    whole.square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        if name != "head.weight":  # not part of the hidden states
            assert a.grad is not None
            assert b.grad is not None
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_norm_by_hand() -> None:
    norm = RMSNorm(2, eps=0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 10.0]))
    rms = math.sqrt((9 + 16) / 2)
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([3 / rms, 40 / rms]))


def test_rotation_by_hand_turns_channel_j_with_j_plus_half() -> None:
    config = ModelConfig(4, 4, 1, 1, 1, head_dim=4, ffn_dim=4, rope_theta=100.0)
    torch.testing.assert_close(rope_frequencies(config), torch.tensor([1.0, 0.1]))
    angles = torch.tensor([[[[3.0, 0.3]]]])  # position 3
    turned = rotate(torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 4), (angles.cos(), angles.sin()))
    expected = torch.tensor([math.cos(3), math.cos(0.3), math.sin(3), math.sin(0.3)])
    torch.testing.assert_close(turned.flatten(), expected)


def test_only_distances_between_positions_matter() -> None:
    tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9)[None].expand(2, 9)
    model = make()
    torch.testing.assert_close(model(tokens, positions + 100), model(tokens), atol=1e-4, rtol=1e-4)
    assert (model(tokens, positions * 2) - model(tokens)).abs().max() > 1e-4


def test_linear_scaling_divides_and_llama3_keeps_the_fast_ones() -> None:
    plain = rope_frequencies(CONFIG)
    linear = rope_frequencies(ModelConfig(40, 16, 2, 4, 2, 8, 24, rope_scaling=RopeScaling("linear", 4.0)))
    torch.testing.assert_close(linear, plain / 4)
    llama3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 512)
    scaled = rope_frequencies(ModelConfig(40, 16, 2, 4, 2, 8, 24, rope_scaling=llama3))
    assert scaled[0] == plain[0]  # 81 turns in 512 positions
    assert scaled[-1] == plain[-1] / 8  # 0.08 turns


def test_logits_are_float32() -> None:
    model = make().to(torch.bfloat16)
    logits = model.logits(model(torch.zeros(1, 3, dtype=torch.int64)))
    assert logits.dtype == torch.float32
    assert logits.shape == (1, 3, 40)
