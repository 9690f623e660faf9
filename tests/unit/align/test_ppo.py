"""Whole runs on a small world: they learn, stop when they should, refuse what is broken, and go on where they were."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from groundup.align import learner, ppo
from groundup.align.learner import Learner, PolicyModels, checksum
from groundup.align.ppo import ALL_DONE, Setup, note, train_ppo
from groundup.align.ppo_config import PolicyConfig
from groundup.align.reward import RewardScorer
from groundup.base.errors import UserError
from groundup.base.metrics import METRICS_FILE, read_metrics
from groundup.base.records import Prompt
from groundup.model.lora import AdapterBase, LoraConfig, adapters, load_adapter, merged, save_adapter, with_lora
from groundup.train.losses import LossSum

LEARNS = {
    "iterations": 25, "batch_rows": 32, "mini_batch_rows": 16, "micro_rows": 16, "max_new_tokens": 6, "lr": 3e-3,
    "beta": 0.001, "missing_eos_penalty": None, "checkpoint_every": None,
}  # fmt: skip
DISPLAYED = {
    "reward", "helpful", "kl", "kl_k3", "entropy_per_token", "length", "eos_rate", "policy_clip_fraction",
    "policy_loss", "value_loss", "policy_grad_norm", "value_grad_norm", "tokens_per_second", "samples_per_second",
    "share_generating",    "share_scoring", "share_training", "engine_gap_per_token", "seconds",
}  # fmt: skip


def rows_of(work: Path) -> list[dict[str, Any]]:
    return read_metrics(work / "logs" / METRICS_FILE)


def weights(setup: Setup) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in setup.models.policy.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("method", [{}, {"advantage": "group", "group_size": 8}], ids=["ppo", "grpo"])
def test_the_reward_rises(world: Any, tmp_path: Path, method: dict[str, Any]) -> None:
    config = world.config(**LEARNS, **method)
    result = train_ppo(world.setup(config), config, tmp_path, seed=0)
    rewards = [row["reward"] for row in rows_of(tmp_path)]
    assert result.stopped_because == ALL_DONE
    assert len(rewards) == 25
    assert sum(rewards[-5:]) / 5 > 3 * sum(rewards[:5]) / 5 + 0.1


def test_a_row_says_all_that_is_displayed(world: Any, tmp_path: Path) -> None:
    config = world.config()
    result = train_ppo(world.setup(config), config, tmp_path, seed=0)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row.keys() >= DISPLAYED for row in rows)
    for row in rows:
        assert 0.9 < sum(row[f"share_{part}"] for part in ppo.PARTS) <= 1.001
        assert 0 <= row["policy_clip_fraction"] <= 1
        assert row["engine_gap_max"] < 1e-5, "sampler and trainer agree, in fp32"
        assert row["kl_k3"] >= 0
    assert rows[0]["kl"] == 0.0
    assert rows[0]["kl_k3"] == 0.0
    assert rows[-1]["kl_k3"] > 0
    line = note(rows[-1])
    assert all(word in line for word in ("reward", "helpful", "KL", "entropy", "length", "clipped", "tokens/s"))
    summary = result.summary()
    assert summary["iterations"] == 3
    assert summary["tokens"] > 0
    assert "seconds" not in summary


def test_bf16_runs_with_a_narrow_reference(world: Any, tmp_path: Path) -> None:
    config = world.config(precision="bf16")
    setup = world.setup(config)
    train_ppo(setup, config, tmp_path, seed=0)
    first = rows_of(tmp_path)[0]
    assert first["kl"] == 0.0, "to the last bit, though the reference's matrices are kept in bf16"
    assert setup.models.reference.blocks[0].ffn.w2.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in setup.models.policy.parameters()} == {torch.float32}
    assert first["engine_gap_per_token"] < 0.05


def test_compiled_adapters_start_at_no_divergence(world: Any, tmp_path: Path) -> None:
    """Compiled code with gradients rounds otherwise than without: on a real model that made half a nat in bf16."""
    lora, base = LoraConfig(rank=4, alpha=8), world.random_model(1)
    policy, reference = with_lora(base, lora, 0), with_lora(base, lora, 0)
    for model in (policy, reference):
        for _, layer in adapters(model):
            layer.lora_b.data.copy_(torch.randn(layer.lora_b.shape, generator=torch.Generator().manual_seed(5)))
    config = world.config(precision="bf16", compile="on", iterations=1)
    value = with_lora(base, lora, 1, scalar=True, init="zero")
    models = PolicyModels(policy, reference, value)  # type: ignore[arg-type]
    train_ppo(world.setup(config, models=models), config, tmp_path, seed=0)
    assert rows_of(tmp_path)[0]["kl"] == 0.0
    assert rows_of(tmp_path)[0]["kl_k3"] == 0.0


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(world: Any, tmp_path: Path) -> None:
    results = []
    for choice in ("off", "on"):
        config = world.config(compile=choice, micro_rows=3)
        setup = world.setup(config)
        train_ppo(setup, config, tmp_path / choice, seed=0)
        assert setup.models.policy.is_compiled == (choice == "on")
        results.append(weights(setup))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=2e-4, rtol=1e-3)
    assert rows_of(tmp_path / "on")[0]["kl"] == pytest.approx(0, abs=1e-5)


def test_several_epochs_clip_some_tokens(world: Any, tmp_path: Path) -> None:
    config = world.config(ppo_epochs=3, lr=2e-2)
    train_ppo(world.setup(config), config, tmp_path, seed=0)
    assert max(row["policy_clip_fraction"] for row in rows_of(tmp_path)) > 0


def test_learning_rates_stay_as_they_are(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[float]] = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW) -> None:
        seen.append({group["lr"] for group in self.param_groups})
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    config = world.config(lr=1e-3, value_lr=2e-3)
    train_ppo(world.setup(config), config, tmp_path, seed=0)
    assert seen == [{1e-3, 2e-3}] * 6, "three iterations of two mini-batches"


# ---- stopping


def test_a_divergence_beyond_the_limit_stops_before_it_is_learned_from(world: Any, tmp_path: Path) -> None:
    config = world.config(iterations=50, lr=1e-2, max_kl=0.5)
    result = train_ppo(world.setup(config), config, tmp_path, seed=0)
    rows = rows_of(tmp_path)
    assert "max_kl = 0.5" in result.stopped_because
    assert result.iterations == len(rows) < 50
    assert rows[-1]["kl"] > 0.5 >= max(row["kl"] for row in rows[:-1])
    assert "policy_loss" not in rows[-1]


def variety(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
    """An opinion that the exploit of `share_of_seven` hurts: how many different characters a response has."""
    return [len(set(text)) / max(len(text), 1) for text in texts]


def agreeing(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
    """An opinion that rises with the reward, of every other response."""
    return [text.count("7") / max(len(text), 1) if n % 2 else None for n, text in enumerate(texts)]


def test_a_planted_exploit_is_flagged_and_a_clean_run_is_not(world: Any, tmp_path: Path) -> None:
    config = world.config(**{**LEARNS, "iterations": 20}, alarm_window=10)
    caught = train_ppo(world.setup(config, watch=variety), config, tmp_path / "planted", seed=0)
    assert caught.alarms == 1
    assert "second opinion fell" in caught.stopped_because
    assert 10 <= caught.iterations < 20
    rows = rows_of(tmp_path / "planted")
    assert rows[-1]["alarm"] == 1
    assert rows[-1]["reward"] > rows[0]["reward"]
    assert rows[-1]["watched"] < rows[0]["watched"]
    warned = config.model_copy(update={"on_alarm": "warn", "iterations": caught.iterations + 1})
    result = train_ppo(world.setup(warned, watch=variety), warned, tmp_path / "warned", seed=0)
    assert (result.alarms, result.stopped_because) == (1, ALL_DONE)
    clean = train_ppo(world.setup(config, watch=agreeing), config, tmp_path / "clean", seed=0)
    assert (clean.alarms, clean.stopped_because) == (0, ALL_DONE)
    assert rows_of(tmp_path / "clean")[-1]["reward"] > rows_of(tmp_path / "clean")[0]["reward"]


def test_early_stop_keeps_the_best_policy(world: Any, held_out: Any, tmp_path: Path) -> None:
    """What is trained for makes the selected measure worse, so that an early policy stays the best."""
    config = world.config(**{**LEARNS, "evaluate_every": 2, "patience": 3, "select_by": "watch"})
    setup = world.setup(config, held_out=held_out, watch=lambda prompts, texts: [-float(t.count("7")) for t in texts])
    result = train_ppo(setup, config, tmp_path, seed=0)
    assert "no better on held-out prompts in 3 evaluations" in result.stopped_because
    assert result.iterations < 25
    rows = rows_of(tmp_path)
    evaluated = {row["step"]: row["held_out_watched"] for row in rows if "held_out_watched" in row}
    assert set(evaluated) == set(range(0, result.iterations + 1, 2))
    assert result.best_iteration == max(evaluated, key=lambda step: (evaluated[step], -step))
    assert result.best_iteration == result.iterations - 3 * 2


def test_the_best_policy_is_the_one_that_was_evaluated(world: Any, held_out: Any, tmp_path: Path) -> None:
    config = world.config(**{**LEARNS, "iterations": 9, "evaluate_every": 3})
    setup = world.setup(config, held_out=held_out)
    result = train_ppo(setup, config, tmp_path / "run", seed=0)
    assert result.best_iteration
    shorter = config.model_copy(update={"iterations": result.best_iteration, "evaluate_every": None})
    expected = world.setup(shorter)
    train_ppo(expected, shorter, tmp_path / "shorter", seed=0)
    assert same(weights(setup), weights(expected))


def test_equal_scores_are_counted_and_told(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = world.config(missing_eos_penalty=None)
    result = train_ppo(world.setup(config, rule=lambda response: 0.25), config, tmp_path, seed=0)
    assert result.flat_batches == 3
    assert capsys.readouterr().err.count("all rewards are equal") == 1


# ---- what must not happen


def test_a_bad_gradient_is_not_taken(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = world.config(iterations=1)
    real = learner.value_objective

    def poisoned(config: PolicyConfig) -> Any:
        loss, calls = real(config), []

        def at_first_nan(model: Any, batch: Any) -> LossSum:
            calls.append(1)
            sums = loss(model, batch)
            return replace(sums, loss_sum=sums.loss_sum * (math.nan if len(calls) == 1 else 1))

        return at_first_nan

    monkeypatch.setattr(learner, "value_objective", poisoned)
    taken = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (taken.append(1), step(self)))
    result = train_ppo(world.setup(config), config, tmp_path, seed=0)
    assert result.skipped_steps == 1, "the policy's gradient was fine, but both or none learn"
    assert len(taken) == 1
    assert rows_of(tmp_path)[0]["skipped_steps"] == 1


def test_many_bad_gradients_end_the_run(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = world.config(iterations=5, max_skipped_in_a_row=3)
    real = learner.policy_objective
    monkeypatch.setattr(
        learner,
        "policy_objective",
        lambda config: lambda model, batch: replace(s := real(config)(model, batch), loss_sum=s.loss_sum * math.inf),
    )
    with pytest.raises(UserError, match="3 gradient steps in a row were skipped"):
        train_ppo(world.setup(config), config, tmp_path, seed=0)


@pytest.mark.parametrize("victim", ["reference", "helpful"])
def test_frozen_models_are_watched(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    config = world.config()
    setup = world.setup(config)
    model = setup.models.reference if victim == "reference" else setup.scorer.models["helpful"]
    real = Learner.learn

    def meddle(self: Learner, *args: Any) -> dict[str, float]:
        row = real(self, *args)
        model.embed.weight.data[3, 3] += 1e-6
        return row

    monkeypatch.setattr(Learner, "learn", meddle)
    with pytest.raises(AssertionError, match=f"the {victim} model changed"):
        train_ppo(setup, config, tmp_path, seed=0)


def test_a_policy_that_does_not_change_is_noticed(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = world.config(missing_eos_penalty=None)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    with pytest.raises(AssertionError, match="the policy does not learn"):
        train_ppo(world.setup(config, rule=sum), config, tmp_path, seed=0)


def test_a_policy_that_is_not_its_reference_is_noticed(world: Any, tmp_path: Path) -> None:
    config = world.config()
    models = replace(world.models(config), reference=world.random_model(2))
    with pytest.raises(AssertionError, match="nats off its reference"):
        train_ppo(world.setup(config, models=models), config, tmp_path, seed=0)


def test_old_log_probabilities_of_other_weights_are_noticed(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = world.config()
    real = ppo.to_experience

    def shifted(*args: Any) -> Any:
        experience = real(*args)
        return replace(experience, old_logps=experience.old_logps - 0.01)

    monkeypatch.setattr(ppo, "to_experience", shifted)
    with pytest.raises(AssertionError, match="ratios of the first gradient step"):
        train_ppo(world.setup(config), config, tmp_path, seed=0)


def test_a_checksum_sees_one_flipped_bit(world: Any) -> None:
    model = world.random_model(1)
    before = checksum(model)
    model.blocks[1].ffn.w2.weight.data.view(torch.int32)[2, 2] ^= 1
    assert checksum(model) != before


# ---- going on


def test_a_finished_run_is_not_run_again(world: Any, held_out: Any, tmp_path: Path) -> None:
    config = world.config(evaluate_every=1)
    first = world.setup(config, held_out=held_out)
    result = train_ppo(first, config, tmp_path, seed=0)
    second = world.setup(config, held_out=held_out)
    again = train_ppo(second, config, tmp_path, seed=0)
    assert again == result
    assert same(weights(second), weights(first))


@pytest.mark.parametrize("change", [{"lr": 5e-3}, {"beta": 0.5}, {"max_new_tokens": 7}])
def test_another_runs_checkpoint_is_refused(world: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    config = world.config(iterations=1)
    train_ppo(world.setup(config), config, tmp_path, seed=0)
    other = config.model_copy(update=change)
    with pytest.raises(UserError, match=f"other values of {next(iter(change))}"):
        train_ppo(world.setup(other), other, tmp_path, seed=0)


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of group_size"):
        PolicyConfig(batch_rows=100, group_size=8, advantage="group")
    with pytest.raises(ValueError, match="exceeds batch_rows"):
        PolicyConfig(batch_rows=8, mini_batch_rows=16)


def test_the_papers_settings_are_the_defaults() -> None:
    config = PolicyConfig()
    expected = {
        "batch_rows": 512, "mini_batch_rows": 64, "ppo_epochs": 1, "clip_ratio": 0.2, "beta": 0.01, "lr": 1e-6,
        "beta1": 0.9, "beta2": 0.95, "eps": 1e-5, "weight_decay": 0.1, "clip": 1.0, "gamma": 1.0, "gae_lambda": 0.95,
        "temperature": 1.0,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert 200 <= config.iterations <= 400


# ---- adapters


def test_adapters_share_one_frozen_base(world: Any, tmp_path: Path) -> None:
    """Policy, reference, value and both reward models: one set of base tensors, trained by nobody."""
    lora = LoraConfig(rank=4, alpha=8)
    base = world.random_model(1)
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    policy = with_lora(base, lora, 0)
    value = with_lora(base, lora, 1, scalar=True, init="zero")
    rewards = []
    for number in range(2):
        trained = with_lora(base, lora, 2 + number, scalar=True)
        save_adapter(tmp_path / f"rm-{number}", trained, lora, AdapterBase(tmp_path, "id"))
        rewards.append(load_adapter(base, tmp_path / f"rm-{number}"))
    config = world.config(precision="bf16", lr=1e-2)
    models = PolicyModels(policy, base, value)  # type: ignore[arg-type]
    setup = world.setup(config, models=models, scorer=RewardScorer(*rewards))  # type: ignore[arg-type]
    result = train_ppo(setup, config, tmp_path / "work", seed=0)
    assert result.iterations == 3
    rows = rows_of(tmp_path / "work")
    assert rows[0]["kl"] == 0.0
    assert rows[-1]["kl_k3"] > 0
    assert "safety" in rows[0]

    def base_pointers(model: torch.nn.Module) -> set[int]:
        return {parameter.data_ptr() for parameter in model.parameters()}

    shared = base_pointers(base)
    assert len(shared) == len(before)
    for model in (policy, value, *rewards):
        others = base_pointers(model) - shared
        held = sum(p.numel() for p in model.parameters() if p.data_ptr() in others)
        # A language-model head is all that a scalar model does not use of the base.
        assert len(shared - base_pointers(model)) <= 1
        assert held < 0.5 * sum(p.numel() for p in base.parameters())
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} was trained"
    plain = merged(policy)
    assert any(not torch.equal(p, before[name]) for name, p in plain.named_parameters()), "the adapters were"
    newest = sorted((tmp_path / "work" / "checkpoints").iterdir())[-1]
    size = sum(file.stat().st_size for file in newest.glob("model-*.safetensors"))
    assert size < sum(p.nbytes for p in base.parameters()), "checkpoints hold what is trained"
