"""Who may call what in the annotation application: every route against every role, forged requests, other sites."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from tests.apps.annotation import Annotation, annotation, asked, csrf_of
from tests.apps.fake_models import ANSWERS
from tests.apps.feedback_world import PASSWORD

from groundup.feedback.access import ACCESS, ADMINS, ANYONE, REVIEWERS, SIGNED_IN
from groundup.feedback.contents import GivenResponse, Gold, ItemContent, Turn
from groundup.feedback.projects import NewItem
from groundup.feedback.tables import Assignment, Item
from groundup.feedback.views import static_url

SECRETS = (*ANSWERS, "sha-of-alpha-7b", "sha-of-beta-13b")
CALLERS = {None: "anonymous", "ann": "annotator", "ben": "annotator", "rita": "reviewer", "admin": "admin"}


def is_refused(answer: httpx.Response) -> bool:
    """By who is asking, whatever they ask for."""
    words = ("You are not signed in", "Your account may not do this", "This form was made")
    return answer.status_code in (401, 403) and any(word in answer.text for word in words)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Annotation]:
    """ann is at work on items of all kinds."""
    with annotation(tmp_path_factory.mktemp("access")) as world:
        for name, role in (("ann", "annotator"), ("ben", "annotator"), ("rita", "reviewer")):
            world.person(name, role)
        world.project("compare", "preference", [NewItem() for _ in range(40)], overlap=2)
        world.project("evaluate", "comparison", [asked("Why?") for _ in range(40)], overlap=3)
        world.project("write", "sft", [asked("Why?") for _ in range(40)], is_reviewed=True)
        world.project("attack", "redteam", [NewItem() for _ in range(40)])
        yield world


def routes_of(routes: Sequence[Any]) -> list[tuple[str, str]]:
    """All as (method, path), those of included routers too."""
    found = []
    for route in routes:
        if isinstance(route, APIRoute):
            found += [(method, route.path) for method in sorted(route.methods)]
        elif (inner := getattr(route, "original_router", None)) is not None:
            found += routes_of(inner.routes)
    return found


def test_the_table_names_exactly_the_routes_that_there_are(world: Annotation) -> None:
    routes = routes_of(world.app.routes)
    assert len(routes) == len(set(routes)) > 40
    assert set(routes) == set(ACCESS)


def test_the_table_says_what_it_should() -> None:
    """Written down a second time, so that nothing is opened by accident."""
    public = {path for (_, path), allowed in ACCESS.items() if allowed == ANYONE}
    assert public == {"/health", "/login", "/invitations/{token}"}
    for (method, path), allowed in ACCESS.items():
        assert allowed in (ANYONE, SIGNED_IN, REVIEWERS, ADMINS)
        if path.startswith("/admin"):
            assert allowed == ADMINS or (method == "GET" and allowed == REVIEWERS), path


def place(world: Annotation, name: str, project_name: str) -> int:
    """The assignment at which somebody is at work in a project."""
    user_id = next(a.id for a in world.services.accounts.accounts(world.admin) if a.name == name)
    project_id = next(p.id for p in world.services.projects.projects() if p.name == project_name)
    task = world.services.work.claim(user_id, project_id)
    assert task is not None
    return task.assignment_id


def filled(path: str, assignment: int) -> str:
    values = {"assignment_id": assignment, "number": 1, "token": "no-such-token"}
    return re.sub(r"\{(\w+)\}", lambda found: str(values.get(found[1], 1)), path)


@pytest.mark.parametrize("name", CALLERS, ids=str)
def test_every_route_refuses_whom_the_table_refuses(world: Annotation, name: str | None) -> None:
    refused = []
    for (method, path), allowed in ACCESS.items():
        if path == "/logout" or (method, path) == ("POST", "/account/password"):
            continue  # below: they end the session
        with world.client(name) as client:
            target = filled(path, place(world, name or "ann", "write"))
            answer = client.request(method, target, json={} if method in ("POST", "PUT") else None)
        if CALLERS[name] in allowed:
            assert not is_refused(answer), (method, path, answer.text)
            assert answer.status_code < 500, (method, path, answer.text)
        else:
            assert is_refused(answer), (method, path, answer.text)
            assert answer.status_code == (401 if name is None else 403)
            refused.append(path)
    assert len(refused) == sum(CALLERS[name] not in allowed for allowed in ACCESS.values()) - 2 * (name is None)


def test_signing_out_ends_the_session(world: Annotation) -> None:
    with world.client("ben") as client, httpx.Client(base_url=world.url) as stranger:
        assert stranger.post("/logout").status_code == 401
        assert stranger.post("/account/password").status_code == 401
        cookie = client.cookies["groundup_session"]
        assert client.post("/logout").status_code == 303
        stranger.cookies["groundup_session"] = cookie
        assert stranger.get("/projects/1").status_code == 401


def own_routes() -> list[tuple[str, str]]:
    return [key for key in ACCESS if "{assignment_id}" in key[1]]


@pytest.mark.parametrize("other", ["ben", "rita", "admin"])
def test_nobody_reaches_the_work_of_somebody_else(world: Annotation, other: str) -> None:
    assert len(own_routes()) >= 9
    bodies: dict[str, Any] = {
        "draft": {"version": 1, "draft": {"response": "mine"}},
        "submit": {"version": 1, "key": "k" * 16, "answer": {"response": "mine"}},
        "turns": {"version": 1, "prompt": "mine"},
        "judgement": {"version": 1, "judgement": {}},
        "drop": {"version": 1},
    }
    for project in ("write", "compare", "evaluate", "attack"):
        theirs = place(world, "ann", project)
        with world.client(other) as client:
            for method, path in own_routes():
                body = bodies.get(path.rsplit("/", 1)[-1], {}) if method != "GET" else None
                answer = client.request(method, filled(path, theirs), json=body)
                assert answer.status_code == 404, (method, path, answer.text)
                assert client.get(filled(path, 10**6)).text == client.get(filled(path, theirs)).text
        with world.services.database.read() as session:
            assert session.get_one(Assignment, theirs).draft is None


def test_every_change_needs_the_token(world: Annotation) -> None:
    """Without one, with a wrong one, with that of another session; in a header, in a form, in JSON."""
    with world.client("ann") as client, world.client("ben") as other:
        stolen = other.headers["x-csrf-token"]
        assignment = place(world, "ann", "write")
        right = client.headers.pop("x-csrf-token")
        tried = 0
        for (method, path), allowed in ACCESS.items():
            if method == "GET" or "annotator" not in allowed:
                continue
            target = filled(path, assignment)
            for token in ("", "0" * 64, stolen, right[:-1], "ä" * 10):
                header = {"x-csrf-token": token.encode()} if token else {}
                for how in (
                    {"json": {"csrf_token": right}, "headers": header},
                    {"data": {"csrf_token": token, "name": "x"}},
                    {"files": {"file": b"x"}, "data": {"csrf_token": token}},
                ):
                    answer = client.request(method, target, **how)  # type: ignore[arg-type]
                    assert answer.status_code == 403, (method, path, token, answer.text)
                    tried += 1
        assert tried >= 15 * 13
        assert client.get("/account").status_code == 200
        assert client.post("/logout", data={"csrf_token": right}).status_code == 303


def test_the_forms_of_visitors_are_protected_too(world: Annotation) -> None:
    with httpx.Client(base_url=world.url) as client:
        good = {"name": "ann", "password": PASSWORD, "next": "//evil.invalid/x"}
        assert client.post("/login", data=good).status_code == 403
        token = csrf_of(client.get("/login").text)
        visitor = client.cookies.get("groundup_visitor")
        with httpx.Client(base_url=world.url) as elsewhere:
            assert elsewhere.post("/login", data={**good, "csrf_token": token}).status_code == 403
        wrong = client.post("/login", data={**good, "password": "x" * 12, "csrf_token": token})
        assert wrong.status_code == 401
        assert "wrong" in wrong.text
        answer = client.post("/login", data={**good, "csrf_token": token})
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        cookie = next(value for value in answer.headers.get_list("set-cookie") if "groundup_session=" in value)
        assert "httponly" in cookie.lower()
        assert "samesite=lax" in cookie.lower()
        assert visitor not in cookie
        assert client.get("/").status_code == 200


@pytest.mark.parametrize(
    "next_url", ["//evil.invalid", "https://evil.invalid", "/\\evil.invalid", "javascript:x", "/\t/x"]
)
def test_signing_in_leads_nowhere_else(world: Annotation, next_url: str) -> None:
    with world.client("ann") as client:
        assert client.get("/login", params={"next": next_url}).headers["location"] == "/"
        assert client.get("/login", params={"next": "/projects/1"}).headers["location"] == "/projects/1"


def test_cookies_are_secure_behind_https(tmp_path: Path) -> None:
    with annotation(tmp_path, secure_cookies=True) as world, httpx.Client(base_url=world.url) as client:
        cookie = client.get("/login").headers["set-cookie"]
        assert "; Secure" in cookie


def test_forty_ways_of_a_web_page(world: Annotation) -> None:
    """Rebinding, foreign and null origins, simple requests, preflights and frames, by a browser that is signed in."""
    url = httpx.URL(world.url)
    hosts = ["evil.invalid", f"evil.invalid:{url.port}", "localhost.evil.invalid", "127.0.0.1.nip.io", "0.0.0.0", "x"]
    origins = ["https://evil.invalid", "null", "file://", "http://localhost:1", f"http://localhost:{url.port}"]
    change, read = ("POST", "/projects/1/next"), ("GET", "/account")
    cases: list[tuple[str, str, dict[str, str]]] = []
    for host in hosts:
        cases += [(*change, {"host": host}), (*read, {"host": host}), ("GET", "/login", {"host": host})]
    for origin in origins:
        preflight = {"access-control-request-method": "POST", "access-control-request-headers": "x-csrf-token"}
        cases += [(*change, {"origin": origin}), ("OPTIONS", change[1], {"origin": origin, **preflight})]
        cases += [(*read, {"origin": origin})]
    framed = {"sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}
    for site in ("cross-site", "same-site"):
        cases += [(*read, {"sec-fetch-site": site, **framed}), (*read, {"sec-fetch-site": site})]
        cases += [(*change, {"sec-fetch-site": site, "sec-fetch-mode": mode}) for mode in ("no-cors", "navigate")]
    assert len(cases) >= 40
    with world.client("ann") as client:
        for method, path, headers in cases:
            answer = client.request(method, path, headers=headers)
            assert answer.status_code in (403, 421), (method, path, headers, answer.text)
            assert not [name for name in answer.headers if name.startswith("access-control")]
        assert client.get("/account", headers={"host": url.netloc.decode(), "origin": world.url}).status_code == 200
        assert client.post("/login", content=b"name=x", headers={"content-type": "text/plain"}).status_code == 415


def test_every_answer_has_the_policy(world: Annotation) -> None:
    with world.client("ann") as client:
        for path in ("/", "/login", "/account", "/nothing", "/projects/1", static_url("app.js"), "/health"):
            answer = client.get(path)
            policy = answer.headers["content-security-policy"]
            assert "default-src 'self'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            if "html" in answer.headers.get("content-type", ""):
                assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=", answer.text), path
                assert answer.headers["cache-control"] == "no-store"


def test_there_is_no_account_and_no_key_at_the_start(tmp_path: Path) -> None:
    from groundup.feedback.app import create_app
    from groundup.feedback.settings import AnnotateConfig

    services = create_app(AnnotateConfig(database=str(tmp_path / "a.sqlite"))).state.services
    first, second = services.accounts.first_admin_token(), services.accounts.first_admin_token()
    assert first != second, "every start makes its own"
    boss = services.accounts.accept(second, "boss", PASSWORD)
    assert boss.role == "admin"
    assert services.accounts.accounts(boss) == [boss]
    assert services.accounts.first_admin_token() is None


# ---- Blind


def test_annotators_see_no_names_of_models_and_nobody_elses_ratings(world: Annotation) -> None:
    """Every page and every answer that two annotators get, in all kinds of work, read for what must not be there."""
    given = (
        GivenResponse(text="one", model="alpha-7b", revision="sha-of-alpha-7b"),
        GivenResponse(text="two", model="beta-13b", revision="sha-of-beta-13b"),
    )
    messages = [Turn(role="user", content="Why does it rain?")]
    items = [NewItem(ItemContent(messages=messages, responses=given, metadata={"model": "alpha-7b"}), overlap=2)]
    gold = [NewItem(ItemContent(messages=messages, responses=given), gold=Gold(answers=[1]))]
    rated = world.project("given pairs", "preference", items + gold, gold_share=1.0)
    read: list[str] = []

    def keep(answer: httpx.Response) -> httpx.Response:
        read.append(str(answer.headers) + answer.text)
        return answer

    for name in ("ann", "ben"):
        with world.client(name) as client:
            for path in ("/", "/account", f"/projects/{rated.id}", f"/projects/{project_id(world, 'compare')}"):
                keep(client.get(path))
            for kind in ("compare", "evaluate", "attack"):
                talk(world, client, name, kind, keep)
            for _ in range(2):
                location = keep(client.post(f"/projects/{rated.id}/next")).headers["location"]
                page = keep(client.get(location)).text
                answer = {"winner": 0, "rating": "better", "reason": f"private words of {name}"}
                body = {"version": version_of(page), "key": f"{name}-{location:-<30}", "answer": answer}
                assert keep(client.post(f"{location}/submit", json=body)).status_code == 200
    text = "\n".join(read)
    assert len(read) > 30
    for secret in (*SECRETS, world.models_url, "gold", "swapped", "order_seed"):
        assert secret not in text, secret
    half = len(read) // 2
    assert "private words of ann" not in "".join(read[half:])
    assert len(world.answers(rated)) == 4


def project_id(world: Annotation, name: str) -> int:
    return next(project.id for project in world.services.projects.projects() if project.name == name)


def version_of(page: str) -> int:
    found = re.search(r'data-version="(\d+)"', page)
    assert found
    return int(found[1])


def talk(world: Annotation, client: httpx.Client, name: str, project: str, keep: Any) -> None:
    """One exchange with the models, by the calls that the page makes."""
    location = f"/tasks/{place(world, name, project)}"
    path = f"{location}/responses/stream"
    if project != "evaluate":
        body = {"version": version_of(keep(client.get(location)).text), "prompt": "Why does it rain?"}
        number = keep(client.post(f"{location}/turns", json=body)).json()["number"]
        path = f"{location}/turns/{number}/stream"
    events = [json.loads(line) for line in keep(client.post(path)).text.splitlines()]
    assert events[-1]["end"] is True
    assert len(events[-1]["html"]) == (1 if project == "attack" else 2)
    keep(client.get(location))


def test_the_order_of_responses_is_kept_by_the_server(world: Annotation) -> None:
    """What a person calls the first response is stored as the item's own; half of the people see them turned."""
    given = (GivenResponse(text="ONE", model="a"), GivenResponse(text="TWO", model="b"))
    content = ItemContent(messages=[Turn(role="user", content="Why?")], responses=given)
    project = world.project("order", "preference", [NewItem(content) for _ in range(12)])
    seen = set()
    with world.client("ann") as client:
        for number in range(12):
            location = client.post(f"/projects/{project.id}/next").headers["location"]
            page = client.get(location).text
            is_one_first = page.index("ONE") < page.index("TWO")
            seen.add(is_one_first)
            # Always for ONE, wherever it is.
            answer = {"winner": 0 if is_one_first else 1, "rating": "better"}
            body = {"version": version_of(page), "key": f"order-{number:012}", "answer": answer}
            assert client.post(f"{location}/submit", json=body).status_code == 200
    assert seen == {True, False}
    for answer in world.answers(project):
        assert answer["turns"][0]["winner"] == 0
    assert {answer["turns"][0]["shown_first"] for answer in world.answers(project)} == {0, 1}


