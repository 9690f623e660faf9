"""How well a model predicts unseen text: nats per token, and bits per byte, which compare across tokenizers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from groundup.base.errors import UserError
from groundup.data.batches import Batch, Int64s, TokenBatches, fill_micro_batches
from groundup.data.packing import PackedBatches
from groundup.model.transformer import Transformer
from groundup.text.tokenizer import Tokenizer
from groundup.train.losses import lm_loss
from groundup.train.parallel import connect


@dataclass(frozen=True)
class Surprise:
    """The negative log-likelihood of a number of tokens, in nats, each given those before it."""

    nats: float
    tokens: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)

    def bits_per_byte(self, text_bytes: float) -> float:
        """Per byte of the text that the tokens stand for, in UTF-8."""
        return self.nats / math.log(2) / text_bytes


def held_out_metrics(
    model: Transformer, batches: TokenBatches, micro_rows: int, max_windows: int | None = None
) -> dict[str, float]:
    """Loss on the windows of held-out shards: `held_out_loss` in nats per token, `held_out_bits_per_byte`.

    Windows do not overlap, so tokens at their start are predicted from little; that makes the number a little high and
    comparable with the training loss. `max_windows` takes so many, spread evenly over the corpus.
    Choice: BOS and EOS count as predicted tokens, the bytes are those of the text alone. For a part of the windows the
    bytes are taken to be the split's average per token.
    """
    surprise = _surprise_of_rows(model, batches, batches.num_windows, micro_rows, max_windows)
    bytes_per_target = batches.shards.text_bytes / (batches.shards.num_tokens - 1)
    return {
        "held_out_loss": surprise.nats_per_token,
        "held_out_bits_per_byte": surprise.bits_per_byte(surprise.tokens * bytes_per_target),
    }


def held_out_response_loss(
    model: Transformer, batches: PackedBatches, micro_rows: int, max_rows: int | None = None
) -> dict[str, float]:
    """Loss on the response tokens of held-out dialogues: `held_out_loss` in nats per response token."""
    surprise = _surprise_of_rows(model, batches, len(batches.rows), micro_rows, max_rows)
    return {"held_out_loss": surprise.nats_per_token}


@torch.no_grad()
def _surprise_of_rows(
    model: Transformer, batches: TokenBatches | PackedBatches, num_rows: int, micro_rows: int, max_rows: int | None
) -> Surprise:
    """Over rows spread evenly; the ranks of a distributed run share them and all get the total."""
    count = min(num_rows, max_rows or num_rows)
    row_ids: Int64s = np.arange(count, dtype=np.int64) * num_rows // count
    ranks = connect()
    mine = fill_micro_batches(row_ids, ranks.rank, ranks.world_size, micro_rows, count, batches.build)
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for batch in mine:
        sums += _nats_and_count(model, batch)
    nats, tokens = ranks.all_sum(sums).tolist()
    return Surprise(nats, int(tokens))


@torch.no_grad()
def perplexity(
    model: Transformer, ids: Sequence[int], context: int, stride: int | None = None, micro_rows: int = 8
) -> Surprise:
    """How a model predicts every id but the first, from windows of `context` ids that begin every `stride` ids.

    Each id is scored once, in the first window that reaches it, so all but the first window's are predicted from at
    least context - stride + 1 ids before them. `stride` defaults to half the context; equal to it, none overlap.
    """
    stride = stride or max(1, context // 2)
    if not 1 <= stride <= context:
        raise UserError(f"stride {stride} must lie between 1 and the context of {context} tokens")
    if len(ids) < 2:
        raise UserError(f"perplexity needs 2 tokens or more, found {len(ids)}")
    text = np.asarray(ids, dtype=np.int64)
    starts = list(range(0, max(len(text) - 1 - context, 0) + stride, stride))
    sums = torch.zeros(2, dtype=torch.float64)
    for first in range(0, len(starts), micro_rows):
        sums += _nats_and_count(model, _strided(text, starts[first : first + micro_rows], context, stride)).cpu()
    nats, tokens = sums.tolist()
    assert int(tokens) == len(text) - 1
    return Surprise(nats, int(tokens))


def bits_per_byte(
    model: Transformer, tokenizer: Tokenizer, text: str, context: int, stride: int | None = None
) -> float:
    """Bits per UTF-8 byte of a text after BOS, by the strided windows of `perplexity`."""
    surprise = perplexity(model, [tokenizer.bos_id, *tokenizer.encode(text)], context, stride)
    return surprise.bits_per_byte(len(text.encode()))


def _strided(text: Int64s, starts: list[int], context: int, stride: int) -> Batch:
    width = min(context, len(text) - 1)
    tokens = np.zeros((len(starts), width + 1), dtype=np.int64)
    is_target = np.zeros((len(starts), width), dtype=bool)
    for row, start in enumerate(starts):
        found = text[start : start + width + 1]
        tokens[row, : len(found)] = found
        already_scored = context - stride if start else 0
        is_target[row, already_scored : len(found) - 1] = True
    return Batch(
        torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy()), torch.from_numpy(is_target)
    )


def _nats_and_count(model: Transformer, batch: Batch) -> torch.Tensor:
    """Loss in nats and number of target tokens of a batch. Shapes: (2,) float64."""
    loss = lm_loss(model, batch.to(model.embed.weight.device))
    return torch.stack([loss.loss_sum.double(), loss.count.double()])
