"""The server against those who should not get in: keys, hosts, origins, limits, smuggled tokens, templates, the log."""

import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from tests.apps.fake_backend import ANSWER, FakeBackend
from tests.apps.raw_http import Reply, Site, exchange, request, running
from tests.apps.small_model import save_small_model

from groundup.serve import config as limits
from groundup.serve.app import PUBLIC, create_app
from groundup.serve.config import ServeConfig
from groundup.text.chat import chat_format_from_template
from groundup.text.tokenizer import Tokenizer, load_tokenizer
from groundup.web.guard import MAX_HEADERS, SECURITY_HEADERS

KEY = "sk-local-0123456789"
ROLES = ("user", "assistant")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_small_model(tmp_path_factory.mktemp("models") / "small"))


@pytest.fixture(scope="module")
def fake(tokenizer: Tokenizer) -> FakeBackend:
    return FakeBackend(tokenizer, chat_format_from_template(None, tokenizer))


@pytest.fixture(scope="module")
def site(fake: FakeBackend) -> Iterator[Site]:
    with running(create_app({"fake": fake}, ServeConfig(drain_seconds=1))) as site:
        yield site


@pytest.fixture(scope="module")
def locked_app(tokenizer: Tokenizer) -> FastAPI:
    backend = FakeBackend(tokenizer, chat_format_from_template(None, tokenizer))
    return create_app({"fake": backend}, ServeConfig(api_keys=("other", KEY), drain_seconds=1))


@pytest.fixture(scope="module")
def locked(locked_app: FastAPI) -> Iterator[Site]:
    with running(locked_app) as site:
        yield site


def post(site: Site, path: str, body: Any, headers: dict[str, str | None] | None = None) -> Reply:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return exchange(site, request(site, "POST", path, headers, data))


def chat(content: Any = "the small dog", **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields}


