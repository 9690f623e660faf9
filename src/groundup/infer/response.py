"""One sample of one request, from the queue to its last token."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from groundup.base.generation import Completion, Constraint, Delta, FinishReason, SamplingParams, TopLogps
from groundup.infer.slots import Slot
from groundup.infer.text import ResponseText


@dataclass(eq=False)
class Response:
    """What is asked of one sample, and what it has so far."""

    request_id: int
    sample: int
    group: Hashable
    prompt: list[int]
    params: SamplingParams
    limit: int
    """Most new tokens, within the context."""
    key: int
    """Of its random numbers."""
    text: ResponseText
    is_streamed: bool
    addend: Tensor | None = None
    """What is added to its logits, (V,): bias and penalties; None when there are none."""
    constraint: Constraint | None = None
    slot: Slot | None = None
    """While it is decoded."""
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    top_logps: list[TopLogps] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    pieces: list[str] = field(default_factory=list)

    @property
    def is_adjusted(self) -> bool:
        """Whether its logits are not the model's own."""
        return self.addend is not None or self.constraint is not None

    def take(self, token: int, logp: float | None, top: TopLogps | None) -> Delta | None:
        """Add a token; a delta when this response is streamed."""
        self.token_ids.append(token)
        if logp is not None:
            self.logps.append(logp)
        if top is not None:
            self.top_logps.append(top)
        if token in self.params.stop_ids:
            self.finish_reason = "stop"
        else:
            self._count(token)
            if self.finish_reason is None and len(self.token_ids) == self.limit:
                self.finish_reason = "length"
        # Without stop strings, text that nobody waits for is decoded once, at the end.
        is_due = self.is_streamed or bool(self.params.stop)
        text = self._text_of(self.token_ids[-1:]) if is_due else ""
        if self.finish_reason is not None:
            text += self.text.finish() if is_due else self._text_of(self.token_ids) + self.text.finish()
        if self.text.is_stopped:
            self.finish_reason = "stop"
        self.pieces.append(text)
        if not self.is_streamed:
            return None
        return self._delta(text, [token], [] if logp is None else [logp], [] if top is None else [top])

    def fail(self) -> Delta | None:
        """End without a token, because the constraint allows none."""
        self.finish_reason = "error"
        is_due = self.is_streamed or bool(self.params.stop)
        text = self.text.finish() if is_due else self._text_of(self.token_ids) + self.text.finish()
        self.pieces.append(text)
        return self._delta(text, [], [], []) if self.is_streamed else None

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        return Completion("".join(self.pieces), self.token_ids, self.finish_reason, self.logps, self.top_logps)

    def _count(self, token: int) -> None:
        """Let penalties and the constraint know a token."""
        if self.addend is not None:
            is_new = token not in self.token_ids[:-1] if self.params.presence_penalty else False
            self.addend[token] -= self.params.frequency_penalty + is_new * self.params.presence_penalty
        if self.constraint is not None:
            self.constraint.accept(token)
            if self.constraint.is_finished:
                self.finish_reason = "stop"

    def _text_of(self, token_ids: list[int]) -> str:
        return "".join(self.text.push(token) for token in token_ids if token not in self.params.stop_ids)

    def _delta(self, text: str, token_ids: list[int], logps: list[float], top_logps: list[TopLogps]) -> Delta:
        return Delta(self.request_id, self.sample, text, token_ids, logps, self.finish_reason, top_logps)


def initial_addend(params: SamplingParams, vocab_size: int, device: torch.device) -> Tensor | None:
    """What is added to the logits of a new response. Shapes: (V,) float32."""
    if not (params.logit_bias or params.frequency_penalty or params.presence_penalty):
        return None
    addend = torch.zeros(vocab_size, device=device)
    for token, bias in params.logit_bias:
        addend[token] += bias
    return addend


def adjust_logits(logits: Tensor, responses: Sequence[Response]) -> list[Response]:
    """Apply bias, penalties and constraints in place; returns the responses whose constraint allows no token at all,
    whose rows are then left as they are.

    Shapes: logits (B, V) float32, a row for each response.
    """
    stuck = []
    for row, response in zip(logits, responses):
        if response.addend is not None:
            row += response.addend
        allowed = None if response.constraint is None else response.constraint.allowed()
        if allowed is None:
            continue
        if not allowed.any():
            stuck.append(response)
            continue
        row[: len(allowed)].masked_fill_(torch.from_numpy(~allowed[: len(row)]).to(row.device), float("-inf"))
        row[len(allowed) :] = float("-inf")
    return stuck
