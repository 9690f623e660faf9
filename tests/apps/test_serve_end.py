"""The server's end seen by its clients, and its log."""

import json
import logging
import time
from collections.abc import Iterator
from threading import Thread
from typing import Any

import httpx
import pytest
from tests.apps.raw_http import Site
from tests.apps.scripted_backend import ScriptedBackend
from tests.apps.small_model import save_small_model

from groundup.model.checkpoint import load_checkpoint
from groundup.serve.app import create_app
from groundup.serve.config import ServeConfig
from groundup.web import run
from groundup.web.run import Server, make_server

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> ScriptedBackend:
    checkpoint = load_checkpoint(save_small_model(tmp_path_factory.mktemp("models") / "small"))
    return ScriptedBackend(checkpoint.tokenizer, checkpoint.chat)


@pytest.fixture
def server(backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """With little time to drain."""
    monkeypatch.setattr(run, "DRAIN_SECONDS", 1)
    server = make_server(create_app({"fake": backend, "again": backend}, ServeConfig()), "127.0.0.1", 0)
    thread = Thread(target=server.run)
    thread.start()
    yield server
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


def body(question: str, **changes: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": question}], **changes}


def until_started(server: Server) -> Site:
    while not server.started:
        time.sleep(0.01)
    return Site("127.0.0.1", int(server.url.rpartition(":")[2]))


def test_streams_that_take_too_long_are_told(server: Server, backend: ScriptedBackend) -> None:
    site = until_started(server)
    with httpx.stream("POST", site.url + CHAT, json=body("long", stream=True), timeout=60) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        server.should_exit = True
        *_, error, done = lines
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "service_unavailable_error"
    assert done == "data: [DONE]"
    assert backend.num_open == 0


def test_answers_that_take_too_long_are_told(server: Server, backend: ScriptedBackend) -> None:
    site = until_started(server)
    answers: list[httpx.Response] = []
    ask = Thread(target=lambda: answers.append(httpx.post(site.url + CHAT, json=body("long"), timeout=60)))
    ask.start()
    while not backend.num_open:
        time.sleep(0.01)
    server.should_exit = True
    ask.join(60)
    assert answers[0].status_code == 503
    assert "shutting down" in answers[0].json()["error"]["message"]
    assert backend.num_open == 0


def test_one_line_a_request(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    site = until_started(server)
    caplog.set_level(logging.INFO, "groundup")
    httpx.post(site.url + CHAT, json=body("say a great secret", stream=True))
    httpx.post(site.url + CHAT, json=body("say a great secret", temperature="secret"))
    httpx.get(site.url + "/v1/models/secret")
    httpx.get(site.url + "/secret%0d%0ainjected?key=secret")
    httpx.request("SECRET", site.url + "/health")
    while len(caplog.records) < 5:  # the last one is written after its answer
        time.sleep(0.01)
    lines = [record.getMessage() for record in caplog.records]
    # Numbers that differ between runs are left out.
    assert [line.split(" ms")[0].rsplit(" ", 1)[0] for line in lines] == [
        f"POST {CHAT} 200",
        f"POST {CHAT} 400",
        "GET /v1/models/{name:path} 404",
        "GET other 404",
        "other /health 405",
    ]
    assert "tokens" in lines[0]
    assert "secret" not in " ".join(lines).lower()
    metrics = httpx.get(site.url + "/metrics").text
    assert f'groundup_requests_total{{route="{CHAT}",status="400"}} 1.0' in metrics
    assert 'groundup_engine_slots{model="again"}' not in metrics


def test_names_of_one_model(server: Server) -> None:
    site = until_started(server)
    names = [model["id"] for model in httpx.get(site.url + "/v1/models").json()["data"]]
    assert names == ["fake", "again"]
    for name in names:
        answer = httpx.post(site.url + CHAT, json=body("say hello", model=name)).json()
        assert (answer["model"], answer["choices"][0]["message"]["content"]) == (name, "hello")
