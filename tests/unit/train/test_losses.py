"""The chunked loss and log-probabilities against the plain formulas in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from groundup.data.batches import Batch
from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer
from groundup.train.losses import _exponentiate, _score_rows, chunked_cross_entropy, lm_loss, token_logps

N, D, V = 37, 8, 50


def rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,), generator=generator), torch.rand(N, generator=generator)


def oracle(hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients with all logits at once, in float64."""
    wide_hidden, wide_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    losses = F.cross_entropy(wide_hidden @ wide_weight.T, targets, reduction="none")
    loss = (losses * row_weights.double()).sum()
    loss.backward()
    assert wide_hidden.grad is not None
    assert wide_weight.grad is not None
    return loss.detach(), wide_hidden.grad, wide_weight.grad


@pytest.mark.parametrize("chunk_rows", [1, 4, 9, 37, 100])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_loss_and_gradients_are_those_of_the_plain_formula(chunk_rows: int, is_weighted: bool) -> None:
    hidden, weight, targets, row_weights = rows()
    if not is_weighted:
        row_weights = torch.ones(N)
    loss, num_correct = chunked_cross_entropy(
        hidden, weight, targets, row_weights if is_weighted else None, chunk_rows=chunk_rows
    )
    (loss / 5).backward()
    expected, hidden_gradient, weight_gradient = oracle(hidden, weight, targets, row_weights)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hidden.grad, (hidden_gradient / 5).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.grad, (weight_gradient / 5).float(), rtol=1e-5, atol=1e-6)
    assert num_correct == ((hidden @ weight.T).argmax(-1) == targets).sum()


def test_in_float64_it_is_exact() -> None:
    hidden, weight, targets, row_weights = rows(torch.float64)
    loss, _ = chunked_cross_entropy(hidden, weight, targets, row_weights.double(), chunk_rows=5)
    loss.backward()
    expected, hidden_gradient, weight_gradient = oracle(hidden, weight, targets, row_weights)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(hidden.grad, hidden_gradient, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(weight.grad, weight_gradient, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("is_autocast", [False, True])
def test_bfloat16_native_and_autocast(is_autocast: bool) -> None:
    hidden, weight, targets, row_weights = rows(torch.float32 if is_autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        loss, _ = chunked_cross_entropy(hidden, weight, targets, row_weights, chunk_rows=8)
    loss.backward()
    expected, hidden_gradient, weight_gradient = oracle(hidden, weight, targets, row_weights)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    for parameter, gradient in ((hidden, hidden_gradient), (weight, weight_gradient)):
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype
        assert (parameter.grad.double() - gradient).norm() < 0.01 * gradient.norm()


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    loss, _ = chunked_cross_entropy(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    torch.testing.assert_close(hidden.grad, torch.tensor([[2.0], [0.0]]))


def make_batch(seed: int = 0) -> tuple[Transformer, Batch]:
    model = Transformer(ModelConfig(V, 16, 2, 2, 1, 8, 24, tie_embeddings=True))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (3, 12), generator=generator)
    is_target = torch.rand(3, 11, generator=generator) < 0.4
    return model, Batch(tokens[:, :-1], tokens[:, 1:], is_target)


def test_lm_loss_with_tied_weights_is_the_plain_one() -> None:
    model, batch = make_batch()
    result = lm_loss(model, batch)
    result.loss_sum.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    losses = F.cross_entropy(model.logits(model(batch.tokens)).flatten(0, 1), batch.targets.flatten(), reduction="none")
    loss = losses[batch.is_target.flatten()].sum()
    loss.backward()
    assert result.count == batch.num_targets > 0
    torch.testing.assert_close(result.loss_sum, loss)
    assert len(ours) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_only_target_rows_reach_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_batch()
    seen = []

    def count(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(len(logits))
        return _exponentiate(logits, targets)

    monkeypatch.setattr("groundup.train.losses._exponentiate", count)
    lm_loss(model, batch)
    assert sum(seen) == batch.num_targets < batch.tokens.numel()


def test_a_batch_without_targets_gives_zero_gradients() -> None:
    model, batch = make_batch()
    result = lm_loss(model, Batch(batch.tokens, batch.targets, torch.zeros_like(batch.is_target)))
    result.loss_sum.backward()
    assert (result.loss_sum, result.count) == (0, 0)
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() == 0


def test_without_gradients_none_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_batch()
    expected = lm_loss(model, batch).loss_sum
    upstreams = []

    def record(*arguments: object) -> object:
        upstreams.append(arguments[3])
        return _score_rows(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("groundup.train.losses._score_rows", record)
    with torch.no_grad():
        torch.testing.assert_close(lm_loss(model, batch).loss_sum, expected)
    assert upstreams == [None]


def test_token_logps_and_their_gradient() -> None:
    model, batch = make_batch()
    worth = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(1))
    logps = token_logps(model, batch)
    (logps * worth).sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plain = model.logits(model(batch.tokens)).log_softmax(-1).gather(-1, batch.targets[..., None]).squeeze(-1)
    plain = plain * batch.is_target
    (plain * worth).sum().backward()
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, plain)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(-logps.sum(), lm_loss(model, batch).loss_sum)