def completion(prompt: Any = "the small dog", **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": prompt, "max_tokens": 4, **fields}


def assert_error(reply: Reply, *statuses: int) -> None:
    assert reply.status in statuses, reply
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    for name, value in SECURITY_HEADERS.items():
        assert reply.headers[name.decode()] == value.decode().lower()


# ---- keys (row 17)


def route_paths(routes: Sequence[Any]) -> list[tuple[str, str]]:
    """All routes as (method, path), those of included routers too."""
    found = []
    for route in routes:
        if isinstance(route, APIRoute):
            found += [(method, route.path.replace("{name:path}", "fake")) for method in sorted(route.methods)]
        else:
            found += route_paths(getattr(route, "routes", None) or route.original_router.routes)
    return found


def test_every_route_but_the_public_ones_needs_the_key(locked: Site, locked_app: FastAPI) -> None:
    routes = route_paths(locked_app.routes)
    assert {path for _, path in routes} >= {"/v1/chat/completions", "/v1/models", "/metrics", "/health", "/page/render"}
    for (method, path), key in product(routes, (None, "", "Bearer wrong", "Bearer other2", f"Basic {KEY}")):
        body = b"{}" if method == "POST" else None
        reply = exchange(locked, request(locked, method, path, {"Authorization": key}, body))
        if path in PUBLIC:
            assert reply.status == 200, path
        else:
            assert reply.status == 401, path
    for method, path in routes:
        body = b"{}" if method == "POST" else None
        reply = exchange(locked, request(locked, method, path, {"Authorization": f"Bearer {KEY}"}, body))
        assert reply.status in (200, 400), (method, path, reply)


def test_public_paths_are_the_page_and_the_health() -> None:
    """The written allow-list: whatever is added to it has to be added here."""
    assert {path for path in PUBLIC if not path.startswith("/page/")} == {"/", "/health", "/favicon.ico"}
    assert all(path.endswith((".js", ".css", ".svg", ".html")) for path in PUBLIC if path.startswith("/page/"))


def test_two_hundred_tricks_without_a_key(locked: Site) -> None:
    paths = ("/v1/chat/completions", "/v1/models", "/metrics", "/v1/completions", "/page/render")
    tricks = (
        "{}", "/{}", "{}/", "//{}//", "/.{}", "/health/..{}", "/health{}", "/health%2f..{}", "/%2e%2e{}", "/page/..{}",
        "/page/page.js/..{}", "{}?/health", "{}%3f/health", "{};/health", "{}%00", "/health%00{}", "{}%20", "/\\{}",
        "{}/../health", "{}%2f..%2fhealth", "http://localhost/health/..{}", "/favicon.ico{}", "/HEALTH{}", "/./{}",
    )  # fmt: skip
    sneaky: list[dict[str, str | None]] = [
        {},
        {"X-Forwarded-For": "127.0.0.1", "X-Original-URL": "/health", "X-Forwarded-Host": "localhost"},
    ]
    cases = list(product(paths, tricks, sneaky))
    assert len(cases) >= 200
    for path, trick, headers in cases:
        target = trick.format(path)
        get = exchange(locked, request(locked, "GET", target, headers))
        assert get.status in (400, 401, 404), (target, get)
        assert exchange(locked, request(locked, "POST", target, headers, b"{}")).status in (400, 401), target


# ---- web pages (row 18)


def test_forty_ways_of_a_web_page(site: Site, fake: FakeBackend) -> None:
    """Rebinding, foreign and null origins, simple requests, preflights and frames: none is answered, none gets in."""
    body = json.dumps(chat()).encode()
    post_chat = ("POST", "/v1/chat/completions")
    hosts = [
        "evil.example",
        "evil.example:80",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "0.0.0.0",
        "10.0.0.1",
        "x",
    ]
    origins = [
        "http://evil.example",
        "null",
        "file://",
        "http://localhost:1",
        "https://127.0.0.1",
        f"http://{site.name}.x",
    ]
    cases: list[tuple[str, str, dict[str, str | None]]] = []
    for host in hosts:
        cases += [(*post_chat, {"Host": host}), ("GET", "/v1/models", {"Host": host}), ("GET", "/", {"Host": host})]
    for origin in origins:
        preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        cases += [(*post_chat, {"Origin": origin}), ("OPTIONS", post_chat[1], {"Origin": origin, **preflight})]
    for kind in ("text/plain", "text/plain;application/json", "application/x-www-form-urlencoded", None):
        cases.append((*post_chat, {"Content-Type": kind}))
    framed: dict[str, str | None] = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}
    for site_kind in ("cross-site", "same-site"):
        cases.append(("GET", "/", {"Sec-Fetch-Site": site_kind, **framed}))
        cases.append(("GET", "/v1/models", {"Sec-Fetch-Site": site_kind, "Sec-Fetch-Mode": "no-cors"}))
        cases.append((*post_chat, {"Sec-Fetch-Site": site_kind, "Sec-Fetch-Mode": "cors"}))
    assert len(cases) >= 40
    before = len(fake.prompts)
    for method, path, headers in cases:
        reply = exchange(site, request(site, method, path, headers, body if method == "POST" else None))
        assert_error(reply, 400, 403, 415, 421)
        assert not [name for name in reply.headers if name.startswith("access-control")]
    assert len(fake.prompts) == before
    assert exchange(site, request(site, "POST", post_chat[1], {"Origin": site.url}, body)).status == 200
    assert len(fake.prompts) == before + 1


# ---- limits (row 19)

