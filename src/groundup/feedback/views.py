"""From templates and values to answers: pages, redirects with a notice, safe Markdown, versioned static files."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from groundup.web.markdown import render_markdown

HERE = Path(__file__).parent
STATIC = HERE / "static"
NOTICE_COOKIE = "groundup_notice"
THEME_COOKIE = "groundup_theme"
THEMES = ("light", "dark")


@cache
def static_root() -> str:
    """Where the browser finds static/; it changes with the bytes of its files, so that they may be cached for good.

    Why a folder: the modules import each other by relative addresses, and one that came under two addresses ran twice.
    """
    digest = hashlib.sha256()
    for path in sorted(STATIC.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"/static/{digest.hexdigest()[:12]}"


def static_url(name: str) -> str:
    """The address of a file of static/."""
    return f"{static_root()}/{name}"


def markdown(text: str) -> Markup:
    """What a person or a model wrote, as safe HTML."""
    return Markup(render_markdown(text))  # noqa: S704 - cleaned by an allow-list in web/markdown.py


def sentences(*parts: str | None) -> str:
    """Messages of errors ("lower case, without full stop") as sentences for a page."""
    found = [part.strip() for part in parts if part and part.strip()]
    return " ".join(part[0].upper() + part[1:] + ("" if part.endswith((".", "?")) else ".") for part in found)


@cache
def environment() -> Environment:
    """The templates; every value is escaped unless it is `Markup`."""
    found = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals |= {"static": static_url, "forms": found.get_template("forms.html").module}
    found.filters |= {"markdown": markdown, "sentences": sentences}
    return found


def render_part(template: str, **values: Any) -> str:
    """A template without the frame's values: a piece of a page."""
    return environment().get_template(template).render(**values)


def render(request: Request, template: str, status_code: int = 200, **values: Any) -> HTMLResponse:
    """A page. At hand in every template: `user` (None: not signed in), `csrf_token`, `notice`, `theme`, `static(name)`,
    `forms` (macros of forms.html) and the filters `markdown` and `sentences`."""
    theme = request.cookies.get(THEME_COOKIE)
    page = environment().get_template(template)
    text = page.render(
        user=getattr(request.state, "user", None),
        csrf_token=getattr(request.state, "csrf_token", ""),
        notice=unquote(request.cookies.get(NOTICE_COOKIE, "")),
        theme=theme if theme in THEMES else None,
        **values,
    )
    answer = HTMLResponse(text, status_code)
    answer.headers["cache-control"] = "no-store"
    if NOTICE_COOKIE in request.cookies:
        answer.delete_cookie(NOTICE_COOKIE, path="/")
    return answer


def redirect(url: str, notice: str = "") -> Response:
    """On to another page with GET; `notice` is shown there once."""
    answer = RedirectResponse(url, 303)
    if notice:
        answer.set_cookie(NOTICE_COOKIE, quote(notice), max_age=60, path="/", httponly=True, samesite="strict")
    return answer
