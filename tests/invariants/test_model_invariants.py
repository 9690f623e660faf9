"""The same numbers however the computation is arranged: packed, padded, checkpointed, compiled."""

import copy

import pytest
import torch
from torch import Tensor

from groundup.data.batches import Batch
from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer, checkpoint_blocks, compile_blocks
from groundup.train.losses import lm_loss, token_logps

CONFIG = ModelConfig(vocab_size=61, dim=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48)


def make(config: ModelConfig = CONFIG) -> Transformer:
    model = Transformer(config)
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() == 2 else 1)
    return model


def draw_tokens(*shape: int) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def gradients(model: Transformer, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    lm_loss(model, batch).loss_sum.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    assert len(ours) > 10
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= tolerance * theirs[name].norm(), name


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_packed_documents_are_alone(wants_gradient: bool) -> None:
    model, tokens, lengths = make(), draw_tokens(1, 150), [1, 80, 69]
    parts = tokens.split(lengths, 1)
    document_ids = torch.cat([torch.full_like(part, i) for i, part in enumerate(parts)], 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.set_grad_enabled(wants_gradient):
        packed = model(tokens, positions, document_ids)
        alone = torch.cat([model(part) for part in parts], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    model, tokens = make(), draw_tokens(2, 40)
    is_real = torch.ones(2, 40, dtype=torch.int64)
    is_real[1, :13] = 0
    if side == "right":
        is_real = is_real.flip(1)
    positions = (is_real.cumsum(1) - 1).clamp(min=0)
    padded = model(tokens, positions, is_real)
    alone = model(tokens[1:, is_real[1] == 1])
    torch.testing.assert_close(padded[1:, is_real[1] == 1], alone, atol=1e-5, rtol=1e-5)


def test_padded_batch_has_the_gradients_of_its_rows() -> None:
    model, tokens = make(), draw_tokens(2, 31)
    is_real = torch.ones(2, 30, dtype=torch.bool)
    is_real[1, 17:] = False
    padded = gradients(model, Batch(tokens[:, :-1], tokens[:, 1:], is_real, None, is_real.long()))
    rows = [
        gradients(model, Batch(tokens[i : i + 1, :n], tokens[i : i + 1, 1 : n + 1], torch.ones(1, n, dtype=torch.bool)))
        for i, n in ((0, 30), (1, 17))
    ]
    assert_equal_gradients(padded, {name: rows[0][name] + rows[1][name] for name in rows[0]})


def test_training_attention_is_the_kernel_of_inference() -> None:
    model, tokens = make(), draw_tokens(2, 200)
    trained = model(tokens)
    with torch.no_grad():
        inferred = model(tokens)
    torch.testing.assert_close(trained, inferred, atol=1e-5, rtol=1e-5)


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    model, tokens = make(), draw_tokens(2, 20)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 19, dtype=torch.bool))
    plain = gradients(model, batch)
    calls = []
    checkpoint_blocks(model)
    model.blocks[0].ffn.register_forward_pre_hook(lambda *_: calls.append(1))
    recomputed = gradients(model, batch)
    assert len(calls) == 2, "once forward, once again in the backward pass"
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name])


@pytest.mark.slow
@pytest.mark.parametrize("has_documents", [False, True])
def test_compiled_is_eager_and_all_layers_share_one_graph(has_documents: bool) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model, tokens = make(), draw_tokens(2, 300)
    document_ids = (torch.arange(299)[None] // 70).expand(2, 299) if has_documents else None
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 299, dtype=torch.bool), None, document_ids)
    eager, logps = gradients(model, batch), token_logps(model, batch)
    compile_blocks(model)
    assert_equal_gradients(gradients(model, batch), eager, 1e-4)
    torch.testing.assert_close(token_logps(model, batch), logps, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2, "one block, one loss"
    clone = copy.deepcopy(model)
    assert_equal_gradients(gradients(clone, batch), eager, 1e-4)
    assert counters["stats"]["unique_graphs"] == 2
