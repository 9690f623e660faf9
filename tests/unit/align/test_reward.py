"""The reward of sampled tokens: whose scores, at which position, through which gate, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from groundup.align import reward
from groundup.align.reward import RewardScorer, check_same_tokens, load_scorer
from groundup.base.errors import UserError
from groundup.infer.scoring import score_samples
from groundup.model.config import ModelConfig
from groundup.model.scalar import ScalarCheckpoint, ScalarModel, save_scalar, scalar_from
from groundup.model.transformer import Transformer
from groundup.text.chat import Llama2Chat, TemplateChat
from groundup.text.tokenizer import Tokenizer, train_tokenizer

PROMPTS = [[1, 5, 6, 7], [1, 9], [1, 5, 6, 7]]
RESPONSES = [[20, 21, 2], [30, 31, 32, 33, 34, 2], [22]]
CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def scalar(seed: int, vocab_size: int = 400) -> ScalarModel:
    model = Transformer(ModelConfig(vocab_size, 32, 2, 4, 2, 8, 48, 64))
    model.init_weights(seed)
    return scalar_from(model, seed).eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [f"the cat sees {n} birds and the dog hears a river" for n in range(200)]
    return train_tokenizer(texts, 400, tmp_path_factory.mktemp("tokenizer"), 0)


def folder_of(path: Path, tokenizer: Tokenizer, seed: int) -> Path:
    model = scalar(seed, tokenizer.vocab_size)
    save_scalar(path, ScalarCheckpoint(model, model.config, tokenizer, Llama2Chat(tokenizer)))
    return path


@torch.inference_mode()
def naive_score(model: ScalarModel, row: list[int]) -> float:
    return float(model.scores(model(torch.tensor([row])))[0, -1])


def test_scores_are_those_at_the_last_sampled_token_and_pass_the_gate() -> None:
    helpful, safety = scalar(1), scalar(2)
    with torch.no_grad():
        safety.score.weight.mul_(4)
    generator = torch.Generator().manual_seed(0)
    prompts, responses = [
        [torch.randint(3, 400, (n % 7 + 1,), generator=generator).tolist() for n in range(20)] for _ in range(2)
    ]
    rows = [prompt + response for prompt, response in zip(prompts, responses)]
    want_helpful = [naive_score(helpful, row) for row in rows]
    want_safety = [naive_score(safety, row) for row in rows]
    unsafe = [1 / (1 + torch.tensor(-score).exp().item()) < 0.15 for score in want_safety]
    assert True in unsafe, "the gate must have something to do"
    assert False in unsafe, "and something to let through"
    for flags in ([False] * 20, [False, True] * 10, [True] * 20):
        rewards = RewardScorer(helpful, safety).score(prompts, responses, flags)
        assert rewards.safety is not None
        assert rewards.helpful.tolist() == pytest.approx(want_helpful, abs=1e-5)
        assert rewards.safety.tolist() == pytest.approx(want_safety, abs=1e-5)
        chosen = [s if flag or bad else h for h, s, flag, bad in zip(want_helpful, want_safety, flags, unsafe)]
        assert rewards.gated.tolist() == pytest.approx(chosen, abs=1e-5)
        assert {rewards.gated.dtype, rewards.gated.device.type} == {torch.float32, "cpu"}


def test_one_model_alone_gives_the_reward_of_every_prompt() -> None:
    rewards = RewardScorer(scalar(1)).score(PROMPTS, RESPONSES, [False, True, False])
    assert rewards.safety is None
    assert torch.equal(rewards.gated, rewards.helpful)
    assert RewardScorer(scalar(1)).score([], [], []).gated.shape == (0,)


def test_the_sampled_ids_are_the_scored_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids that no text would be encoded to reach the model as they are, each row once, EOS included."""
    seen = []

    def spy(model: ScalarModel, rows: list[list[int]]) -> torch.Tensor:
        seen.append(rows)
        return torch.zeros(len(rows))

    monkeypatch.setattr(reward, "score_responses", spy)
    RewardScorer(scalar(1), scalar(2)).score([[1, 3, 3]], [[3, 299, 3, 2]], [False])
    assert seen == [[[1, 3, 3, 3, 299, 3, 2]]] * 2


def test_a_prompt_of_many_responses_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores stay those of whole rows, in the order of the responses, whichever prompts stand between."""
    generator = torch.Generator().manual_seed(3)
    few = [torch.randint(3, 400, (n,), generator=generator).tolist() for n in (9, 1, 4)]
    prompts = [few[n * 7 % 3] for n in range(20)]
    responses = [torch.randint(3, 400, (n % 6 + 1,), generator=generator).tolist() for n in range(20)]
    flags = [n % 2 == 0 for n in range(20)]
    scorer = RewardScorer(scalar(1), scalar(2))
    expected = scorer.score_rows([prompt + response for prompt, response in zip(prompts, responses)], flags)
    calls = []

    def spy(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        return score_samples(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(reward, "score_samples", spy)
    rewards = scorer.score(prompts, responses, flags)
    assert [len(call[1]) for call in calls] == [3, 3], "two models, three prompts"
    for name in ("helpful", "safety", "gated"):
        torch.testing.assert_close(getattr(rewards, name), getattr(expected, name), atol=1e-5, rtol=0)


def test_what_cannot_be_scored_is_refused() -> None:
    scorer = RewardScorer(scalar(1))
    assert scorer.max_tokens == 64
    with pytest.raises(UserError, match="65 tokens, the reward model's context only 64"):
        scorer.score([[1] * 60], [[5] * 5], [False])
    with pytest.raises(AssertionError, match="without tokens"):
        scorer.score([[1]], [[]], [False])
    broken = scalar(1)
    with torch.no_grad():
        broken.score.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="safety reward model gives 3 of 3 responses a score that is not finite"):
        RewardScorer(scalar(1), broken).score(PROMPTS, RESPONSES, [False] * 3)


def test_models_that_read_other_tokens_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = Llama2Chat(tokenizer)
    paths = [folder_of(tmp_path / name, tokenizer, seed) for seed, name in enumerate(("helpful", "safety"))]
    scorer = load_scorer(*paths, tokenizer, chat)
    assert list(scorer.models) == ["helpful", "safety"]
    assert list(load_scorer(paths[0], None, tokenizer, chat).models) == ["helpful"]
    other = train_tokenizer(["seven green words of another kind"] * 300, 380, tmp_path / "other", 0)
    with pytest.raises(UserError, match=r"helpful: this reward model has another tokenizer"):
        load_scorer(*paths, other, Llama2Chat(other))
    model = scalar(0)
    checkpoint = ScalarCheckpoint(model, model.config, tokenizer, chat)
    check_same_tokens(tmp_path, checkpoint, tokenizer, chat)
    with pytest.raises(UserError, match="another chat format"):
        check_same_tokens(tmp_path, replace(checkpoint, chat=TemplateChat(tokenizer, CHATML)), tokenizer, chat)
