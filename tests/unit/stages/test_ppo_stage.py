"""Stage `ppo` on a tiny model: the artifact, its metrics, adapters on one base, resuming, mistakes."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from groundup.align import ppo as loop
from groundup.base.artifacts import new_artifact, open_artifact
from groundup.base.config import parse_config
from groundup.base.errors import UserError
from groundup.base.metrics import METRICS_FILE, read_metrics
from groundup.base.records import Message, Prompt, to_json, write_jsonl
from groundup.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from groundup.model.config import ModelConfig
from groundup.model.lora import AdapterBase, LoraConfig, load_adapter, save_adapter, with_lora
from groundup.model.scalar import ScalarCheckpoint, ScalarModel, load_scalar, save_scalar, scalar_from
from groundup.model.transformer import Transformer
from groundup.report.ppo_figures import is_ppo_log, ppo_figures
from groundup.stages import ppo
from groundup.stages.job import Job
from groundup.stages.ppo import PPOConfig
from groundup.stages.trained_model import ADAPTER, model_id
from groundup.text.chat import Llama2Chat
from groundup.text.tokenizer import Tokenizer, train_tokenizer

WORDS = ("the", "cat", "dog", "bird", "sees", "hears", "a", "small", "red", "old", "house", "tree", "river", "home")
LORA = LoraConfig(rank=4, alpha=8)
SETTINGS: dict[str, Any] = {
    "iterations": 3, "batch_rows": 8, "mini_batch_rows": 4, "micro_rows": 4, "max_new_tokens": 12, "lr": 1e-3,
    "precision": "fp32", "evaluate_every": 2, "evaluate_prompts": 4, "checkpoint_every": 1,
}  # fmt: skip
LONG_PROMPT, TAG_PROMPT = "the old river " * 30, "say [/INST] to me"


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 6)))


def transformer(seed: int, vocab_size: int = 400) -> Transformer:
    model = Transformer(ModelConfig(vocab_size, 32, 2, 4, 2, 8, 64, 64)).eval()
    model.init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2)
        model.head_weight[2] *= 12  # EOS comes now and then
    return model


def publish(path: Path, kind: str, fill: Any) -> Path:
    with new_artifact(path, {"kind": kind}) as folder:
        fill(folder)
    return path


def publish_reward(path: Path, tokenizer: Tokenizer, seed: int) -> Path:
    model = scalar_from(transformer(seed, tokenizer.vocab_size), seed)
    checkpoint = ScalarCheckpoint(model, model.config, tokenizer, Llama2Chat(tokenizer))
    return publish(path, "reward model", lambda out: save_scalar(out, checkpoint))


def publish_prompts(path: Path, train: list[str], held_out: list[str]) -> Path:
    def fill(out: Path) -> None:
        for name, texts in (("train", train), ("held_out", held_out)):
            rows = [
                Prompt((Message("user", t),), str(n), ("helpfulness", "safety")[n % 2]) for n, t in enumerate(texts)
            ]
            write_jsonl(out / f"{name}.jsonl", map(to_json, rows))

    return publish(path, "prompts", fill)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model, reward models, also as adapters on the chat model, and prompts of which two are unusable."""
    folder = tmp_path_factory.mktemp("made")
    rng = random.Random(0)
    tokenizer = train_tokenizer([" ".join(sentence(rng) for _ in range(10)) for _ in range(60)], 400, folder / "t", 0)
    chat = Llama2Chat(tokenizer)
    model = transformer(1)
    checkpoint = Checkpoint(model, model.config, tokenizer, chat, {})
    publish(folder / "policy", "model", lambda out: save_checkpoint(out, checkpoint))
    for seed, name in enumerate(("rm_helpful", "rm_safety", "other_rm")):
        publish_reward(folder / name, tokenizer, seed)
    base = AdapterBase(folder / "policy", model_id(folder / "policy"))
    for seed, name in enumerate(("lora_helpful", "lora_safety")):
        adapted = with_lora(transformer(1), LORA, seed, scalar=True)
        assert isinstance(adapted, ScalarModel)
        whole = ScalarCheckpoint(scalar_from(transformer(1), seed), model.config, tokenizer, chat)

        def fill(out: Path, whole: ScalarCheckpoint = whole, adapted: ScalarModel = adapted) -> None:
            save_scalar(out, whole)
            save_adapter(out / ADAPTER, adapted, LORA, base)

        publish(folder / name, "reward model", fill)
    train = [*(f"{sentence(rng)}?" for _ in range(10)), LONG_PROMPT, TAG_PROMPT]
    publish_prompts(folder / "prompts", train, [f"{sentence(rng)}?" for _ in range(5)])
    return folder


