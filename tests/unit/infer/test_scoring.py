"""Log-probabilities of given tokens: batched equals one by one equals a plain forward."""

import pytest
import torch

from groundup.base.errors import UserError
from groundup.infer import scoring
from groundup.infer.scoring import score_tokens
from groundup.model.transformer import Transformer


@torch.inference_mode()
def plain(model: Transformer, row: list[int]) -> torch.Tensor:
    logps = model.logits(model(torch.tensor([row]))).double().log_softmax(-1)[0]
    return torch.stack([logps[i, token] for i, token in enumerate(row[1:])])


def test_ragged_rows_equal_single_ones(tiny_model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 260, (n,), generator=generator).tolist() for n in (3, 50, 2, 17, 17, 49, 30)]
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 100)
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
