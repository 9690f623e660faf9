"""Converted weights: the kernels against plain products, rows on their own, memory, and error on a trained model."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from groundup.base.errors import UserError
from groundup.infer.quantize import (
    INT4_GROUP,
    Int4Linear,
    Int8Linear,
    PackedLinear,
    Weights,
    make_linear,
    prepare,
    quantize_int4,
    quantize_int8,
)
from groundup.infer.scoring import score_tokens
from groundup.model.checkpoint import Checkpoint, load_checkpoint
from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())


def test_int8_rounds_to_the_nearest_of_255_steps() -> None:
    codes, scales = quantize_int8(torch.tensor([[1.27, -0.01, 0.004], [0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[127, -1, 0], [0, 0, 0]]
    assert scales[0].item() == pytest.approx(0.01)


def test_int4_codes_stand_for_the_weights_to_half_a_step() -> None:
    weight = gaussian(16, 64)
    codes, scales_and_offsets = quantize_int4(weight, INT4_GROUP)
    assert codes.min() >= 0
    assert codes.max() <= 15
    scale, offset = scales_and_offsets.transpose(0, 1)[..., None, :].unbind(-1)  # (out, groups, 1)
    restored = (codes.view(16, 2, 32) - 8) * scale + offset
    error = (restored - weight.view(16, 2, 32)).abs()
    assert (error <= 0.55 * scale + 0.02).all()


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_kernels_compute_the_product(rows: int) -> None:
    weight, x = gaussian(48, 64), gaussian(rows, 3, 64, seed=1)
    expected = x @ weight.T
    for layer, bound in (
        (PackedLinear(weight), 1e-6), (Int8Linear(weight), 0.015), (Int4Linear(weight), 0.12),
        (PackedLinear(weight.bfloat16()), 0.01),
    ):  # fmt: skip
        is_bf16 = isinstance(layer, Int4Linear) or bound == 0.01
        actual = layer(x.bfloat16() if is_bf16 else x)
        assert actual.shape == (rows, 3, 48)
        assert relative_error(actual, expected) < bound


def test_int8_equals_the_integer_arithmetic_it_stands_for() -> None:
    weight, x = gaussian(48, 64), gaussian(5, 64, seed=1)
    x[3] = 0
    codes, scales = quantize_int8(weight)
    steps = x.abs().amax(1, keepdim=True).clamp(min=1e-10) / 127
    activations = (x / steps + 0.5).floor()
    expected = (activations @ codes.float().T) * scales * steps
    torch.testing.assert_close(Int8Linear(weight)(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_a_row_does_not_depend_on_the_others(weights: Weights) -> None:
    layer = make_linear(gaussian(96, 64), weights)
    x = gaussian(40, 64, seed=2) * torch.logspace(-3, 3, 40)[:, None]
    x = x if weights == "int8" else x.bfloat16()
    together = layer(x)
    assert torch.equal(torch.cat([layer(row[None]) for row in x]), together)


def test_layers_that_int4_cannot_take_stay_bf16() -> None:
    assert isinstance(make_linear(gaussian(16, 64), "int4"), Int4Linear)
    for shape in ((16, 40), (20, 64)):
        odd = make_linear(gaussian(*shape), "int4")
        assert not isinstance(odd, Int4Linear)
        x = gaussian(3, shape[1], seed=4)
        assert relative_error(odd(x.bfloat16()), F.linear(x, gaussian(*shape))) < 0.01


@pytest.mark.parametrize("tie", [True, False])
def test_a_prepared_model_shares_the_embedding_and_is_smaller(tie: bool) -> None:
    model = Transformer(ModelConfig(512, 64, 2, 4, 2, 16, 128, 64, tie_embeddings=tie))
    model.init_weights(0)
    sizes = {}
    with torch.inference_mode():
        expected = model.logits(model(torch.arange(12)[None]))
        for weights, bound in (("as is", 0), ("fp32", 1e-5), ("bf16", 0.03), ("int8", 0.03), ("int4", 0.25)):
            prepared = prepare(model, weights)
            assert prepared.model.embed.weight.data_ptr() == model.embed.weight.data_ptr()
            actual = prepared.head(prepared.model(torch.arange(12)[None]))
            assert relative_error(actual, expected) <= bound, weights
            sizes[weights] = prepared.weight_bytes
    embedding_bytes = 512 * 64 * 4
    assert sizes["fp32"] > sizes["bf16"] > sizes["int8"] > sizes["int4"] > embedding_bytes
    linears = 2 * (64 * 128 + 64 * 64 + 3 * 64 * 128) + 512 * 64
    assert sizes["int8"] == pytest.approx(embedding_bytes + linears * 1.05, rel=0.05)


def test_unknown_forms_are_refused() -> None:
    model = Transformer(ModelConfig(64, 32, 1, 2, 2, 16, 64))
    with pytest.raises(UserError, match="int2"):
        prepare(model, "int2")  # type: ignore[arg-type]
    with torch.device("meta"):
        elsewhere = Transformer(ModelConfig(64, 32, 1, 2, 2, 16, 64))
    with pytest.raises(UserError, match="CPU only"):
        prepare(elsewhere, "int8")


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Checkpoint:
    return load_checkpoint(shared_data / "models" / "stories260K.bin")


def test_loss_on_a_trained_model_stays_close(stories: Checkpoint) -> None:
    """Nats per token on the model's own greedy story."""
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    tokens = [stories.tokenizer.bos_id, *stories.tokenizer.encode(story)]
    exact = -torch.cat(score_tokens(stories.model, [tokens])).mean().item()
    assert exact < 2
    for weights, bound in (("fp32", 1e-4), ("bf16", 0.03), ("int8", 0.03), ("int4", 0.6)):
        prepared = prepare(stories.model, weights)
        with torch.inference_mode():
            logits = prepared.head(prepared.model(torch.tensor([tokens[:-1]]))).float()
        loss = F.cross_entropy(logits[0], torch.tensor(tokens[1:])).item()
        assert abs(loss - exact) < bound, weights
