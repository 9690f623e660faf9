"""What is asked of a text generator and what it gives back; engine, HTTP client and test fakes share these."""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class SamplingParams:
    """How to draw tokens.

    Choice: Meta's reference code defaults to temperature 0.6 and top-p 0.9; ours default to plain sampling, and
    recipes and the chat commands say what they use.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means all."""
    num_samples: int = 1
    """Independent responses to one prompt; they share the prompt's keys and values."""
    seed: int | None = None
    """Fixes the response whatever else is in the batch; None draws a fresh seed."""
    stop: tuple[str, ...] = ()
    """Strings that end the response; they are not part of it, even when they span tokens."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the response (EOS and the chat format's end of turn)."""
    want_logps: bool = False


@dataclass(frozen=True)
class Completion:
    """One response. `logps` are log-probabilities in nats under the distribution sampled from before top-p/top-k
    (temperature applied), one for each of `token_ids`; a stop id, when one ended the response, is included in both."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logps: list[float] = field(default_factory=list)
