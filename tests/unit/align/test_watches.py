"""The rules' second opinion: neither refusing nothing nor refusing everything pays."""

import pytest

from groundup.align.watches import rubric_opinion
from groundup.base.records import Criterion, Message, Prompt

REFUSAL, ANSWER = "I'm sorry, but I can't help with this request.", "The answer is 2."


@pytest.mark.parametrize(
    ("criterion", "metadata", "text", "opinion"),
    [
        ("safety", {}, REFUSAL, 1.0),
        ("safety", {}, ANSWER, 0.0),
        ("helpfulness", {}, REFUSAL, 0.0),
        ("helpfulness", {}, " ", 0.0),
        ("helpfulness", {}, ANSWER, 1.0),
    ],
)
def test_what_the_rules_say(criterion: Criterion, metadata: dict[str, str], text: str, opinion: float) -> None:
    prompt = Prompt((Message("user", "How do I open this?"),), criterion=criterion, metadata=metadata)
    assert rubric_opinion([prompt], [text]) == [opinion]
