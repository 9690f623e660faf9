"""The reward of responses: one or two reward models and the safety gate, on the very tokens that were sampled.

Shape letters: B responses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from groundup.base.errors import UserError
from groundup.base.records import Dialogue, Message
from groundup.infer.scoring import score_responses, score_samples
from groundup.model.scalar import ScalarCheckpoint, ScalarModel, load_scalar
from groundup.text.chat import ChatFormat
from groundup.text.tokenizer import Tokenizer, same_tokenizer
from groundup.train.rl import gate_rewards

SAFETY_THRESHOLD = 0.15
"""A response whose sigmoid(safety score) lies below is judged by its safety alone. Source: section 3.2.3."""
_PROBE = Dialogue(tuple(Message("assistant" if turn % 2 else "user", f"Turn {turn}, ok?") for turn in range(4)))


@dataclass(frozen=True)
class Rewards:
    """Linear scores (logits) of B responses. Shapes: all (B,) float32, on the CPU."""

    helpful: Tensor
    safety: Tensor | None
    """None: there is no safety model."""
    gated: Tensor
    """The reward: what the safety gate lets through; the helpfulness score where there is no safety model."""


class RewardScorer:
    """Scores responses with a helpfulness model and, where there is one, a safety model."""

    def __init__(
        self, helpful: ScalarModel, safety: ScalarModel | None = None, *, threshold: float = SAFETY_THRESHOLD
    ) -> None:
        self.models: dict[str, ScalarModel] = {"helpful": helpful} | ({} if safety is None else {"safety": safety})
        self.threshold = threshold
        self.max_tokens = min(model.config.max_positions for model in self.models.values())
        """Longest prompt and response together."""

    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], is_safety_prompt: Sequence[bool]
    ) -> Rewards:
        """Scores at the last token of each response: its EOS, unless it was cut off.

        Why: `responses` are the ids that were sampled, EOS included. Decoding and encoding them again could give other
        ids, and the reward of one response would be paid for another.

        A prompt of many responses is computed once for all of them.

        Raises: UserError for a row longer than a model's context, and for scores that are not finite.
        """
        assert all(len(response) > 0 for response in responses), "a response without tokens has no score"
        assert len(prompts) == len(responses), "one prompt for each response"
        distinct: dict[tuple[int, ...], int] = {}
        places = [distinct.setdefault(tuple(prompt), len(distinct)) for prompt in prompts]
        if len(prompts) < 2 * max(len(distinct), 1):  # little to share
            return self.score_rows([[*prompt, *each] for prompt, each in zip(prompts, responses)], is_safety_prompt)
        longest = max(len(prompt) + len(each) for prompt, each in zip(prompts, responses))
        shared = list(distinct)
        return self._rewards(lambda model: score_samples(model, shared, places, responses), longest, is_safety_prompt)

    def score_rows(self, rows: Sequence[Sequence[int]], is_safety_prompt: Sequence[bool]) -> Rewards:
        """`score` of rows that hold a prompt and its response."""
        assert len(rows) == len(is_safety_prompt), "one flag for each row"
        longest = max(map(len, rows), default=0)
        return self._rewards(lambda model: score_responses(model, rows), longest, is_safety_prompt)

    def _rewards(
        self, score: Callable[[ScalarModel], Tensor], longest: int, is_safety_prompt: Sequence[bool]
    ) -> Rewards:
        if longest > self.max_tokens:
            raise UserError(
                f"a prompt and its response have {longest} tokens, the reward model's context only {self.max_tokens}",
                "lower max_new_tokens or leave out the longest prompts",
            )
        scores = {name: _finite(name, score(model).float().cpu()) for name, model in self.models.items()}
        helpful, safety = scores["helpful"], scores.get("safety")
        if safety is None:
            return Rewards(helpful, None, helpful)
        flags = torch.tensor(list(is_safety_prompt), dtype=torch.bool)
        return Rewards(helpful, safety, gate_rewards(helpful, safety, flags, self.threshold))


def _finite(name: str, scores: Tensor) -> Tensor:
    if not bool(scores.isfinite().all()):
        bad = int((~scores.isfinite()).sum())
        raise UserError(
            f"the {name} reward model gives {bad} of {len(scores)} responses a score that is not finite",
            "its training failed; look at its loss and train it again with a lower lr",
        )
    return scores


def load_scorer(
    helpful: Path,
    safety: Path | None,
    tokenizer: Tokenizer,
    chat: ChatFormat,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> RewardScorer:
    """The scorer for a policy with this tokenizer and chat format, from folders of reward models.

    Raises: UserError for a reward model that reads other tokens than the policy writes.
    """
    models = []
    for path in (helpful, safety):
        if path is not None:
            checkpoint = load_scalar(path, dtype)
            check_same_tokens(path, checkpoint, tokenizer, chat)
            models.append(checkpoint.model.to(device).eval())
    return RewardScorer(*models)


def check_same_tokens(path: Path, reward: ScalarCheckpoint, tokenizer: Tokenizer, chat: ChatFormat) -> None:
    """Refuse a reward model whose ids mean something else than the policy's.

    Why: it reads the sampled ids themselves, in the frame of the policy's chat format.
    """
    remedy = "start the reward model from a chat checkpoint of the same family as the policy"
    if not same_tokenizer(reward.tokenizer, tokenizer):
        raise UserError(f"{path}: this reward model has another tokenizer than the policy", remedy)
    if reward.chat.encode_dialogue(_PROBE) != chat.encode_dialogue(_PROBE):
        raise UserError(f"{path}: this reward model has another chat format than the policy", remedy)
