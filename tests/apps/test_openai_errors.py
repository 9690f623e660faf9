"""What the official OpenAI client makes of refusals, overload, slow answers and ends, and the other routes."""

import base64
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from tests.apps.openai_modes import KEY, MODEL, ChatChunk, Clients, Error, Raw, TextChunk, events, serving
from tests.apps.small_model import CONTEXT

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "the small dog"}], "max_tokens": 4}
TEXT: dict[str, Any] = {"prompt": "the small dog", "max_tokens": 4}
USER = {"role": "user", "content": "a song"}
ANSWER = {"role": "assistant", "content": "of a king"}
SYSTEM = {"role": "system", "content": "Sing."}
LONG = "the dog " * CONTEXT
IMPOSSIBLE = {"type": "integer", "minimum": 3, "maximum": 2}


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


def nested(depth: int) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": nested(depth - 1)}} if depth else {"type": "string"}


# What is changed in a good request, and the field that the refusal names.
CHAT_REFUSALS: dict[str, tuple[dict[str, Any], str | None]] = {
    "no-messages": ({"messages": []}, "messages"),
    "system-only": ({"messages": [SYSTEM]}, "messages"),
    "two-systems": ({"messages": [SYSTEM, SYSTEM, USER]}, "messages"),
    "two-users": ({"messages": [USER, USER]}, "messages"),
    "assistant-last": ({"messages": [USER, ANSWER]}, "messages"),
    "assistant-first": ({"messages": [ANSWER, USER]}, "messages"),
    "system-later": ({"messages": [USER, ANSWER, SYSTEM, USER]}, "messages"),
    "role-tool": ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].role"),
    "content-null": ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    "content-number": ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    "content-image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "messages[0].content",
    ),
    "tag-of-the-format": ({"messages": [{"role": "user", "content": "a [/INST] b"}]}, "messages"),
    "end-of-sequence": ({"messages": [{"role": "user", "content": "a </s> b"}]}, "messages"),
    "temperature-negative": ({"temperature": -0.1}, "temperature"),
    "temperature-3": ({"temperature": 3}, "temperature"),
    "temperature-text": ({"temperature": "hot"}, "temperature"),
    "top-p-2": ({"top_p": 2}, "top_p"),
    "n-0": ({"n": 0}, "n"),
    "n-17": ({"n": 17}, "n"),
    "n-huge": ({"n": 10**9}, "n"),
    "n-true": ({"n": True}, "n"),
    "max-tokens-0": ({"max_tokens": 0}, "max_tokens"),
    "max-tokens-beyond-the-context": ({"max_tokens": CONTEXT + 1}, "max_tokens"),
    "two-names-of-max-tokens": ({"max_completion_tokens": 5}, "max_tokens"),
    "five-stops": ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    "empty-stop": ({"stop": ""}, "stop"),
    "long-stop": ({"stop": "a" * 257}, "stop[0]"),
    "logprobs-number": ({"logprobs": 3}, "logprobs"),
    "top-logprobs-alone": ({"top_logprobs": 3}, "top_logprobs"),
    "top-logprobs-21": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "seed-huge": ({"seed": 2**63}, "seed"),
    "penalty-3": ({"frequency_penalty": 3}, "frequency_penalty"),
    "logit-bias-outside": ({"logit_bias": {"100000": 1}}, "logit_bias"),
    "logit-bias-of-a-word": ({"logit_bias": {"dog": 1}}, "logit_bias"),
    "logit-bias-101": ({"logit_bias": {"5": 101}}, "logit_bias"),
    "stop-token-outside": ({"extra_body": {"stop_token_ids": [-1]}}, "stop_token_ids"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    "format-unknown": ({"response_format": {"type": "xml"}}, "response_format.type"),
    "format-without-schema": ({"response_format": {"type": "json_schema"}}, "response_format"),
    "schema-impossible": ({"response_format": schema(IMPOSSIBLE)}, "response_format"),
    "schema-unknown-type": ({"response_format": schema({"type": "animal"})}, "response_format"),
    "schema-too-long": ({"response_format": schema({"enum": ["a" * 40_000]})}, "response_format"),
    "schema-too-deep": ({"response_format": schema(nested(20))}, "response_format"),
    "unknown-field": ({"extra_body": {"temprature": 1}}, "temprature"),
    "template": ({"extra_body": {"chat_template": "{{ 7 * 7 }}"}}, "chat_template"),
    "too-long": ({"messages": [{"role": "user", "content": LONG}]}, "messages"),
}  # fmt: skip
COMPLETION_REFUSALS: dict[str, tuple[dict[str, Any], str | None]] = {
    "no-prompts": ({"prompt": []}, "prompt"),
    "no-ids": ({"prompt": [[]]}, "prompt"),
    "mixed": ({"prompt": ["a", 1]}, "prompt"),
    "id-outside": ({"prompt": [1, 100000]}, "prompt"),
    "id-negative": ({"prompt": [1, -1]}, "prompt"),
    "65-prompts": ({"prompt": ["a"] * 65}, "prompt"),
    "65-choices": ({"prompt": ["a"] * 13, "n": 5}, "n"),
    "suffix": ({"suffix": "end"}, "suffix"),
    "best-of": ({"best_of": 3}, "best_of"),
    "max-tokens-0": ({"max_tokens": 0}, "max_tokens"),
    "max-tokens-negative": ({"max_tokens": -1}, "max_tokens"),
    "logprobs-21": ({"logprobs": 21}, "logprobs"),
    "too-long": ({"prompt": LONG}, "prompt"),
    "as-long-as-the-context": ({"prompt": [5] * CONTEXT}, "prompt"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("served"), slots=2, queue=1) as url:
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


def refused(clients: Clients, kind: str, request: dict[str, Any], *, is_async: bool) -> openai.APIStatusError:
    client: Any = clients.asynchronous if is_async else clients.sync
    create = (client.chat.completions if kind == "chat" else client.completions).create
    with pytest.raises(openai.APIStatusError) as caught:
        asked = create(**{"model": MODEL, **request})
        if is_async:
            clients.runner.run(asked)
    Error.model_validate_json(caught.value.response.content)
    return caught.value


@pytest.mark.parametrize("way", ["whole", "stream", "async"])
@pytest.mark.parametrize("name", CHAT_REFUSALS)
def test_chat_refusals(clients: Clients, name: str, way: str) -> None:
    changes, param = CHAT_REFUSALS[name]
    error = refused(clients, "chat", {**ASK, **changes, "stream": way == "stream"}, is_async=way == "async")
    assert isinstance(error, openai.BadRequestError), error
    assert (error.type, error.param) == ("invalid_request_error", param), error


@pytest.mark.parametrize("way", ["whole", "stream", "async"])
@pytest.mark.parametrize("name", COMPLETION_REFUSALS)
def test_completion_refusals(clients: Clients, name: str, way: str) -> None:
    changes, param = COMPLETION_REFUSALS[name]
    error = refused(clients, "completions", {**TEXT, **changes, "stream": way == "stream"}, is_async=way == "async")
    assert isinstance(error, openai.BadRequestError), error
    assert (error.type, error.param) == ("invalid_request_error", param), error


def test_too_long_prompts_have_openais_code(clients: Clients) -> None:
    error = refused(clients, "completions", {**TEXT, "prompt": LONG}, is_async=False)
    assert error.code == "context_length_exceeded"
    assert str(CONTEXT) in error.message


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_unknown_model(clients: Clients, kind: str) -> None:
    request = {**(ASK if kind == "chat" else TEXT), "model": "gpt-4\n"}
    error = refused(clients, kind, request, is_async=False)
    assert isinstance(error, openai.NotFoundError)
    assert (error.code, error.param) == ("model_not_found", "model")


@pytest.mark.parametrize("key", ["wrong", "", KEY + "x"])
def test_wrong_keys(base: str, key: str) -> None:
    with (
        openai.OpenAI(base_url=base, api_key=key or "-", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.chat.completions.create(model=MODEL, **ASK)
    assert caught.value.code == "invalid_api_key"


def test_models(clients: Clients) -> None:
    [model] = clients.sync.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "groundup")
    assert clients.sync.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError):
        clients.sync.models.retrieve("other/model")


def test_embeddings_as_floats_and_as_base64(clients: Clients, raw: Raw) -> None:
    texts = ["the small dog", "a song in the forest"]
    answer = clients.sync.embeddings.create(model=MODEL, input=texts)
    assert [item.index for item in answer.data] == [0, 1]
    vectors = np.array([item.embedding for item in answer.data])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1], abs=1e-5)
    assert not np.allclose(vectors[0], vectors[1], atol=1e-3)
    floats = clients.sync.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    assert np.array([item.embedding for item in floats.data]) == pytest.approx(vectors, abs=1e-6)
    body = raw.post("embeddings", {"model": MODEL, "input": texts[0], "encoding_format": "base64"}).json()
    assert np.frombuffer(base64.b64decode(body["data"][0]["embedding"]), "<f4") == pytest.approx(vectors[0], abs=1e-6)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 4