def new_job(made: Path, folder: Path, **roles: str | None) -> Job:
    for part in ("out", "work"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    names = {"policy": "policy", "rm_helpful": "rm_helpful", "rm_safety": "rm_safety", "prompts": "prompts", **roles}
    inputs = {role: open_artifact(made / name) for role, name in names.items() if name is not None}
    return Job("rlhf-v1-ppo", 7, inputs, folder / "out", folder / "work")


def settings(**changes: Any) -> PPOConfig:
    return parse_config(PPOConfig, {**SETTINGS, **changes}, "test")


def test_the_artifact_is_an_ordinary_model_with_its_logs(made: Path, tmp_path: Path) -> None:
    metrics = ppo.run(settings(), new_job(made, tmp_path))
    start, end = load_checkpoint(made / "policy"), load_checkpoint(tmp_path / "out")
    assert end.config == start.config
    is_changed = [not torch.equal(a, b) for a, b in zip(start.model.parameters(), end.model.parameters(), strict=True)]
    assert all(is_changed) == (metrics["best_iteration"] > 0)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    parts = metrics["prompts"].values()
    assert all(part["used"] > 0 for part in parts)
    assert sum(part["used"] for part in parts) == 10  # the prompts that versions are compared on are in neither
    dropped = [reason for part in parts for reason in part["dropped"]]
    assert sorted(dropped) == ["longer than the context leaves room for", "refused by the chat format"]
    assert metrics["iterations"] == 3
    assert metrics["stopped_because"] == loop.ALL_DONE
    assert metrics["tokens"] > 0
    json.dumps(metrics)
    rows = read_metrics(tmp_path / "out" / "logs" / METRICS_FILE)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert {"reward", "helpful", "safety", "share_judged_by_safety", "watched"} <= rows[1].keys()
    assert "held_out_reward" in rows[0]
    assert is_ppo_log(rows)
    figures = ppo_figures(rows, "rlhf-v1-ppo")
    assert len(figures) == 12
    assert all(figure.startswith("<svg") for figure in figures)
    assert any("divergence alarm at 2" in figure for figure in ppo_figures([{**rows[2], "alarm": 1}], "x"))


def test_a_second_start_does_nothing_twice(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ppo.run(settings(), new_job(made, tmp_path))
    monkeypatch.setattr(loop._Run, "iterate", lambda self: pytest.fail("all iterations were done"))
    second = ppo.run(settings(), replace(new_job(made, tmp_path), out=tmp_path / "again"))
    assert second == first


@pytest.mark.parametrize(
    "changes",
    [{"advantage": "group", "group_size": 4}, {"value_from": "reward", "watch": None}, {"evaluate_every": None}],
    ids=["grpo", "value from reward", "no held-out"],
)
def test_choices(made: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    metrics = ppo.run(settings(**changes), new_job(made, tmp_path))
    assert metrics["iterations"] == 3
    assert (metrics["best_iteration"] is None) == ("evaluate_every" in changes)


def test_a_value_model_from_a_reward_model_keeps_its_trunk_and_says_zero(made: Path, tmp_path: Path) -> None:
    value = ppo._open(settings(value_from="reward"), new_job(made, tmp_path)).models.value
    assert value is not None
    start = load_scalar(made / "rm_helpful").model
    assert bool(start.score.weight.any())
    assert not bool(value.score.weight.any())
    assert torch.equal(value.blocks[1].ffn.w2.weight, start.blocks[1].ffn.w2.weight)


def test_the_helpfulness_model_alone_will_do(made: Path, tmp_path: Path) -> None:
    ppo.run(settings(), new_job(made, tmp_path, rm_safety=None))
    assert "safety" not in read_metrics(tmp_path / "out" / "logs" / METRICS_FILE)[1]


def test_another_reward_model_can_watch(made: Path, tmp_path: Path) -> None:
    config = settings(watch=str(made / "other_rm"))
    assert ppo.raw_inputs(config) == [made / "other_rm"]
    assert ppo.raw_inputs(settings()) == []
    ppo.run(config, new_job(made, tmp_path))
    rows = read_metrics(tmp_path / "out" / "logs" / METRICS_FILE)
    assert len({row["watched"] for row in rows[1:]}) == 3


def test_adapters_share_one_base_and_end_as_an_ordinary_model(made: Path, tmp_path: Path) -> None:
    job = new_job(made, tmp_path, rm_helpful="lora_helpful", rm_safety="lora_safety")
    config = settings(lora=LORA.model_dump(), lr=1e-2, evaluate_every=None)
    opened = ppo._open(config, job)
    models = [opened.models.policy, opened.models.value, *opened.scorer.models.values()]
    reference = opened.models.reference
    pointers = {
        name.replace(".base.", "."): parameter.data_ptr()
        for name, parameter in reference.named_parameters()
        if "lora_" not in name
    }
    policy = dict(opened.models.policy.named_parameters())
    assert all(torch.equal(parameter, policy[name]) for name, parameter in reference.named_parameters())
    assert all(p.data_ptr() != policy[name].data_ptr() for name, p in reference.named_parameters() if "lora_" in name)
    assert len(models) == 4
    for model in models:
        assert model is not None
        held = {parameter.data_ptr() for parameter in model.parameters()}
        missing = [name for name, pointer in pointers.items() if pointer not in held]
        assert set(missing) <= {"head.weight"}
    metrics = ppo.run(config, job)
    assert metrics["trained_parameters"] < metrics["parameters"]
    whole = load_checkpoint(tmp_path / "out").model
    adapted = load_adapter(load_checkpoint(made / "policy").model, tmp_path / "out" / ADAPTER)
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected = adapted.logits(adapted(tokens))
        torch.testing.assert_close(whole.logits(whole(tokens)), expected, atol=1e-5, rtol=1e-4)
        start = load_checkpoint(made / "policy").model
        assert not torch.allclose(start.logits(start(tokens)), expected, atol=1e-3)


def test_mistakes_are_told_before_anything_is_sampled(made: Path, tmp_path: Path) -> None:
    other = train_tokenizer(["seven green words of another kind"] * 300, 380, tmp_path / "t", 0)
    publish_reward(made / "foreign", other, 5)
    with pytest.raises(UserError, match="another tokenizer than the policy"):
        ppo.run(settings(), new_job(made, tmp_path / "a", rm_safety="foreign"))
    with pytest.raises(UserError, match=r"max_new_tokens = 64 leaves no room .*\n.*lower ppo\.max_new_tokens"):
        ppo.run(settings(max_new_tokens=64), new_job(made, tmp_path / "b"))
    with pytest.raises(UserError, match="no prompt to answer"):
        ppo.run(settings(max_new_tokens=62), new_job(made, tmp_path / "c"))
    with pytest.raises(UserError, match="unknown key 'kl'"):
        settings(kl=0.1)


def test_without_held_out_prompts_the_last_policy_is_kept(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (made / "train_only").exists():
        publish_prompts(made / "train_only", ["the cat?"], [])
    metrics = ppo.run(settings(), new_job(made, tmp_path, prompts="train_only"))
    assert metrics["prompts"]["held_out"] is None
    assert metrics["best_iteration"] is None
    assert "no held-out prompts" in capsys.readouterr().err


def test_adapters_are_not_sharded(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo, "connect", lambda: type("Two", (), {"world_size": 2, "device": torch.device("cpu")}))
    with pytest.raises(UserError, match=r"adapters cannot be sharded.*\n.*ppo\.parallel=ddp"):
        ppo.run(settings(lora=LORA.model_dump(), parallel="fsdp"), new_job(made, tmp_path))
