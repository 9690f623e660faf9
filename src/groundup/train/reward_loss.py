"""The loss of reward models, on packed comparisons. Source: section 3.2.2, equation 2 and the safety classification."""

import torch
from torch import Tensor

from groundup.data.batches import Batch
from groundup.data.pairs import ComparisonBatch
from groundup.model.scalar import ScalarModel
from groundup.model.transformer import Transformer
from groundup.train.losses import LossFn, LossSum
from groundup.train.rl import margin_ranking_loss, safety_loss


def pair_scores(model: Transformer, batch: ComparisonBatch) -> Tensor:
    """Scores of the chosen and the rejected response of each pair. Shapes: (P, 2) float32."""
    assert isinstance(model, ScalarModel), "a reward model has a score head"
    ends = model(batch.tokens, batch.positions, batch.document_ids, rows=batch.pairs.flatten())  # (2P, D)
    return model.scores(ends).view(-1, 2)


def reward_loss(safety_weight: float = 0.0) -> LossFn:
    """Margin ranking loss plus `safety_weight` times the safety loss of pairs with a safety label, in nats.

    `count` is the number of pairs; `metrics` sum over them the pairs ranked right, the differences of their scores and
    the two parts of the loss.
    Choice: the paper gives the auxiliary loss no weight. Both responses of a pair carry half of it, so that weight 1 is
    the ranking loss's.
    """

    def loss(model: Transformer, batch: Batch) -> LossSum:
        assert isinstance(batch, ComparisonBatch)
        scores = pair_scores(model, batch)
        chosen, rejected = scores.unbind(1)
        total = margin_ranking_loss(chosen, rejected, batch.margins).sum()
        metrics = {
            "num_correct": (chosen > rejected).sum(),
            "score_difference": (chosen - rejected).detach().sum(),
        }
        if safety_weight:
            metrics["ranking_loss"] = total.detach()
            of_pairs = safety_loss(scores, batch.is_safe).mean(1)
            safety = torch.where(batch.has_safety, of_pairs, 0).sum()
            metrics["safety_loss"] = safety.detach()
            total = total + safety_weight * safety
        return LossSum(total, torch.tensor(len(batch.pairs), device=scores.device), metrics)

    return loss
