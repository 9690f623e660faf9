"""The compiled kernels against float64, and the whole step against torch's."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from groundup.base.generation import SamplingParams
from groundup.infer import engine as engine_module
from groundup.infer.engine import Engine
from groundup.infer.kernels import native
from groundup.infer.kernels.decode import decode_step
from groundup.infer.kernels.native import StepKernels, load_kernels, step_kernels
from groundup.infer.quantize import WEIGHTS, Weights, prepare
from groundup.model.cache import SlotCache
from groundup.model.config import ModelConfig
from groundup.model.transformer import RMSNorm, Transformer, rope_frequencies

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def kernels(request: pytest.FixtureRequest) -> StepKernels:
    found = load_kernels(request.param)
    assert found is not None
    return found


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: torch.Tensor, expected: torch.Tensor, kernels: StepKernels) -> None:
    tolerance = TOLERANCE[kernels.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@needs_compiler
@torch.inference_mode()
@pytest.mark.parametrize(("rows", "width"), [(1, 48), (3, 51), (40, 576)])
def test_norms_and_gates_against_float64(kernels: StepKernels, rows: int, width: int) -> None:
    x, addend = drawn(rows, width) * 3, drawn(rows, width, seed=1).to(kernels.dtype)
    norm = RMSNorm(width, 1e-5)
    norm.weight = torch.nn.Parameter(drawn(width, seed=2).to(kernels.dtype), requires_grad=False)
    total = x.double() + addend.double()
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    found = kernels.add_rms_norm(x, addend, norm)
    assert found.dtype == kernels.dtype
    torch.testing.assert_close(x.double(), total, rtol=1e-6, atol=1e-6)
    assert_close(found, expected, kernels)
    assert torch.equal(kernels.add_rms_norm(x, None, norm), found), "nothing is added a second time"

    both = (drawn(rows, 2 * width) * 20).to(kernels.dtype)
    gate, up = both.double().chunk(2, -1)
    assert_close(kernels.silu_mul(both), gate * gate.sigmoid() * up, kernels)


@needs_compiler
def test_rows_become_the_bytes_that_torch_makes() -> None:
    kernels = load_kernels(torch.float32)
    assert kernels is not None
    x = drawn(37, 130)
    x[3] = 0
    codes, largest = kernels.quantize_rows(x)
    top = x.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    assert torch.equal(largest, top)
    exact = x.double() / top.double() * 127 + 128
    assert float((codes.double() - exact).abs().max()) <= 0.5 + 1e-4
    assert (int(codes.min()), int(codes.max())) == (1, 255)
    assert (codes[3] == 128).all()


@needs_compiler
@pytest.mark.parametrize(("H", "G", "K"), [(4, 2, 16), (9, 3, 64), (8, 8, 48), (6, 1, 128), (2, 1, 256)])
def test_attention_against_float64(kernels: StepKernels, H: int, G: int, K: int) -> None:
    """At the first position, within the first tile, at its borders, and several tiles on."""
    positions = torch.tensor([0, 5, 63, 64, 127, 200])
    B, S = len(positions), 224
    qkv = (drawn(B, (H + 2 * G) * K) * 2).to(kernels.dtype)
    keys, values = (drawn(B + 1, G, S, K, seed=seed).to(kernels.dtype) for seed in (1, 2))
    angles = positions[:, None] * torch.linspace(1, 0.01, K // 2)
    before = keys.clone(), values.clone()
    out = kernels.attend(qkv, angles.cos(), angles.sin(), keys, values, positions).view(B, H, K)

    def turned(heads: torch.Tensor, row: int) -> torch.Tensor:
        first, second = heads.chunk(2, -1)
        cos, sin = angles[row].cos().double(), angles[row].sin().double()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    for row, position in enumerate(positions.tolist()):
        q, k, v = qkv[row].view(-1, K).double().split([H, G, G])
        stored = turned(k, row).to(kernels.dtype)
        torch.testing.assert_close(keys[row, :, position], stored, rtol=TOLERANCE[kernels.dtype], atol=1e-5)
        assert torch.equal(values[row, :, position], v.to(kernels.dtype))
        end = position + 1
        seen_keys, seen_values = keys[row, :, :end].double(), values[row, :, :end].double()
        scores = torch.einsum("gpd,gsd->gps", turned(q, row).view(G, H // G, K), seen_keys) / K**0.5
        expected = torch.einsum("gps,gsd->gpd", scores.softmax(-1), seen_values).reshape(H, K)
        assert_close(out[row], expected, kernels)
        # Nothing but the new token's place was written.
        keys[row, :, position], values[row, :, position] = before[0][row, :, position], before[1][row, :, position]
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


@needs_compiler
def test_what_is_not_a_number_stays_so(kernels: StepKernels) -> None:
    qkv = torch.ones(1, 3 * 16, dtype=kernels.dtype)
    qkv[0, 3] = float("nan")
    keys, values = torch.zeros(2, 1, 1, 32, 16, dtype=kernels.dtype)
    out = kernels.attend(qkv, torch.ones(1, 8), torch.zeros(1, 8), keys, values, torch.tensor([4]))
    assert out.isnan().all()


@needs_compiler
@pytest.mark.parametrize("weights", WEIGHTS)
@torch.inference_mode()
def test_a_step_gives_what_torch_gives(weights: Weights) -> None:
    """The same tokens at the same places, of which the earlier ones were computed with other weights."""
    config = ModelConfig(260, 64, 2, 4, 2, 16, 128, 64)
    model = Transformer(config).eval()
    model.init_weights(3)
    prepared = prepare(model, weights)
    dtype = prepared.model.norm.weight.dtype
    frequencies, starts = rope_frequencies(config), [3, 40, 11]
    found = []
    for kernels in (step_kernels(config, dtype, CPU), None):
        cache = SlotCache(config, 4, dtype if kernels else torch.float32, CPU)
        cache.reserve(4, 48)
        for seed, stored in enumerate((*cache.keys, *cache.values)):
            stored.copy_(drawn(*stored.shape, seed=seed).to(dtype))
        steps = []
        for step in range(4):
            tokens = torch.tensor([7, 200, 31]) + step
            steps.append(
                decode_step(prepared.model, cache, tokens, [s + step for s in starts], frequencies, kernels).float()
            )
        found.append(torch.stack(steps))
    ours, theirs = found
    error = float((ours - theirs).norm() / theirs.norm())
    assert error < (1e-5 if dtype == torch.float32 and weights != "int8" else 0.02)
    assert float(theirs.std()) > 0.1


@needs_compiler
def test_engines_with_and_without_give_the_same(byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(ModelConfig(260, 64, 2, 4, 2, 16, 128, 64)).eval()
    model.init_weights(3)
    params = SamplingParams(max_new_tokens=20, temperature=0, want_logps=True)
    answers = []
    for is_switched_off in (False, True):
        if is_switched_off:
            monkeypatch.setattr(engine_module, "step_kernels", lambda *_: None)
        engine = Engine(model, byte_tokenizer, max_slots=4)
        assert (engine._kernels is None) == is_switched_off
        answers.append([answer for (answer,) in engine.generate([[1], [5, 6, 7], list(range(40)), [200, 3]], params)])
    for ours, theirs in zip(*answers, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.logps == pytest.approx(theirs.logps, abs=1e-5)


def test_models_of_other_shapes_go_without() -> None:
    def config(heads: int, kv_heads: int, head_dim: int) -> ModelConfig:
        return ModelConfig(260, heads * head_dim, 2, heads, kv_heads, head_dim, 64, 64)

    assert step_kernels(config(4, 2, 8), torch.float32, CPU) is None
    assert step_kernels(config(4, 2, 512), torch.float32, CPU) is None
    assert step_kernels(config(4, 2, 16), torch.float16, CPU) is None
    assert step_kernels(config(4, 2, 16), torch.float32, torch.device("meta")) is None


@needs_compiler
def test_a_compiler_that_fails_is_told_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GROUNDUP_CACHE", str(tmp_path))
    fake = tmp_path / "broken-cc"
    fake.write_text("#!/bin/sh\necho no such option >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    load = native._load_library.__wrapped__
    with caplog.at_level(logging.INFO):
        assert load(torch.float32) is None
        assert "no such option" in caplog.text
        monkeypatch.setenv("GROUNDUP_NATIVE", "0")
        assert load(torch.float32) is None
        assert "switched off" in caplog.text
    assert list((tmp_path / "kernels").iterdir()) == []


@needs_compiler
def test_what_was_compiled_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUNDUP_CACHE", str(tmp_path))
    load = native._load_library.__wrapped__
    assert load(torch.float32) is not None
    (built,) = (tmp_path / "kernels").iterdir()
    made = built.stat().st_mtime_ns
    assert load(torch.float32) is not None
    assert built.stat().st_mtime_ns == made
    assert load(torch.bfloat16) is not None
    assert len(list((tmp_path / "kernels").iterdir())) == 2
