"""The chat page's files and its renderer, without a browser."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient

import groundup.serve
from groundup.serve.page_routes import MAX_CHARACTERS, MAX_TEXTS, PAGE_PATHS, page_router
from groundup.serve.wire import ApiError

FOLDER = Path(groundup.serve.__file__).parent / "page"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = FastAPI()
    app.include_router(page_router())

    @app.exception_handler(ApiError)
    async def answer(request: Request, error: ApiError) -> Response:
        return error.response()

    with TestClient(app) as client:
        yield client


def test_every_file_of_the_page_is_served_with_its_type(client: TestClient) -> None:
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    assert {f"/page/{path.name}" for path in FOLDER.iterdir()} <= PAGE_PATHS
    for path in FOLDER.iterdir():
        answer = client.get(f"/page/{path.name}")
        assert answer.content == path.read_bytes()
        assert answer.headers["content-type"].startswith(types[path.suffix])
    assert client.get("/").content == (FOLDER / "index.html").read_bytes()
    assert client.head("/").content == b""


def test_a_file_that_the_browser_has_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/page/app.js")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/page/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/page/app.js", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/page/", "/page/../page_routes.py", "/page/%2e%2e/app.py", "/page/nothing.js", "/page"]
)
def test_nothing_else_can_be_read(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_markdown_is_rendered_in_order(client: TestClient) -> None:
    answer = client.post("/page/render", json={"texts": ["*a*", "<b>", ""]})
    assert answer.json() == {"html": ["<p><em>a</em></p>\n", "<p>&lt;b&gt;</p>\n", ""]}


@pytest.mark.parametrize(
    "texts", [None, "text", [1], [None], ["x"] * (MAX_TEXTS + 1), ["x" * (MAX_CHARACTERS // 2 + 1)] * 2]
)
def test_what_cannot_be_rendered_is_refused(client: TestClient, texts: object) -> None:
    answer = client.post("/page/render", json={"texts": texts})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "texts"


def test_the_page_names_no_other_host_and_has_nothing_inline() -> None:
    html = (FOLDER / "index.html").read_text()
    assert not re.search(r"\sstyle=|\son\w+=|<style|javascript:", html)
    assert re.findall(r"<script(?![^>]*\ssrc=)", html) == []
    for path in FOLDER.iterdir():
        hosts = re.findall(r"https?://[^\s\"'`)]+", path.read_text())
        assert set(hosts) <= {"http://www.w3.org/2000/svg"}, path.name
        # The one way in for HTML is a template that gets what /page/render made.
        inside = re.findall(
            r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|Function)\b", path.read_text()
        )
        assert inside == (["innerHTML"] if path.name == "markdown.js" else []), path.name


def test_every_icon_and_module_that_is_used_exists() -> None:
    html = (FOLDER / "index.html").read_text()
    scripts = {path.name: path.read_text() for path in FOLDER.glob("*.js")}
    symbols = set(re.findall(r'<symbol id="i-(\w+)"', html))
    used = set(re.findall(r'href="#i-(\w+)"', html))
    used |= {name for text in scripts.values() for name in re.findall(r'icon(?:Button)?\("(\w+)"', text)}
    assert used == symbols
    imports = {name for text in scripts.values() for name in re.findall(r'from "\./([\w.]+)"', text)}
    assert imports | {"app.js", "early.js"} == set(scripts)
    ids = set(re.findall(r'\bid="([\w-]+)"', html))
    assert {name for text in scripts.values() for name in re.findall(r'byId\("([\w-]+)"\)', text)} <= ids
