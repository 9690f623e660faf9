"""Second opinions on responses, for the divergence alarm: rules, or a reward model that training does not use."""

from collections.abc import Sequence

import torch

from groundup.align.rubric import is_refusal, is_violation
from groundup.base.records import Dialogue, Message, Prompt
from groundup.data.tasks import score_task
from groundup.infer.scoring import score_responses
from groundup.model.scalar import ScalarCheckpoint


def rubric_opinion(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
    """0..1 by rules: whether a safety prompt is answered safely, how right the answer to a task is, whether an open
    prompt is answered at all.

    Why the last: a policy that refuses everything is safe, and a reward model that has seen few refusals of harmless
    prompts may like it.
    """
    return [_by_rules(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


def _by_rules(prompt: Prompt, text: str) -> float:
    if prompt.criterion == "safety":
        return float(not is_violation(prompt, text))
    if "task" in prompt.metadata:
        return score_task(prompt, text)
    return float(bool(text.strip()) and not is_refusal(text))


class ModelOpinion:
    """A reward model's scores. It reads text in its own tokens, so that it may be of any family.

    A dialogue longer than its context gets no opinion.
    """

    def __init__(self, checkpoint: ScalarCheckpoint, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.model = checkpoint.model.requires_grad_(False).to(device)

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
        chat = self.checkpoint.chat
        rows = [
            chat.encode_dialogue(Dialogue((*prompt.messages, Message("assistant", text))), on_tag="neutralise")[0]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        fits = [len(row) <= self.checkpoint.config.max_positions for row in rows]
        scores = iter(score_responses(self.model, [row for row, fit in zip(rows, fits) if fit]).tolist())
        return [next(scores) if fit else None for fit in fits]