def test_refusals_tell_pages_and_scripts_apart(world: Annotation) -> None:
    html = {"accept": "text/html"}
    with httpx.Client(base_url=world.url) as client:
        answer = client.get("/projects/1", headers=html)
        assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=/projects/1")
        assert client.get("/projects/1").json()["kind"] == "notsignedin"
        assert "<h1>Nothing here</h1>" in client.get("/nothing", headers=html).text
        assert client.get("/invitations/unknown", headers=html).status_code == 404
    with world.client("ann") as client:
        assert client.get("/admin", headers=html).status_code == 403
        answer = client.put("/tasks/1/draft", json={"version": "x" * 50, "draft": {}})
        assert answer.status_code == 422
        assert "xxx" not in answer.text
    with world.services.database.read() as session:
        assert session.get(Item, 1) is not None


def test_mistakes_of_ours_show_nothing_of_the_inside(world: Annotation, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(user_id: int) -> None:
        raise RuntimeError("secret of the inside")

    with world.client("ann") as client:
        monkeypatch.setattr(world.services.work, "offers", broken)
        page, script = client.get("/", headers={"accept": "text/html"}), client.get("/")
        monkeypatch.undo()
        for answer in (page, script):
            assert answer.status_code == 500
            assert "secret" not in answer.text
            assert "Traceback" not in answer.text
            assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "Your drafts are kept" in page.text
        assert client.get("/").status_code == 200
