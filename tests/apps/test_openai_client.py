"""Conformance with the official OpenAI client: every kind of request, sync and async, whole and streamed.

The reference is the same request over plain HTTP, whose JSON is checked strictly; each way of the client must give the
same texts, finish reasons, tokens and usage.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.apps.openai_modes import (
    MODEL,
    MODES,
    ChatAnswer,
    Clients,
    Outcome,
    Raw,
    TextAnswer,
    TextLogprobs,
    ask_raw,
    serving,
)
from tests.apps.small_model import CONTEXT

ASK = {"messages": [{"role": "user", "content": "the small dog"}], "max_tokens": 8, "seed": 7}
TEXT = {"prompt": "the small dog", "max_tokens": 8, "seed": 7}
TURNS = [
    {"role": "user", "content": "a song"},
    {"role": "assistant", "content": "the old king hears"},
    {"role": "user", "content": "the forest"},
]
IDS = [1, 300, 301, 302]


SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "animal",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"name": {"enum": ["dog", "fox"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["name", "legs"],
            "additionalProperties": False,
        },
    },
}


def one(outcome: Outcome) -> bool:
    return len(outcome.responses) == 1


def full(outcome: Outcome) -> bool:
    """Eight tokens, or fewer because an end of sequence came."""
    assert outcome.usage is not None
    [response] = outcome.responses
    return (outcome.usage[1] == 8) == (response.finish == "length") or outcome.usage[1] == 8


def count(number: int) -> Callable[[Outcome], bool]:
    return lambda outcome: len(outcome.responses) == number and len({r.text for r in outcome.responses}) > 1


def tokens(outcome: Outcome) -> bool:
    [response] = outcome.responses
    return response.tokens is not None and all(logp is not None and logp <= 0 for _, logp in response.tokens)


def json_or_cut(outcome: Outcome) -> bool:
    [response] = outcome.responses
    return response.finish == "length" or isinstance(json.loads(response.text), dict)


def follows_schema(outcome: Outcome) -> bool:
    for response in outcome.responses:
        animal = json.loads(response.text)
        assert set(animal) == {"name", "legs"}
        assert animal["name"] in ("dog", "fox")
        assert animal["legs"] in range(10)
    return all(response.finish == "stop" for response in outcome.responses)


CHAT: dict[str, tuple[dict[str, Any], Callable[[Outcome], bool]]] = {
    "plain": ({}, full),
    "greedy": ({"temperature": 0}, full),
    "hot": ({"temperature": 2.0}, full),
    "integer-temperature": ({"temperature": 1}, full),
    "top-p": ({"top_p": 0.3}, full),
    "top-p-0": ({"top_p": 0.0}, full),
    "greedy-with-top-p-0": ({"temperature": 0, "top_p": 0}, full),
    "top-k": ({"extra_body": {"top_k": 3}}, full),
    "n-2": ({"n": 2}, count(2)),
    "n-5": ({"n": 5}, count(5)),
    "seed-negative": ({"seed": -3}, full),
    "seed-largest": ({"seed": 2**63 - 1}, full),
    "one-token": ({"max_tokens": 1}, lambda o: o.usage is not None and o.usage[1] == 1),
    "max-completion-tokens": ({"max_tokens": None, "max_completion_tokens": 8}, full),
    "to-the-end-of-the-context": ({"max_tokens": None}, lambda o: o.usage is not None and sum(o.usage) <= CONTEXT),
    "more-than-fits": ({"max_tokens": CONTEXT}, lambda o: o.usage is not None and sum(o.usage) <= CONTEXT),
    "stop-that-never-comes": ({"stop": "never said"}, full),
    "four-stops": ({"stop": ["never", "said", "by", "anyone"]}, full),
    "stop-token-ids": ({"extra_body": {"stop_token_ids": [5, 6]}}, one),
    "logprobs": ({"logprobs": True}, tokens),
    "top-logprobs-0": ({"logprobs": True, "top_logprobs": 0}, tokens),
    "top-logprobs-20": ({"logprobs": True, "top_logprobs": 20}, tokens),
    "logprobs-of-two": ({"logprobs": True, "top_logprobs": 3, "n": 2}, count(2)),
    "logit-bias": ({"logit_bias": {"301": 100}}, lambda o: len(set(o.responses[0].text.split())) == 1),
    "penalties": ({"frequency_penalty": 2, "presence_penalty": -2}, full),
    "system": ({"messages": [{"role": "system", "content": "Sing."}, *TURNS[:1]]}, full),
    "developer": ({"messages": [{"role": "developer", "content": "Sing."}, *TURNS[:1]]}, full),
    "turns": ({"messages": TURNS}, full),
    "content-in-parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": text} for text in ("the", " fox")]}]},
        full,
    ),
    "empty-content": ({"messages": [{"role": "user", "content": ""}]}, full),
    "named-user": ({"messages": [{"role": "user", "name": "ann", "content": "hello"}]}, full),
    "emoji": ({"messages": [{"role": "user", "content": "été 👩‍👩‍👧 水"}]}, full),
    "json-object": ({"response_format": {"type": "json_object"}, "max_tokens": 64}, json_or_cut),
    "json-schema": ({"response_format": SCHEMA, "max_tokens": 64}, follows_schema),
    "json-schema-of-two": ({"response_format": SCHEMA, "max_tokens": 64, "n": 2}, follows_schema),
    "text-format": ({"response_format": {"type": "text"}}, full),
    "ignored-fields": ({"user": "ann", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}, full),
    "no-tools": ({"tools": [], "tool_choice": "none", "parallel_tool_calls": False}, full),
    "nulls": ({"stop": None, "n": None, "temperature": None, "logit_bias": None, "response_format": None}, full),
}  # fmt: skip

COMPLETIONS: dict[str, tuple[dict[str, Any], Callable[[Outcome], bool]]] = {
    "plain": ({}, full),
    "greedy": ({"temperature": 0}, full),
    "default-tokens": ({"max_tokens": None}, lambda o: o.usage is not None and o.usage[1] <= 16),
    "ids": ({"prompt": IDS}, lambda o: o.usage is not None and o.usage[0] == len(IDS)),
    "two-texts": ({"prompt": ["the dog", "a song"]}, count(2)),
    "two-lists-of-ids": ({"prompt": [IDS, IDS[::-1]]}, count(2)),
    "n-2-of-two-texts": ({"prompt": ["the dog", "a song"], "n": 2}, count(4)),
    "same-text-twice": ({"prompt": ["the dog", "the dog"]}, lambda o: o.responses[0].text == o.responses[1].text),
    "empty-text": ({"prompt": ""}, full),
    "best-of-as-many-as-n": ({"n": 3, "best_of": 3}, count(3)),
    "logprobs-0": ({"logprobs": 0}, tokens),
    "logprobs-5": ({"logprobs": 5}, tokens),
    "echo": ({"echo": True}, lambda o: o.responses[0].text.startswith("the small dog")),
    "echo-of-two": (
        {"echo": True, "prompt": ["the dog", "a song"]},
        lambda o: o.responses[1].text.startswith("a song"),
    ),
    "echo-logprobs": (
        {"echo": True, "logprobs": 2},
        lambda o: o.responses[0].tokens is not None and o.responses[0].tokens[0] == ("<s>", None),
    ),
    "echo-only": ({"echo": True, "max_tokens": 0}, lambda o: o.responses[0].text == "the small dog"),
    "echo-only-logprobs": (
        {"echo": True, "max_tokens": 0, "logprobs": 3, "prompt": IDS},
        lambda o: o.usage == (4, 0) and len(o.responses[0].tokens or []) == 4,
    ),
    "stops": ({"stop": ["never", "said"]}, full),
    "json-schema": ({"extra_body": {"response_format": SCHEMA}, "max_tokens": 64}, follows_schema),
    "user": ({"user": "ann"}, full),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("served")) as url:
        yield url


@pytest.fixture(scope="module")
def clients(base: str) -> Iterator[Clients]:
    clients = Clients(base)
    yield clients
    clients.close()


@pytest.fixture(scope="module")
def raw(base: str) -> Iterator[Raw]:
    raw = Raw(base)
    yield raw
    raw.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CHAT)
def test_chat(clients: Clients, raw: Raw, name: str, mode: str) -> None:
    changes, is_right = CHAT[name]
    request = {**ASK, **changes}
    outcome = MODES[mode](clients, "chat", request)
    assert is_right(outcome), outcome
    assert outcome == raw.reference("chat", request)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions(clients: Clients, raw: Raw, name: str, mode: str) -> None:
    changes, is_right = COMPLETIONS[name]
    request = {**TEXT, **changes}
    outcome = MODES[mode](clients, "completions", request)
    assert is_right(outcome), outcome
    assert outcome == raw.reference("completions", request)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_stop_strings_end_the_text_wherever_tokens_do(
    clients: Clients, raw: Raw, kind: str, length: int, mode: str
) -> None:
    # No tokens of single bytes: the text is then of words and signs that can be asked for.
    no_bytes = {str(token): -100 for token in range(3, 259)}
    request = {**(ASK if kind == "chat" else TEXT), "max_tokens": 24, "temperature": 2, "logit_bias": no_bytes}
    [whole] = raw.reference(kind, request).responses
    stops = [whole.text[start : start + length] for start in range(1, len(whole.text) - length)]
    assert stops
    stop = stops[len(stops) // 2]
    [stopped] = MODES[mode](clients, kind, {**request, "stop": [stop]}).responses
    assert (stopped.text, stopped.finish) == (whole.text[: whole.text.index(stop)], "stop")


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_string_may_begin_with_the_first_space_of_a_completion(clients: Clients, raw: Raw, mode: str) -> None:
    request = {**TEXT, "temperature": 0, "logit_bias": {"301": 100}}
    [whole] = raw.reference("completions", request).responses
    assert whole.text.startswith(" ")
    for stop, text in ((whole.text[:3], ""), (" ", ""), (whole.text[1:3], " ")):
        outcome = MODES[mode](clients, "completions", {**request, "stop": stop})
        assert [(response.text, response.finish) for response in outcome.responses] == [(text, "stop")]
        assert outcome.usage is not None
        assert outcome.usage[1] < 8


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_usage_tells_what_the_cache_held_of_the_prompt(clients: Clients, kind: str) -> None:
    words = f"{kind} has not seen this text before, and the quiet king hears a song in the forest"
    request = {**(ASK if kind == "chat" else TEXT), "model": MODEL}
    request |= {"messages": [{"role": "user", "content": words}]} if kind == "chat" else {"prompt": words}
    api: Any = clients.sync.chat.completions if kind == "chat" else clients.sync.completions
    first, again = (api.create(**request).usage for _ in range(2))
    *_, last = api.create(stream=True, stream_options={"include_usage": True}, **request)
    assert first.prompt_tokens_details.cached_tokens < first.prompt_tokens // 2
    assert again.prompt_tokens_details.cached_tokens == again.prompt_tokens - 1, "the last token is computed anew"
    assert last.usage == again


def test_a_seed_gives_the_same_text_and_none_gives_others(raw: Raw) -> None:
    request = {**ASK, "max_tokens": 16, "temperature": 1.0}
    assert ask_raw(raw, "chat", request) == ask_raw(raw, "chat", request)
    unseeded = [ask_raw(raw, "chat", {**request, "seed": None}).responses[0].text for _ in range(3)]
    assert len(set(unseeded)) > 1


def test_top_logprobs_are_the_most_likely_tokens_in_order(raw: Raw) -> None:
    body = {**ASK, "model": MODEL, "temperature": 0, "logprobs": True, "top_logprobs": 4}
    [choice] = ChatAnswer.model_validate_json(raw.post("chat/completions", body).content).choices
    assert choice.logprobs is not None
    assert choice.logprobs.content
    for entry in choice.logprobs.content:
        logps = [other.logprob for other in entry.top_logprobs]
        assert len(logps) == 4
        assert logps == sorted(logps, reverse=True)
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, logps[0])
    said = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
    assert said.decode(errors="replace").rstrip(" ") == choice.message.content.rstrip(" ")


def test_echoed_log_probabilities_come_before_those_of_the_response(raw: Raw) -> None:
    def ask(**changes: Any) -> tuple[str, TextLogprobs]:
        body = {"model": MODEL, "prompt": IDS, "max_tokens": 6, "temperature": 0, "logprobs": 1, **changes}
        [choice] = TextAnswer.model_validate_json(raw.post("completions", body).content).choices
        assert choice.logprobs is not None
        return choice.text, choice.logprobs

    wrote, of_written = ask()
    prompt, of_prompt = ask(echo=True, max_tokens=0)
    both, of_both = ask(echo=True)
    assert both == prompt + wrote
    assert of_both.tokens == of_prompt.tokens + of_written.tokens
    assert of_both.token_logprobs == of_prompt.token_logprobs + of_written.token_logprobs
    assert of_both.text_offset == of_prompt.text_offset + of_written.text_offset
    assert of_both.token_logprobs[0] is None
    assert ask(echo=True, max_tokens=0, prompt=IDS[:3])[1].token_logprobs == pytest.approx(
        of_prompt.token_logprobs[:3], abs=1e-5
    )
