"""The training loop: one division by all targets, guards, callbacks, logs, resuming, compile and precision choices."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import groundup.train.loop
from groundup.base.errors import UserError
from groundup.base.metrics import METRICS_FILE, read_metrics
from groundup.data.batches import Batch, micro_ranges
from groundup.model.config import ModelConfig, preset
from groundup.model.transformer import Transformer
from groundup.train.config import TrainConfig
from groundup.train.loop import fit, wants_compile
from groundup.train.losses import LossSum, lm_loss
from groundup.train.meter import TIMING_KEYS
from groundup.train.optim import make_optimizer
from groundup.train.parallel import Ranks

SHAPE = ModelConfig(vocab_size=61, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48)
ROWS, T = 8, 12
ALONE = Ranks(0, 1, torch.device("cpu"))


class ToyBatches:
    """Random rows whose numbers of targets differ widely."""

    batch_rows = ROWS
    steps_per_epoch = 5

    def whole(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(SHAPE.vocab_size, (ROWS, T + 1), generator=generator)
        is_target = torch.rand(ROWS, T, generator=generator) < torch.linspace(0, 1, ROWS)[:, None]
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), is_target)

    def micro_batches(self, step: int, rank: int, world_size: int, micro_rows: int) -> list[Batch]:
        whole = self.whole(step)
        parts = [slice(rows.start, rows.stop) for rows in micro_ranges(ROWS, rank, world_size, micro_rows)]
        return [Batch(whole.tokens[rows], whole.targets[rows], whole.is_target[rows]) for rows in parts]


def make_model(seed: int = 0) -> Transformer:
    model = Transformer(SHAPE)
    model.init_weights(seed)
    return model


def config(**changes: Any) -> TrainConfig:
    values = {"steps": 4, "batch_rows": ROWS, "micro_rows": 4, "seq_len": T, "lr": 1e-2, "precision": "fp32"}
    return TrainConfig.model_validate({**values, **changes})


def rows_of(work: Path) -> list[dict[str, Any]]:
    rows = read_metrics(work / "logs" / METRICS_FILE)
    return [{key: value for key, value in row.items() if key not in TIMING_KEYS} for row in rows]


def test_one_step_is_the_gradient_of_the_mean_over_all_targets(tmp_path: Path) -> None:
    """Oracle: full logits in float64, torch's own cross-entropy, torch's own clipping and AdamW."""
    settings = config(steps=1, micro_rows=3, warmup_steps=0, schedule="constant", clip=0.5)
    model, oracle = make_model(), make_model().double()
    result = fit(model, ToyBatches(), lm_loss, settings, tmp_path, seed=0)
    batch = ToyBatches().whole(0)
    logits = oracle(batch.tokens).double() @ oracle.head_weight.T
    loss = torch.nn.functional.cross_entropy(logits[batch.is_target], batch.targets[batch.is_target])
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(oracle.parameters(), 0.5)
    make_optimizer(oracle, settings).step()
    assert result.last_row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert result.last_row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert norm > 0.5, "the test does not clip"
    assert result.target_tokens == int(batch.is_target.sum())
    assert result.tokens == ROWS * T
    for mine, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("micro_rows", [1, 3, 8, 100])
def test_accumulated_equals_big_batch(tmp_path: Path, micro_rows: int) -> None:
    fit(make_model(), ToyBatches(), lm_loss, config(micro_rows=ROWS), tmp_path / "big", seed=0)
    fit(make_model(), ToyBatches(), lm_loss, config(micro_rows=micro_rows), tmp_path / "parts", seed=0)
    for one, other in zip(rows_of(tmp_path / "big"), rows_of(tmp_path / "parts"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        assert one["target_tokens"] == other["target_tokens"]


def test_activation_checkpointing_changes_memory_only(tmp_path: Path) -> None:
    fit(make_model(), ToyBatches(), lm_loss, config(), tmp_path / "kept", seed=0)
    fit(make_model(), ToyBatches(), lm_loss, config(activation_checkpointing=True), tmp_path / "again", seed=0)
    assert rows_of(tmp_path / "kept") == rows_of(tmp_path / "again")


def test_a_batch_without_targets_is_an_error_that_names_the_step(tmp_path: Path) -> None:
    class Empty(ToyBatches):
        def whole(self, step: int) -> Batch:
            batch = super().whole(step)
            return replace(batch, is_target=batch.is_target & (step != 2))

    with pytest.raises(UserError, match="batch of step 3 has no target token"):
        fit(make_model(), Empty(), lm_loss, config(), tmp_path, seed=0)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2]


def broken_at(*steps: int, value: float = math.nan) -> Any:
    """`lm_loss`, but in these steps (from 0) the second of two micro batches is multiplied by `value`."""
    calls = 0

    def loss_fn(model: Transformer, batch: Batch) -> LossSum:
        nonlocal calls
        step, micro_batch = divmod(calls, 2)
        calls += 1
        loss = lm_loss(model, batch)
        return replace(loss, loss_sum=loss.loss_sum * value) if step in steps and micro_batch == 1 else loss

    return loss_fn


def test_a_nan_step_is_skipped_and_named_and_leaves_no_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights: list[Tensor] = []

    def evaluate(model: Transformer, step: int) -> dict[str, float]:
        weights.append(model.embed.weight.detach().clone())
        return {"held_out_loss": float(step)}

    settings = config(evaluate_every_steps=1)
    model = make_model()
    result = fit(model, ToyBatches(), broken_at(2), settings, tmp_path, seed=0, evaluate=evaluate)
    assert "step 3 skipped: the loss is nan in micro batch 2 of rank 0" in capsys.readouterr().err.replace("\n", " ")
    rows = rows_of(tmp_path)
    assert [("skipped" in row, "loss" in row) for row in rows] == [(False, True)] * 2 + [(True, False), (False, True)]
    assert result.skipped_steps == 1
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_an_infinite_gradient_under_a_finite_loss_is_skipped(tmp_path: Path) -> None:
    def loss_fn(model: Transformer, batch: Batch) -> LossSum:
        loss = lm_loss(model, batch)
        return replace(loss, loss_sum=loss.loss_sum + model.norm.weight.sum().mul(0).sqrt())  # 0 * inf

    with pytest.raises(UserError, match="2 steps in a row .* norm of the gradient is nan"):
        fit(make_model(), ToyBatches(), loss_fn, config(max_skipped_in_a_row=2), tmp_path, seed=0)


def test_many_bad_steps_in_a_row_stop_the_run_with_a_remedy(tmp_path: Path) -> None:
    settings = config(steps=20, max_skipped_in_a_row=3, checkpoint_every_steps=1)
    with pytest.raises(UserError, match=r"(?s)3 steps in a row were skipped, the last \(step 8\).*lower lr"):
        fit(make_model(), ToyBatches(), broken_at(3, 5, 6, 7), settings, tmp_path, seed=0)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    assert newest.name == "step-00000007", "what was good is kept"


def test_a_spike_is_skipped(tmp_path: Path) -> None:
    settings = config(steps=12, spike_window=8, spike_sigmas=20, lr=1e-4)
    result = fit(make_model(), ToyBatches(), broken_at(9, value=30.0), settings, tmp_path, seed=0)
    skipped = [row for row in rows_of(tmp_path) if "skipped" in row]
    assert [row["step"] for row in skipped] == [10]
    assert "the loss jumped to" in skipped[0]["skipped"]
    assert result.skipped_steps == 1


def test_callbacks_run_when_due_and_at_the_end_without_gradients(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, int]] = []

    def evaluate(model: Transformer, step: int) -> dict[str, float]:
        assert not torch.is_grad_enabled()
        seen.append(("evaluate", step))
        return {"held_out_loss": step / 2}

    def sample(model: Transformer, step: int) -> str:
        assert not torch.is_grad_enabled()
        seen.append(("sample", step))
        return f"text {step}"

    settings = config(steps=5, evaluate_every_steps=2, sample_every_steps=3, log_every_steps=4)
    result = fit(make_model(), ToyBatches(), lm_loss, settings, tmp_path, seed=0, evaluate=evaluate, sample=sample)
    assert seen == [("evaluate", 2), ("sample", 3), ("evaluate", 4), ("evaluate", 5), ("sample", 5)]
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [2, 3, 4, 5]
    assert [row.get("sample") for row in rows] == [None, "text 3", None, "text 5"]
    assert [row.get("held_out_loss") for row in rows] == [1.0, None, 2.0, 2.5]
    assert "after step 5: text 5" in capsys.readouterr().err
    assert result.summary()["held_out_loss"] == 2.5
    assert not set(result.summary()) & {"memory_gb", "seconds"}
    assert list((tmp_path / "logs" / "tensorboard").iterdir())


def test_checkpoints_by_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock() -> float:
        return now

    class Slow(ToyBatches):
        def micro_batches(self, step: int, rank: int, world_size: int, micro_rows: int) -> list[Batch]:
            nonlocal now
            now += 40  # seconds
            return super().micro_batches(step, rank, world_size, micro_rows)

    monkeypatch.setattr(groundup.train.loop.time, "monotonic", clock)
    saved: list[int] = []
    save = groundup.train.loop.Checkpoints.save
    monkeypatch.setattr(groundup.train.loop.Checkpoints, "save", lambda *args: (saved.append(args[3]), save(*args))[1])
    fit(make_model(), Slow(), lm_loss, config(steps=7, checkpoint_every_minutes=1.5), tmp_path, seed=0)
    assert saved == [3, 6, 7]


def test_a_finished_run_does_nothing_again_and_says_the_same(tmp_path: Path) -> None:
    first = fit(make_model(), ToyBatches(), lm_loss, config(), tmp_path, seed=0)
    model = make_model(seed=9)
    second = fit(model, ToyBatches(), lm_loss, config(), tmp_path, seed=0)
    assert first.last_row == second.last_row
    assert (first.steps, first.tokens, first.target_tokens) == (second.steps, second.tokens, second.target_tokens)


@pytest.mark.parametrize(
    ("changes", "seed", "name"), [({"lr": 1e-3}, 0, "lr"), ({}, 1, "seed"), ({"steps": 5}, 0, "total_steps")]
)
def test_a_checkpoint_is_not_continued_with_other_values(
    tmp_path: Path, changes: dict[str, Any], seed: int, name: str
) -> None:
    fit(make_model(), ToyBatches(), lm_loss, config(), tmp_path, seed=0)
    with pytest.raises(UserError, match=f"other values of {name}"):
        fit(make_model(), ToyBatches(), lm_loss, config(**changes), tmp_path, seed=seed)


def test_a_checkpoint_is_not_continued_with_other_data(tmp_path: Path) -> None:
    class Other(ToyBatches):
        def whole(self, step: int) -> Batch:
            return super().whole(step + 1)

    fit(make_model(), ToyBatches(), lm_loss, config(), tmp_path, seed=0)
    with pytest.raises(UserError, match="other values of data"):
        fit(make_model(), Other(), lm_loss, config(), tmp_path, seed=0)


def test_bf16_computes_in_bf16_and_keeps_float32_weights(tmp_path: Path) -> None:
    dtypes = set()

    def loss_fn(model: Transformer, batch: Batch) -> LossSum:
        dtypes.add(model.blocks[0].ffn.w13(model.embed(batch.tokens)).dtype)  # type: ignore[union-attr,operator]
        return lm_loss(model, batch)

    model = make_model()
    wide = fit(make_model(), ToyBatches(), lm_loss, config(), tmp_path / "fp32", seed=0)
    narrow = fit(model, ToyBatches(), loss_fn, config(precision="bf16"), tmp_path / "bf16", seed=0)
    assert dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert narrow.last_row["loss"] == pytest.approx(wide.last_row["loss"], rel=0.02)
    assert narrow.last_row["loss"] != wide.last_row["loss"]


def test_compile_auto_is_for_long_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = Transformer(preset("15m"))
    short = TrainConfig(steps=10, batch_rows=16, seq_len=256)
    long = TrainConfig(steps=10_000, batch_rows=16, seq_len=256)
    monkeypatch.setattr(groundup.train.loop.shutil, "which", lambda name: "/usr/bin/g++")
    assert not wants_compile(model, short, ALONE, 10)
    assert wants_compile(model, long, ALONE, 10_000)
    assert wants_compile(model, short.model_copy(update={"compile": "on"}), ALONE, 10)
    monkeypatch.setattr(groundup.train.loop.shutil, "which", lambda name: None)
    assert not wants_compile(model, long, ALONE, 10_000), "no C++ compiler"