Make = Callable[[int], dict[str, Any]]
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
BOUNDS: dict[str, tuple[str, int, Make]] = {
    "n": (CHAT, limits.MAX_N, lambda n: chat(n=n)),
    "choices": (COMPLETIONS, limits.MAX_CHOICES // 4, lambda n: completion(["dog"] * min(n, 10**4), n=4)),
    "prompts": (COMPLETIONS, limits.MAX_PROMPTS, lambda n: completion(["dog"] * min(n, 10**4))),
    "max_tokens": (CHAT, 100_000, lambda n: chat(max_tokens=n)),
    "max_completion_tokens": (CHAT, 100_000, lambda n: {**chat(max_completion_tokens=n), "max_tokens": None}),
    "completion max_tokens": (COMPLETIONS, 100_000, lambda n: completion(max_tokens=n)),
    "top_logprobs": (CHAT, limits.MAX_CHAT_LOGPROBS, lambda n: chat(logprobs=True, top_logprobs=n)),
    "logprobs": (COMPLETIONS, limits.MAX_COMPLETION_LOGPROBS, lambda n: completion(logprobs=n)),
    "stops": (CHAT, limits.MAX_STOPS, lambda n: chat(stop=[f"s{i}" for i in range(min(n, 10**5))])),
    "stop": (CHAT, limits.MAX_STOP_CHARACTERS, lambda n: chat(stop="x" * min(n, 10**6))),
    "stop_token_ids": (CHAT, limits.MAX_STOP_TOKEN_IDS, lambda n: chat(stop_token_ids=[5] * min(n, 10**5))),
    "logit_bias": (CHAT, 300, lambda n: chat(logit_bias={str(i): 1 for i in range(100, 100 + min(n, 10**5))})),
    "bias": (CHAT, 100, lambda n: chat(logit_bias={"5": n})),
    "top_k": (CHAT, limits.MAX_TOP_K, lambda n: chat(top_k=n)),
    "seed": (CHAT, limits.MAX_SEED, lambda n: chat(seed=n)),
    "temperature": (CHAT, 2, lambda n: chat(temperature=n)),
    "top_p": (CHAT, 1, lambda n: chat(top_p=n)),
    "frequency_penalty": (CHAT, 2, lambda n: chat(frequency_penalty=n)),
    "messages": (
        CHAT,
        limits.MAX_MESSAGES - 1,
        lambda n: {**chat(), "messages": [{"role": ROLES[i % 2], "content": "x"} for i in range(min(n, 9999))]},
    ),
    "parts": (CHAT, limits.MAX_CONTENT_PARTS, lambda n: chat([{"type": "text", "text": "x"}] * min(n, 10**4))),
    "model": (CHAT, 1000, lambda n: {**chat(), "model": "fake" if n <= 1000 else "x" * min(n, 10**6)}),
    "inputs": (EMBEDDINGS, limits.MAX_EMBEDDING_INPUTS, lambda n: {"model": "fake", "input": ["x"] * min(n, 10**5)}),
    "dimensions": (EMBEDDINGS, 2, lambda n: {"model": "fake", "input": "x", "dimensions": 2 if n <= 2 else n}),
    "token id": (COMPLETIONS, 300, lambda n: completion([1, n if n <= 300 else n + 1000])),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUNDS)
def test_limits(name: str, site: Site) -> None:
    """At the limit and one below it works; one above and far above is refused with a word about the field."""
    path, limit, make = BOUNDS[name]
    below = limit - 1 if name != "messages" else limit - 2  # a dialogue ends with its user
    for value in (below, limit):
        reply = post(site, path, make(value))
        assert reply.status == 200, (value, reply)
    above = limit + 1 if name != "messages" else limit + 2
    for value in (above, limit + 1000, *(far for far in (10**9, 10**30) if far > limit)):
        reply = post(site, path, make(value))
        assert_error(reply, 400, 404)
        of_bodies = (b"2048 keys", b"20000 strings")  # what no field has to answer for
        assert reply.json()["error"]["param"] or any(words in reply.body for words in of_bodies), reply


def test_limits_below(site: Site) -> None:
    for fields in (
        {"n": 0}, {"n": -1}, {"max_tokens": 0}, {"max_tokens": -1}, {"temperature": -0.1}, {"top_p": -1}, {"top_k": -1},
        {"stop": ""}, {"stop": [""]}, {"stop": [1]}, {"logit_bias": {"-1": 1}}, {"logit_bias": {"x": 1}}, {"seed": 1.5},
        {"logit_bias": {"99999999": 1}}, {"stop_token_ids": [-1]}, {"stop_token_ids": [10**6]}, {"n": True},
        {"messages": []}, {"messages": None}, {"model": ""}, {"model": None}, {"min_tokens": 5}, {"unknown": 1},
        {"temperature": "1"}, {"stream": "yes"}, {"stream_options": []}, {"logprobs": 1}, {"response_format": "json"},
    ):  # fmt: skip
        assert_error(post(site, CHAT, {**chat(), **fields}), 400, 404)


def test_body_limit(site: Site) -> None:
    base = len(json.dumps(chat("")))
    for size, status in (
        (limits.MAX_BODY_BYTES - 1, 400),
        (limits.MAX_BODY_BYTES, 400),
        (limits.MAX_BODY_BYTES + 1, 413),
    ):
        reply = post(site, CHAT, chat("x" * (size - base)))  # its prompt does not fit into the context
        assert_error(reply, status)
    reply = exchange(site, request(site, "POST", CHAT, {"Content-Length": str(10**9)}, b"{"))
    assert_error(reply, 413)


def test_header_limits(site: Site) -> None:
    assert (
        exchange(site, request(site, "GET", "/health", {f"X-{i}": "y" for i in range(MAX_HEADERS - 1)})).status == 200
    )
    assert_error(exchange(site, request(site, "GET", "/health", {f"X-{i}": "y" for i in range(MAX_HEADERS)})), 431)
    assert exchange(site, request(site, "GET", "/health", {"X": "y" * 10**6})).status in (0, 400, 431)


def test_depth_and_number_of_brackets(site: Site) -> None:
    def nested(depth: int) -> bytes:
        return b'{"model": "fake", "metadata": %s}' % (b"[" * depth + b"]" * depth)

    for depth in (limits.MAX_JSON_DEPTH, limits.MAX_JSON_DEPTH + 1, limits.MAX_JSON_BRACKETS - 1):
        assert b"nested deeper" in post(site, CHAT, nested(depth)).body
    assert b"nested deeper" not in post(site, CHAT, nested(limits.MAX_JSON_DEPTH - 1)).body
    many = b'{"metadata": [%s]}'
    assert_error(post(site, CHAT, many % (b"[]," * limits.MAX_JSON_BRACKETS)[:-1]), 400)
    keys = b",".join(b'"%x": 1' % i for i in range(limits.MAX_JSON_KEYS + 1))
    assert b"keys" in post(site, CHAT, b'{"metadata": {%s}}' % keys).body
    strings = b'{"metadata": [%s]}' % b",".join([b'"a"'] * limits.MAX_JSON_STRINGS)
    assert b"strings" in post(site, CHAT, strings).body
    # Brackets in strings are none.
    reply = post(site, CHAT, chat("[" * 5000 + '"\\' + "{" * 5000))
    assert reply.status == 200, reply


MANY_KEYS = b",".join(b'"%x":1' % i for i in range(2000))


@pytest.mark.parametrize(
    "body",
    [
        b'"' + b'\\"' * 1_000_000,
        b'"' + b'\\"' * 1_000_000 + b"\\",
        b'{"' + b'a":1,"' * 300_000,
        b"{" + b",".join(b'"%x":1' % i for i in range(180_000)) + b',"0":1}',
        b'{"model":"fake",' + b",".join(b'"%x":1' % i for i in range(170_000)) + b"}",
        b'{"model": "fake", "messages": [' + b",".join([b"1"] * 900_000) + b"]}",
        b'{"model": "fake", "messages": [' + b",".join([b"{%s}" % MANY_KEYS] * 120) + b"]}",
        b'{"model": "fake", "prompt": [' + b",".join([b'"a"'] * 450_000) + b"]}",
        b'{"' + b"n" * 2_000_000 + b'": 1}',
        b'{"n": ' + b"1" * 1_000_000 + b"}",
        b'{"n": 1e' + b"9" * 1_000_000 + b"}",
    ],
    ids=range(11),
)
def test_bodies_that_take_long_to_read(body: bytes, site: Site) -> None:
    """No time beyond linear: squares of these lengths would be hours, and the suite's time-out would tell."""
    assert len(body) <= limits.MAX_BODY_BYTES
    for path in (CHAT, COMPLETIONS):
        assert_error(post(site, path, body), 400)


# ---- smuggled tokens (row 10)

PIECES = (
    "</s>", "<s>", "<unk>", "<pad>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<|im_start|>", "<|im_end|>", "<0x0A>",
    "</", "s>", "<", ">", "[IN", "ST]", "[/", "<<SY", "S>>", "<<", ">>", "<|eot_id|>", "▁", "\u200b", " ", "\n", "\x00",
    "［INST］", "＜/s＞", "‹/s›", "[INST\u0301]", "\u202e]TSNI[", "dog", "é", "\U0001f600", "{{ bos }}", "system",
    "\\u003c/s>",
)  # fmt: skip


def hostile(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 6)))


