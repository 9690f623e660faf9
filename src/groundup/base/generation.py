"""What is asked of a text generator and what it gives back; engine, HTTP client and test fakes share these."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""`error`: the constraint cannot be continued (its own limits are reached); the text so far is incomplete."""
TopLogps = list[tuple[int, float]]
"""(token id, log-probability in nats) of the most likely tokens at one place, in falling order."""


class Constraint(Protocol):
    """What one response may say next; every response has its own.

    Why: `allowed` and `accept` run between two steps of all responses, so they must take well below a step's time;
    whatever is slow (compiling a grammar) belongs before the request.
    """

    def allowed(self) -> NDArray[np.bool_] | None:
        """Which tokens may come next, None for all; nothing allowed ends the response with `error`.

        Shapes: (V,), or shorter: what lies beyond its end is not allowed.
        """

    def accept(self, token_id: int) -> None:
        """This token came; called for each but those of `stop_ids`."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing can follow: the response then ends with `stop`."""


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
    top_logps: int = 0
    """How many of the most likely tokens to report at every place."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit)."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time it is in the response already (the prompt does not count)."""
    presence_penalty: float = 0.0
    """Taken once from the logit of each token that is in the response already."""
    constraint: Callable[[], Constraint] | None = None
    """Makes the constraint of each sample."""


@dataclass(frozen=True)
class Completion:
    """One response. `logps` are log-probabilities in nats under the distribution sampled from before top-p/top-k
    (bias, penalties, constraint and temperature applied), one for each of `token_ids`; a stop id, when one ended the
    response, is included in both. `top_logps` are under the same distribution, at most as many as asked for a token."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logps: list[float] = field(default_factory=list)
    top_logps: list[TopLogps] = field(default_factory=list)


@dataclass(frozen=True)
class Delta:
    """What one step added to one response; `finish_reason` is None until the last."""

    request_id: int
    sample: int
    text: str
    token_ids: list[int]
    logps: list[float]
    finish_reason: FinishReason | None
    top_logps: list[TopLogps] = field(default_factory=list)


@dataclass(frozen=True)
class PromptScores:
    """How likely each token of a prompt was, given those before it (temperature 1); both lists have an entry for every
    token but the first, which nothing precedes."""

    logps: list[float]
    top_logps: list[TopLogps]


@dataclass(frozen=True)
class EngineStats:
    """How busy a generator is, and what it has done since it began."""

    active: int
    """Responses that have a slot: prompts being computed and responses being written."""
    waiting: int
    """Responses that have none yet."""
    slots: int
    """Most responses at a time."""
    cached_tokens: int
    """Tokens whose keys and values are kept, those of finished responses included."""
    prefilled_tokens: int
    """Prompt tokens computed."""
    reused_tokens: int
    """Prompt tokens whose keys and values another prompt or response had left."""
    generated_tokens: int