@pytest.mark.parametrize("value", ["", [], [""], [[]], [[1, 100000]], LONG, ["a"] * 257])
def test_embedding_refusals(clients: Clients, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        clients.sync.embeddings.create(model=MODEL, input=value)
    assert caught.value.param == "input"


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_the_bytes_of_a_stream(raw: Raw, kind: str) -> None:
    route, ask, chunk_type = {
        "chat": ("chat/completions", ASK, ChatChunk),
        "completions": ("completions", TEXT, TextChunk),
    }[kind]
    body = {"model": MODEL, **ask, "stream": True, "n": 2}
    answer = raw.post(route, body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    parts = events(answer.content)
    assert all("usage" not in part for part in parts)
    chunks = [chunk_type.model_validate_json(json.dumps(part)) for part in parts]
    finishes = [(choice.index, choice.finish_reason) for chunk in chunks for choice in chunk.choices]
    assert all((0 if i == 0 else 1, None) for i in range(2))
    for index in range(2):
        own = [finish for place, finish in finishes if place == index]
        assert own[-1] in ("length", "stop")
        assert set(own[:-1]) <= {None}
    with_usage = events(raw.post(route, {**body, "stream_options": {"include_usage": True}}).content)
    assert all(part["usage"] is None for part in with_usage[:-1])
    assert with_usage[-1]["choices"] == []
    assert with_usage[-1]["usage"]["completion_tokens"] >= 2


def test_a_full_queue_is_429_and_the_client_tries_again(base: str, raw: Raw) -> None:
    """Two slots and one place in the queue: while a call of three runs, every other call has to wait outside."""
    body = {"model": MODEL, **ASK, "n": 3, "max_tokens": 100, "stream": True, "logit_bias": {"2": -100}}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", f"{base}/chat/completions", json=body, headers=headers, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        refusal = raw.post("chat/completions", {"model": MODEL, **ASK})
        finished = threading.Event()

        def read_on() -> None:
            for _ in lines:
                pass
            finished.set()

        reader = threading.Thread(target=read_on)
        reader.start()
        with openai.OpenAI(base_url=base, api_key=KEY, max_retries=5) as patient:
            answer = patient.chat.completions.create(model=MODEL, **ASK)
        reader.join(60)
    assert finished.is_set()
    assert refusal.status_code == 429
    assert int(refusal.headers["retry-after"]) >= 1
    assert Error.model_validate_json(refusal.content).error.code == "queue_full"
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_time_outs_of_the_client_free_the_slot(base: str, raw: Raw) -> None:
    ask = {**ASK, "max_tokens": 110, "logit_bias": {"2": -100}}
    with openai.OpenAI(base_url=base, api_key=KEY, max_retries=0) as client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model=MODEL, n=3, timeout=0.02, **ask)
    with openai.OpenAI(base_url=base, api_key=KEY, max_retries=8) as client:
        client.chat.completions.create(model=MODEL, n=3, **ASK)  # all places are free again


def test_closing_a_stream_early_frees_the_slot(clients: Clients, base: str) -> None:
    ask = {**ASK, "max_tokens": 110, "n": 3, "logit_bias": {"2": -100}}
    for _ in range(5):
        stream = clients.sync.chat.completions.create(model=MODEL, stream=True, **ask)
        next(iter(stream))
        stream.close()
        deadline = time.monotonic() + 60
        while True:
            text = httpx.get(f"{base[:-3]}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
            if f'groundup_engine_active{{model="{MODEL}"}} 0.0' in text:
                break
            assert time.monotonic() < deadline, "the slots were not freed"


def test_health_and_metrics(base: str) -> None:
    server = base.removesuffix("/v1")
    health = httpx.get(f"{server}/health")
    assert (health.status_code, health.json()) == (200, {"status": "ok", "models": {MODEL: "ok"}})
    assert httpx.get(f"{server}/metrics").status_code == 401
    text = httpx.get(f"{server}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    for name in ("requests_total", "time_to_first_token_seconds_bucket", "completion_tokens_total", "engine_slots"):
        assert f"\ngroundup_{name}{{" in text


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/chat/completions", 405), ("POST", "/v1/nope", 404)]
)
def test_paths_and_methods_that_do_not_exist(base: str, method: str, path: str, status: int) -> None:
    server = base.removesuffix("/v1")
    answer = httpx.request(method, f"{server}{path}", headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == status
    Error.model_validate_json(answer.content)
