"""Requests become parameters, and deltas become texts and log-probabilities."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from groundup.base.generation import Constraint
from groundup.serve import config as limits
from groundup.serve.chat_completions import AnswerText
from groundup.serve.generation import default_sampling
from groundup.serve.isolation import IsolatedConstraint
from groundup.serve.logprobs import LEAST_LOGPROB, ChatLogprobs, CompletionLogprobs
from groundup.serve.schemas import ChatRequest, CompletionRequest, parse_request
from groundup.serve.wire import ApiError
from groundup.text.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["the small dog sees a green river near the old house"] * 20
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """SentencePiece with bytes; it puts a space before every text."""
    return train_tokenizer(TEXTS, 370, tmp_path_factory.mktemp("tokenizer"), 0)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, (0.6, 0.9, 0)),
        ({"temperature": 0.2, "top_p": 1.0, "top_k": 40}, (0.2, 1.0, 40)),
        ({"temperature": None, "top_p": "0.5", "top_k": True}, (0.6, 0.9, 0)),
        ({"temperature": -1, "top_p": 7, "top_k": 10**9}, (0.6, 0.9, 0)),
        ({"temperature": math.nan}, (0.6, 0.9, 0)),
    ],
)
def test_defaults_are_the_models_own_where_they_can_be_used(generation: dict[str, Any], expected: Any) -> None:
    found = default_sampling(generation)
    assert (found["temperature"], found["top_p"], found["top_k"]) == expected


@pytest.mark.parametrize(
    ("pieces", "by_token", "expected"),
    [
        (["An", " answer", ". "], True, "An answer."),
        (["An", "   ", " "], True, "An"),
        (["a ", " b", " ", "c"], True, "a  b c"),
        (["An answer "], False, "An answer "),
        (["line \n "], True, "line \n"),
        ([" ", " "], True, ""),
        ([""], True, ""),
    ],
)
def test_the_space_of_llama2s_frame_is_no_part_of_the_answer(pieces: list[str], by_token: bool, expected: str) -> None:
    text = AnswerText(trims=True)
    last = len(pieces) - 1
    given = [text.push(piece, index == last, by_token and index == last) for index, piece in enumerate(pieces)]
    assert "".join(given) == expected
    plain = AnswerText(trims=False)
    assert "".join(plain.push(piece, False, False) for piece in pieces) == "".join(pieces)


def test_chat_log_probabilities_spell_the_text(tokenizer: Tokenizer) -> None:
    text = "the dog é 水 river"
    ids = tokenizer.encode(text)
    entries = ChatLogprobs(tokenizer, 1).add(
        ids, [-0.5] * len(ids), [[(i, -0.5), (tokenizer.eos_id, -math.inf)] for i in ids]
    )
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == text
    assert "".join(entry["token"] for entry in entries if not entry["token"].startswith("bytes:")) == "the dog   river"
    assert next(entry["token"] for entry in entries if entry["token"].startswith("bytes:")) == "bytes:\\xc3"
    assert all(entry["top_logprobs"] == [{k: entry[k] for k in ("token", "logprob", "bytes")}] for entry in entries)


def test_names_of_control_tokens_and_impossible_ones(tokenizer: Tokenizer) -> None:
    [entry] = ChatLogprobs(tokenizer, 2).add([tokenizer.encode("dog")[0]], [-0.1], [[(tokenizer.eos_id, -math.inf)]])
    assert entry["top_logprobs"] == [{"token": "</s>", "logprob": LEAST_LOGPROB, "bytes": []}]


@pytest.mark.parametrize("keeps_space", [True, False])
def test_offsets_of_completions_count_characters(tokenizer: Tokenizer, keeps_space: bool) -> None:
    text = "the dog é river"
    ids = tokenizer.encode(text)
    lists = CompletionLogprobs(tokenizer, 0, 100, keeps_space=keeps_space)
    parts = [lists.add([token], [-1.0], []) for token in ids]
    seen = " " + text if keeps_space else text
    for part in parts:
        [token], [offset] = part["tokens"], part["text_offset"]
        if not token.startswith("bytes:"):
            assert seen[offset - 100 :].startswith(token)
    assert parts[0]["top_logprobs"] is None


def test_the_drawn_token_is_among_the_top_ones(tokenizer: Tokenizer) -> None:
    dog, river = tokenizer.encode("dog")[-1], tokenizer.encode("river")[-1]
    assert dog != river
    lists = CompletionLogprobs(tokenizer, 1, 0, keeps_space=True).add([dog, dog], [None, -3.0], [[], [(river, -1.0)]])
    assert lists["token_logprobs"] == [None, -3.0]
    assert lists["top_logprobs"][0] is None
    assert sorted(lists["top_logprobs"][1].values()) == [-3.0, -1.0]


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"stop": "a"}, "stop", ["a"]),
        ({"stop": ["a", "b"]}, "stop", ["a", "b"]),
        ({"logit_bias": {"5": 1, "007": -2.5}}, "logit_bias", ((5, 1.0), (7, -2.5))),
        ({"temperature": 1}, "temperature", 1.0),
        ({"user": {"any": "thing"}}, "n", None),
        ({"tools": None, "tool_choice": "auto"}, "tools", None),
    ],
)
def test_requests(changes: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(parse_request(ChatRequest, {**CHAT, **changes}), field) == value


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("text", ["text"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_prompts(prompt: Any, expected: Any) -> None:
    assert parse_request(CompletionRequest, {"model": "m", "prompt": prompt}).prompt == expected


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"messages": [{"role": "user", "content": "x", "contents": "y"}]}, "messages[0].contents", "unknown field"),
        ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias", "twice"),
        ({"logit_bias": {str(i): 1 for i in range(limits.MAX_LOGIT_BIASES + 1)}}, "logit_bias", "at most"),
        ({"logit_bias": {"٣": 1}}, "logit_bias", "not a token id"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "response_format", "belongs"),
        ({"x" * 5000: 1}, "x" * 200, "unknown field"),
    ],
)
def test_refusals_name_the_field(changes: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(ChatRequest, {**CHAT, **changes})
    assert (caught.value.status, caught.value.param) == (400, param)
    assert words in caught.value.message
    assert len(caught.value.message) < 500


class Broken(Constraint):
    def __init__(self, in_method: str) -> None:
        self.in_method = in_method

    def allowed(self) -> Any:
        if self.in_method == "allowed":
            raise RuntimeError("a secret")
        return None

    def accept(self, token_id: int) -> None:
        if self.in_method == "accept":
            raise RuntimeError("a secret")

    @property
    def is_finished(self) -> bool:
        return True


@pytest.mark.parametrize("method", ["allowed", "accept"])
def test_a_broken_constraint_ends_its_own_response(method: str, caplog: pytest.LogCaptureFixture) -> None:
    constraint = IsolatedConstraint(Broken(method))
    constraint.allowed()
    constraint.accept(3)
    allowed: Sequence[bool] | Any = constraint.allowed()
    assert not allowed.any()
    assert not constraint.is_finished
    assert "RuntimeError" in caplog.text
    assert "secret" not in caplog.text.replace('RuntimeError("a secret")', "")


def test_a_constraint_that_works_is_as_it_was() -> None:
    constraint = IsolatedConstraint(Broken("nowhere"))
    assert constraint.allowed() is None
    constraint.accept(3)
    assert constraint.is_finished


def test_the_limits_are_in_the_guide(root: Path) -> None:
    guide = (root / "docs/serve.md").read_text()
    for words in (
        f"`n` ({limits.MAX_N} at most)",
        f"`stop` ({limits.MAX_STOPS} texts of {limits.MAX_STOP_CHARACTERS} characters)",
        f"`logprobs` ({limits.MAX_CHAT_LOGPROBS} alternatives at most)",
        f"{limits.MAX_BODY_BYTES // 2**20} MiB, JSON {limits.MAX_JSON_DEPTH} levels",
        f"{limits.MAX_CHOICES} responses and {limits.MAX_PROMPTS} prompts",
        f"{limits.DEFAULT_TEMPERATURE} and {limits.DEFAULT_TOP_P}",
    ):
        assert words in guide, words
