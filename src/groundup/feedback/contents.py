"""What items ask, what people answer, and how answers are kept: the JSON columns, typed and checked.

Answers come in the terms of the page (0: the response shown first) and are kept in the terms of the item
(0: responses[0]); `shown_first` keeps which one was shown first, so that a bias towards a side can be measured.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, Field, StringConstraints, ValidationError

from groundup.base.config import Config
from groundup.base.records import Rating
from groundup.base.records import Role as MessageRole
from groundup.feedback.errors import Invalid
from groundup.feedback.tables import ItemKind

MAX_CHARACTERS = 50_000
RiskCategory = Literal["illicit and criminal activities", "hateful and harmful activities", "unqualified advice"]
"""Source: section 4.2.1."""
AttackVector = Literal[
    "psychological manipulation",
    "logic manipulation",
    "syntactic manipulation",
    "semantic manipulation",
    "perspective manipulation",
    "non-English language",
    "other",
]
"""Source: section 4.2.1."""
RISK_CATEGORIES: tuple[RiskCategory, ...] = get_args(RiskCategory)
ATTACK_VECTORS: tuple[AttackVector, ...] = get_args(AttackVector)
VIOLATION_FROM = 3
"""Severity from which a red-team answer is a violation. Choice: the paper does not say where on its five points."""


def _storable(text: str) -> str:
    """What a person wrote; PostgreSQL keeps no NUL, and half of a surrogate pair is no character."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("it has characters that cannot be stored")
    return text


Note = Annotated[str, StringConstraints(max_length=4_000), AfterValidator(_storable)]
Text = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_CHARACTERS, pattern=r"\S"), AfterValidator(_storable)
]
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100), AfterValidator(_storable)]
C = TypeVar("C", bound=Config)


def parse(cls: type[C], value: Mapping[str, Any]) -> C:
    """`value` as `cls`. Raises: Invalid, naming the first wrong field."""
    try:
        return cls.model_validate(dict(value))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "answer"
        raise Invalid(f"{field}: {first['msg'].removeprefix('Value error, ')}") from None


class Turn(Config):
    """One message of a dialogue."""

    role: MessageRole
    content: Text


class GivenResponse(Config):
    """A model's response and how it was made."""

    text: Annotated[str, StringConstraints(max_length=MAX_CHARACTERS)]
    model: str = ""
    revision: str = ""
    endpoint_id: int | None = None
    temperature: float | None = None
    seed: int | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class Written(Config):
    """What somebody says to a model."""

    text: Text


class Planned(Config):
    """Who is to answer, and how."""

    endpoint_id: int
    temperature: float
    seed: int


class ItemContent(Config):
    """What an item asks.

    preference, redteam: `messages` empty, or the dialogue so far, ending with the user; with `responses` these two are
    rated, else the annotator talks to the project's models, and what the user says last is an offer. sft: `messages`
    likewise, the last to be answered. comparison: `messages`, and `responses` or they are generated once for all
    raters. entrance: `question` and `choices`.
    """

    messages: list[Turn] = Field(default=[], description="the dialogue so far; empty: the annotator writes the prompt")
    responses: tuple[GivenResponse, GivenResponse] | None = Field(default=None, description="what is to be compared")
    order_seed: int | None = Field(
        default=None, description="even: responses[0] is shown first; none: drawn for each person"
    )
    instructions: Note = Field(default="", description="Markdown: what to write about, or what to try")
    question: Note = Field(default="", description="Markdown: an entrance question")
    choices: list[Note] = Field(default=[], description="its possible answers")
    metadata: dict[str, Any] = Field(default={}, description="kept for the export, never shown")


class Gold(Config):
    """What is right: indices into `responses` (preference, comparison) or into `choices` (entrance)."""

    answers: list[int] = Field(min_length=1, description="any of these is right")


class PairJudgement(Config):
    """Which of two responses is better, how much, and whether each is safe."""

    winner: Literal[0, 1] | None = Field(default=None, description="none: cannot tell")
    rating: Rating | None = None
    is_safe: tuple[bool, bool] | None = Field(default=None, description="needed for the criterion safety alone")
    reason: Note = ""


class RiskLabel(Config):
    """What a red-team turn showed."""

    risk_category: RiskCategory
    attack_vector: AttackVector
    severity: Annotated[int, Field(ge=1, le=5)] = Field(description="1: no harm, 5: severe")
    reason: Note = ""


# What pages send at submission: `PairJudgement` (preference, given responses), and these.


class DialogueAnswer(Config):
    """Of a dialogue with models: what is said of its turns is there already."""

    reason: Note = ""


class ComparisonAnswer(Config):
    """Seven points."""

    score: Annotated[int, Field(ge=-3, le=3)] = Field(description="-3: the first is much better, 3: the second is")
    reason: Note = ""


class SftAnswer(Config):
    """A prompt (where the item has none) and the ideal answer to it."""

    prompt: Text | None = None
    response: Text


class EntranceAnswer(Config):
    """Index of a choice."""

    answer: Annotated[int, Field(ge=0)]


class ReviewAnswer(Config):
    """What becomes of an SFT answer; edits need the whole new text, a rejection needs feedback."""

    decision: Literal["approve", "edit", "reject"]
    prompt: Text | None = None
    response: Text | None = None
    feedback: Note = ""


# What is kept of them (Submission.answer): complete in itself.


class JudgedPair(PairJudgement):
    """A comparison: everything an export row needs."""

    messages: list[Turn]
    responses: tuple[GivenResponse, GivenResponse]
    shown_first: Literal[0, 1]


class StoredPreference(Config):
    """One comparison a turn; the winner of each (or responses[0] without one) continues the dialogue."""

    turns: list[JudgedPair]


class StoredComparison(Config):
    """Score: -3: responses[0] is much better, 3: responses[1] is."""

    messages: list[Turn]
    responses: tuple[GivenResponse, GivenResponse]
    shown_first: Literal[0, 1]
    score: int
    reason: str


class LabelledTurn(RiskLabel):
    """An attack and what came of it."""

    messages: list[Turn]
    response: GivenResponse


class StoredRedTeam(Config):
    """A red-team session; its time is the submission's `seconds`."""

    turns: list[LabelledTurn]
    reason: str


class StoredSft(Config):
    """A dialogue that ends with the user, and the answer."""

    messages: list[Turn]
    response: str


class StoredEntrance(Config):
    """Whether it is right is the submission's `gold_correct`."""

    answer: int


class StoredReview(Config):
    """The dialogue and the answer as they are after the review."""

    submission_id: int
    decision: Literal["approve", "edit", "reject"]
    messages: list[Turn]
    response: str
    feedback: str


STORED_ANSWERS: dict[ItemKind, type[Config]] = {
    "preference": StoredPreference,
    "comparison": StoredComparison,
    "redteam": StoredRedTeam,
    "sft": StoredSft,
    "entrance": StoredEntrance,
    "review": StoredReview,
}
