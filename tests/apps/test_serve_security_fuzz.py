"""Malformed requests by the thousand: no crash, no 5xx, errors in one shape, no memory, and good answers in between."""

import gc
import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from tests.apps.raw_http import Reply, Site, exchange, request, running
from tests.apps.small_model import save_small_model

from groundup.infer.engine import Engine
from groundup.model.checkpoint import load_checkpoint
from groundup.serve.app import create_app
from groundup.serve.config import ServeConfig
from groundup.serve.engine_backend import EngineBackend

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
GOOD = {
    "model": "small", "messages": [{"role": "user", "content": "the small dog"}], "max_tokens": 6, "temperature": 0,
}  # fmt: skip
FIELDS: dict[str, dict[str, Any]] = {
    CHAT: {
        "model": "small",
        "messages": [
            {"role": "system", "content": "dog"},
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
        ],
        "max_tokens": 3,
        "max_completion_tokens": 3,
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 5,
        "seed": 1,
        "stop": ["a", "b"],
        "stop_token_ids": [5],
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "logit_bias": {"5": 1.5},
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
        "tools": None,
        "user": "me",
    },
    COMPLETIONS: {
        "model": "small",
        "prompt": ["dog", [1, 5, 7]],
        "max_tokens": 3,
        "logprobs": 2,
        "echo": True,
        "n": 2,
        "stream": False,
        "stop": "x",
        "suffix": None,
    },
    EMBEDDINGS: {"model": "small", "input": ["dog", "king"], "encoding_format": "base64", "dimensions": 64},
}
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, 10**9, -(10**9), 2**31, 2**63, 2**64, 10**30, "", " ", "a",
    "1", "null",
    "\x00", "\ud800", "\udfff\ud800", "\ufffe", "</s>", "[INST]", "é" * 100, "\U0001f600", "x" * 5000, [], [[]],
    [[[]]], {},
    {"": {}}, [None], [1, "a"], {"a": [{}]}, [10**30], [-1], [1.5], [True], ["", ""], {"type": "text"},
    {"type": "image_url"},
    [{"role": "user"}], [{"role": "tool", "content": "x"}], [{"role": "assistant", "content": "x"}], {"-1": 1},
    {"5": "x"},
    {"99999999999999999999": 1}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"name": "a",
    "schema": 1}},
    {"include_usage": "yes"}, [{"role": "system", "content": "x"}], [{"role": "user", "content": None}],
]  # fmt: skip
RAW_VALUES = [
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1" * 5000, b"0x10", b"01", b"1.", b"'a'",
    b"undefined", b'"\\x"',
    b'"\\ud800"', b'"\xff"', b'"\x01"', b'"', b"[", b"{", b"]", b"[1,]", b'{"a":1,"a":2}', b"[" * 500,
    b'{"a":' * 500, b"\x00",
    b"/*x*/1", b"", b"\xef\xbb\xbf1", b'"' + b"\\" * 999,
]  # fmt: skip
HEAD = b"POST %P HTTP/1.1\r\nHost: %H\r\n"
JSON = HEAD + b"Content-Type: application/json\r\n"
CHUNKED = JSON + b"Transfer-Encoding: chunked\r\n\r\n"
RAW_REQUESTS = [
    b"", b"\r\n\r\n", b"\x00" * 100, b"GET", b"GET /\r\n\r\n", b"POST %P HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00",
    HEAD + b"\r\n", b"POST %P HTTP/1.0\r\n\r\n", b"POST %P HTTP/2.0\r\nHost: %H\r\n\r\n",
    JSON + b"Content-Length: 5\r\n\r\n{}",
    JSON + b"Content-Length: -5\r\n\r\n{}",
    JSON + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    CHUNKED + b"Z\r\n{}\r\n0\r\n\r\n",
    CHUNKED + b"5\r\n{}\r\n0\r\n\r\n",
    CHUNKED + b"fffffffff\r\n{",
    HEAD + b"Transfer-Encoding: gzip, chunked\r\nContent-Type: application/json\r\n\r\n0\r\n\r\n",
    HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    JSON + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    HEAD + b"Expect: 100-continue\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n[]",
    b"POST %P HTTP/1.1\r\nHost : %H\r\n\r\n", b"POST %P HTTP/1.1\r\n Host: %H\r\n\r\n",
    b"GET \xff HTTP/1.1\r\nHost: %H\r\n\r\n",
    HEAD + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n", b"GET %P HTTP/1.1\r\nHost: %H\r\n\r\n",
    b"PUT %P HTTP/1.1\r\nHost: %H\r\n\r\n", b"CONNECT evil:80 HTTP/1.1\r\nHost: %H\r\n\r\n",
    b"TRACE %P HTTP/1.1\r\nHost: %H\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: %H\r\n\r\n", b"GET /%%%%ff%%00/../.. HTTP/1.1\r\nHost: %H\r\n\r\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    checkpoint = load_checkpoint(save_small_model(tmp_path_factory.mktemp("models") / "small"))
    engine = Engine(checkpoint.model, checkpoint.tokenizer, max_slots=4)
    backend = EngineBackend("small", engine, checkpoint.tokenizer, checkpoint.chat, {}, queue=64)
    with running(create_app({"small": backend}, ServeConfig(drain_seconds=1))) as site:
        yield site


def odd_fields(rng: random.Random, path: str) -> bytes:
    """A good body with one to three fields put wrong, left out or made up."""
    body = {
        name: value
        for name, value in FIELDS[path].items()
        if rng.random() < 0.5 or name in ("model", "messages", "prompt")
    }
    body["stream"] = rng.random() < 0.3
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([*FIELDS[path], "unknown", "", "__class__", "chat_template"])
        if rng.random() < 0.15:
            body.pop(name, None)
        elif rng.random() < 0.3 and isinstance(body.get(name), list):
            body[name] = [*body[name], rng.choice(ODD)] * rng.randint(1, 3)
        else:
            body[name] = rng.choice(ODD)
    return json.dumps(rng.choice([body] * 20 + ODD)).encode("utf-8", "surrogatepass")


def odd_bytes(rng: random.Random, path: str) -> bytes:
    """A good body with a value that is no JSON, or with bytes changed, cut or doubled."""
    data = json.dumps(FIELDS[path]).encode()
    if rng.random() < 0.4:
        values = [json.dumps(value).encode() for value in FIELDS[path].values()]
        return data.replace(rng.choice(values), rng.choice(RAW_VALUES), 1)
    place = rng.randrange(len(data))
    change = rng.randrange(4)
    if change == 0:
        return data[:place]
    if change == 1:
        return data[:place] + rng.randbytes(rng.randint(1, 8)) + data[place + 1 :]
    if change == 2:
        return data[:place] + data[place // 2 :]
    return rng.choice(RAW_VALUES)


def send_odd(site: Site, rng: random.Random) -> Reply:
    path = rng.choice([CHAT, CHAT, CHAT, COMPLETIONS, EMBEDDINGS])
    kind = rng.random()
    if kind < 0.6:
        return exchange(site, request(site, "POST", path, None, odd_fields(rng, path)))
    if kind < 0.85:
        return exchange(site, request(site, "POST", path, None, odd_bytes(rng, path)))
    raw = rng.choice(RAW_REQUESTS).replace(b"%P", path.encode()).replace(b"%H", site.name.encode()).replace(b"%%", b"%")
    if rng.random() < 0.3 and raw:
        place = rng.randrange(len(raw))
        raw = raw[:place] + rng.randbytes(1) + raw[place + 1 :]
    return exchange(site, raw, half_close=True)


def check(reply: Reply) -> None:
    if reply.status in (0, 200):
        return
    assert 400 <= reply.status < 500, reply
    if not reply.body:  # HEAD has none
        return
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert error["type"].endswith("_error")


def fuzz(site: Site, count: int, seed: int) -> None:
    rng = random.Random(seed)
    good = json.dumps(GOOD).encode()
    reference = exchange(site, request(site, "POST", CHAT, None, good)).json()["choices"]
    statuses: Counter[int] = Counter()
    process = psutil.Process()
    after_warm_up = 0
    for index in range(count):
        reply = send_odd(site, rng)
        check(reply)
        statuses[reply.status] += 1
        if index % 100 == 99:
            answer = exchange(site, request(site, "POST", CHAT, None, good))
            assert answer.status == 200
            assert answer.json()["choices"] == reference
            health = exchange(site, request(site, "GET", "/health"))
            assert health.status == 200
        if index == count // 5:
            gc.collect()
            after_warm_up = process.memory_info().rss
    gc.collect()
    assert process.memory_info().rss < after_warm_up * 1.05
    assert statuses[200] > 0
    assert statuses[400] > count // 3
    assert_idle(site)


def assert_idle(site: Site) -> None:
    metrics = exchange(site, request(site, "GET", "/metrics")).body.decode()
    for gauge in ("active", "waiting"):
        lines = [line for line in metrics.splitlines() if gauge in line and not line.startswith("#")]
        assert lines
        assert all(float(line.split()[-1]) == 0 for line in lines), lines


def test_a_thousand_malformed_requests(site: Site) -> None:
    fuzz(site, 1000, 0)


@pytest.mark.slow
def test_ten_thousand_malformed_requests(site: Site) -> None:
    fuzz(site, 10_000, 1)
