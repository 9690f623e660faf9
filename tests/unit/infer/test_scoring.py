"""Log-probabilities and rewards of given tokens: batched equals one by one equals a plain forward."""

import copy

import pytest
import torch

from groundup.base.errors import UserError
from groundup.infer import scoring
from groundup.infer.scoring import score_responses, score_samples, score_tokens
from groundup.model.scalar import ScalarModel, scalar_from
from groundup.model.transformer import Transformer


@torch.inference_mode()
def plain(model: Transformer, row: list[int]) -> torch.Tensor:
    logps = model.logits(model(torch.tensor([row]))).double().log_softmax(-1)[0]
    return torch.stack([logps[i, token] for i, token in enumerate(row[1:])])


def test_ragged_rows_equal_single_ones(tiny_model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 260, (n,), generator=generator).tolist() for n in (3, 50, 2, 17, 17, 49, 30)]
    monkeypatch.setattr(scoring, "CPU_BATCH_TOKENS", 100)
    monkeypatch.setattr(scoring, "LOGIT_ROWS", 16)
    scores = score_tokens(tiny_model, rows)
    assert [len(score) for score in scores] == [len(row) - 1 for row in rows]
    for row, score in zip(rows, scores):
        torch.testing.assert_close(score.double(), plain(tiny_model, row), atol=1e-5, rtol=0)


def test_a_single_token_has_nothing_to_score(tiny_model: Transformer) -> None:
    assert [len(score) for score in score_tokens(tiny_model, [[5], [1, 2]])] == [0, 1]
    assert [len(score) for score in score_tokens(tiny_model, [[5]])] == [0]
    assert score_tokens(tiny_model, []) == []
    with pytest.raises(UserError, match="row 1"):
        score_tokens(tiny_model, [[1], []])


@pytest.fixture(scope="module")
def reward_model(tiny_model: Transformer) -> ScalarModel:
    return scalar_from(tiny_model, 0)


def ragged_rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 260, (n,), generator=generator).tolist() for n in (3, 50, 2, 17, 1, 49, 30)]


@torch.inference_mode()
def alone(model: ScalarModel, row: list[int]) -> float:
    return float(model(torch.tensor([row]))[0, -1].double() @ model.score.weight[0].double())


def test_a_response_scores_the_same_alone_padded_and_among_others(
    reward_model: ScalarModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ragged_rows()
    expected = torch.tensor([alone(reward_model, row) for row in rows])
    assert float(expected.std()) > 0.1
    singly = torch.cat([score_responses(reward_model, [row]) for row in rows])
    together = score_responses(reward_model, rows)
    monkeypatch.setattr(scoring, "CPU_BATCH_TOKENS", 100)
    in_groups = score_responses(reward_model, rows)
    for scores in (singly, together, in_groups):
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_a_response_scores_the_same_packed_in_a_training_row(reward_model: ScalarModel) -> None:
    """G3: positions restart and nothing is seen across documents, with the attention that training uses."""
    rows = ragged_rows()
    tokens = torch.tensor([[token for row in rows for token in row]])
    lengths = torch.tensor([len(row) for row in rows])
    document_ids = torch.arange(len(rows)).repeat_interleave(lengths)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    hidden = reward_model(tokens, positions, document_ids)
    assert hidden.requires_grad
    packed = reward_model.scores(hidden)[0, lengths.cumsum(0) - 1].detach()
    torch.testing.assert_close(packed, score_responses(reward_model, rows), atol=1e-5, rtol=0)


@pytest.mark.parametrize("limit", [scoring.CPU_BATCH_TOKENS, 60])
def test_samples_of_shared_prompts_score_like_whole_rows(
    reward_model: ScalarModel, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, 260, (n,), generator=generator).tolist() for n in (33, 1, 12)]
    places = [2, 0, 0, 1, 2, 0, 1]
    responses = [torch.randint(0, 260, (n,), generator=generator).tolist() for n in (1, 40, 7, 13, 1, 40, 2)]
    monkeypatch.setattr(scoring, "CPU_BATCH_TOKENS", limit)
    scores = score_samples(reward_model, prompts, places, responses)
    expected = torch.tensor([alone(reward_model, prompts[p] + row) for p, row in zip(places, responses)])
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_bfloat16_weights_give_float32_scores(reward_model: ScalarModel) -> None:
    rows = ragged_rows()
    scores = score_responses(copy.deepcopy(reward_model).bfloat16(), rows)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, score_responses(reward_model, rows), atol=0.1, rtol=0)


def test_a_row_without_a_token_has_no_score(reward_model: ScalarModel) -> None:
    assert score_responses(reward_model, []).shape == (0,)
    with pytest.raises(UserError, match="row 1"):
        score_responses(reward_model, [[1], []])
