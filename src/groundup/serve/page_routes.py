"""The chat page: its files, and Markdown made into safe HTML for it."""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from groundup.serve.wire import ApiError, JsonResponse, parse_json
from groundup.web.markdown import render_markdown

MAX_TEXTS = 64
MAX_CHARACTERS = 200_000
"""Of all texts of one request: a second or two at worst, outside the event loop."""

_FOLDER = Path(__file__).parent / "page"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_FILES = {"/": "index.html", "/favicon.ico": "icon.svg"} | {
    f"/page/{path.name}": path.name for path in sorted(_FOLDER.iterdir()) if path.suffix in _MEDIA_TYPES
}
PAGE_PATHS = frozenset(_FILES)
"""The page holds nothing private, and it is where a key is entered: it may be read without one."""


def page_router() -> APIRouter:
    """The routes of `PAGE_PATHS`, and POST /page/render: {"texts": [...]} -> {"html": [...]}.

    Choice: a file has no path of its own on the disk as far as requests go; they choose from a table made at the start.
    """
    router = APIRouter(include_in_schema=False)
    for path, name in _FILES.items():
        router.add_api_route(path, _file_route(_FOLDER / name), methods=["GET", "HEAD"], name=f"page:{path}")
    router.add_api_route("/page/render", _render, methods=["POST"], name="page:render")
    return router


def _file_route(path: Path) -> Callable[[Request], Awaitable[Response]]:
    content = path.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    # Browsers ask each time whether the file is still the same, so that an update is never mixed with old files.
    headers = {"ETag": etag, "Cache-Control": "no-cache"}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=_MEDIA_TYPES[path.suffix], headers=headers)

    return answer


async def _render(request: Request) -> Response:
    texts = parse_json(await request.body()).get("texts")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ApiError(400, "texts: must be a list of texts", param="texts", code="invalid_value")
    if len(texts) > MAX_TEXTS or sum(map(len, texts)) > MAX_CHARACTERS:
        message = f"texts: at most {MAX_TEXTS} texts of {MAX_CHARACTERS} characters together in one request"
        raise ApiError(400, message, param="texts", code="invalid_value")
    html = await run_in_threadpool(lambda: [render_markdown(text) for text in texts])
    return JsonResponse({"html": html})