def assert_no_smuggling(prompt: list[int], turns: int, answers: int, has_system: bool, tokenizer: Tokenizer) -> None:
    """What only the frame may bring is there as often as the frame brings it."""
    assert prompt.count(tokenizer.bos_id) == turns
    assert prompt.count(tokenizer.eos_id) == answers
    controls = set(tokenizer.control_tokens.values()) - {tokenizer.bos_id, tokenizer.eos_id}
    assert not controls & set(prompt)
    text = tokenizer.decode(prompt)
    assert text.count("[INST]") == text.count("[/INST]") == turns
    assert text.count("<<SYS>>") == text.count("<</SYS>>") == has_system


def smuggle(site: Site, fake: FakeBackend, count: int, seed: int) -> None:
    """Hostile texts in every text field of all three routes."""
    rng = random.Random(seed)
    tokenizer = fake.tokenizer
    accepted = 0
    for index in range(count):
        before = len(fake.prompts)
        kind = index % 4
        if kind < 2:
            answers = rng.randint(0, 2)
            roles = ["system"] * kind + ["user", "assistant"] * answers + ["user"]
            messages: list[dict[str, Any]] = [{"role": role, "content": hostile(rng)} for role in roles]
            if rng.random() < 0.3:
                texts = [hostile(rng) for _ in range(3)]  # a tag may come together only where parts meet
                messages[-1]["content"] = [{"type": "text", "text": text} for text in texts]
            body = {"model": "fake", "messages": messages, "max_tokens": 1, "stop": hostile(rng), "user": hostile(rng)}
            reply = post(site, CHAT, body)
            if reply.status == 200:
                (prompt,) = fake.prompts[before:]
                assert_no_smuggling(prompt, answers + 1, answers, bool(kind), tokenizer)
        elif kind == 2:
            text = hostile(rng)
            reply = post(site, COMPLETIONS, completion([text, hostile(rng)], max_tokens=1))
            assert reply.status == 200
            for prompt in fake.prompts[before:]:
                assert prompt[0] == tokenizer.bos_id
                assert not set(prompt[1:]) & set(tokenizer.control_tokens.values())
        else:
            reply = post(site, EMBEDDINGS, {"model": "fake", "input": [hostile(rng), hostile(rng)]})
            assert reply.status == 200
            for prompt in fake.prompts[before:]:
                assert not set(prompt[1:]) & set(tokenizer.control_tokens.values())
        if reply.status == 200:
            accepted += 1
        else:
            assert_error(reply, 400)
            assert len(fake.prompts) == before
    assert accepted > count // 3


def test_no_token_is_smuggled(site: Site, fake: FakeBackend) -> None:
    smuggle(site, fake, 600, 0)


@pytest.mark.slow
def test_no_token_is_smuggled_in_ten_thousand(site: Site, fake: FakeBackend) -> None:
    smuggle(site, fake, 10_000, 1)


# ---- templates (row 32)

PAYLOADS = [
    template.format(code)
    for template in (
        "{{{{ {} }}}}", "{{% set x = {} %}}", "{{% if {} %}}x{{% endif %}}", "${{{}}}", "#{{{}}}", "<%= {} %>",
    )
    for code in (
        "7 * 191", "''.__class__.__mro__[1].__subclasses__()",
        "cycler.__init__.__globals__.os.popen('touch CANARY').read()",
        "lipsum.__globals__['os'].system('touch CANARY')", "self.__init__.__globals__.__builtins__.open('CANARY','w')",
        "request.application.__globals__", "range(10**9)|list", "'a' * 10**10", "config.items()",
        "namespace.__init__.__globals__['__builtins__']['__import__']('os').system('touch CANARY')",
        "joiner|attr('__init__')|attr('__globals__')",
    )
]  # fmt: skip


def test_no_template_is_run(
    tokenizer: Tokenizer, site: Site, fake: FakeBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty payloads, in texts where they stay texts (also where the model's own format is a template), and as fields
    that other servers take templates from."""
    monkeypatch.chdir(tmp_path)
    assert len(PAYLOADS) >= 60
    other = FakeBackend(tokenizer, chat_format_from_template(CHATML, tokenizer), name="chatml")
    with running(create_app({"fake": other}, ServeConfig(drain_seconds=1))) as templated:
        for (where, backend), payload in product(((site, fake), (templated, other)), PAYLOADS):
            messages = [
                {"role": "system", "content": payload}, {"role": "user", "content": payload},
                {"role": "assistant", "content": payload}, {"role": "user", "content": payload},
            ]  # fmt: skip
            body = {**chat(), "messages": messages, "user": payload, "metadata": {"a": payload}, "stop": payload}
            reply = post(where, CHAT, body)
            assert reply.status == 200, reply
            assert tokenizer.decode(backend.prompts[-1]).count(payload) == 4
            assert "1337" not in tokenizer.decode(backend.prompts[-1])
    for payload in PAYLOADS:
        for field in ("chat_template", "template", "tokenizer", "add_generation_prompt", "chat_template_kwargs"):
            reply = post(
                site, CHAT, chat(**{field: payload if field != "chat_template_kwargs" else {"chat_template": payload}})
            )
            assert_error(reply, 400)
            assert reply.json()["error"]["param"] == field
    assert list(tmp_path.iterdir()) == []


# ---- the log (row 37)


def test_the_log_keeps_secrets(locked: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Neither prompts nor answers nor keys, and no line that a client wrote."""
    caplog.set_level(logging.DEBUG)
    secret = "my-secret-prompt"
    key = {"Authorization": f"Bearer {KEY}"}
    assert post(locked, CHAT, chat(secret), key).status == 200  # type: ignore[arg-type]
    assert post(locked, CHAT, chat(secret, stream=True), key).status == 200  # type: ignore[arg-type]
    assert post(locked, CHAT, chat("[INST] " + secret), key).status == 400  # type: ignore[arg-type]
    assert post(locked, CHAT, {secret: 1}, key).status == 400  # type: ignore[arg-type]
    post(locked, CHAT, chat(secret), {"Authorization": "Bearer wrong-secret-key"})
    forged = f"/{secret}%0d%0aERROR%20forged%20line?{secret}={secret}"
    for method in ("GET", "POST", "X\x1b"):
        exchange(locked, request(locked, method, forged, {**key, "User-Agent": f"{secret}\x1b[31m"}))
    exchange(locked, f"{secret} / HTTP/1.1\r\n{secret}\r\n\r\n".encode())
    text = caplog.text
    assert "/v1/chat/completions 200" in text
    for word in (secret, KEY, "wrong-secret-key", ANSWER, "forged", "\x1b"):
        assert word not in text
