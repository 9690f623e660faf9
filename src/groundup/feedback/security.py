"""Who is calling, whether they may, and whether the request is really theirs: runs before every route."""

import hmac
import secrets
from dataclasses import dataclass
from typing import cast

from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool

from groundup.feedback.access import ACCESS, Caller
from groundup.feedback.accounts import Account, Accounts, csrf_token
from groundup.feedback.database import Database
from groundup.feedback.dialogue import Dialogues
from groundup.feedback.errors import Forbidden, NotSignedIn
from groundup.feedback.projects import Projects
from groundup.feedback.settings import AnnotateConfig
from groundup.feedback.work import Work

SESSION_COOKIE = "groundup_session"
VISITOR_COOKIE = "groundup_visitor"
"""Of people who are not signed in: what their forms' token is made from."""
CSRF_HEADER, CSRF_FIELD = "x-csrf-token", "csrf_token"
SAFE_METHODS = {"GET", "HEAD"}
EXPIRED_FORM = "this form was made before you signed in or out, or by another site"


@dataclass(frozen=True)
class Services:
    """What routes talk to; at `request.app.state.services`."""

    config: AnnotateConfig
    database: Database
    accounts: Accounts
    projects: Projects
    work: Work
    dialogues: Dialogues


def services(request: Request) -> Services:
    """The application's."""
    return cast(Services, request.app.state.services)


def user_of(request: Request) -> Account:
    """Who is signed in, on routes that are not for anonymous callers.

    Raises: NotSignedIn.
    """
    user: Account | None = request.state.user
    if user is None:
        raise NotSignedIn("you are not signed in", "sign in")
    return user


async def admit(request: Request) -> None:
    """Sets `request.state.user` and `.csrf_token`, or refuses.

    Raises: NotSignedIn, Forbidden (the role may not, no row in the table of access, or no token of ours).
    """
    found = services(request)
    token = request.cookies.get(SESSION_COOKIE, "")
    user = await run_in_threadpool(found.accounts.who, token) if token else None
    secret = token if user is not None else request.cookies.get(VISITOR_COOKIE, "")
    request.state.user = user
    request.state.csrf_token = csrf_token(secret) if secret else ""
    route = request.scope["route"]
    method = "GET" if request.method == "HEAD" else request.method
    allowed = ACCESS.get((method, route.path), frozenset())
    caller: Caller = user.role if user is not None else "anonymous"
    if caller not in allowed:
        if user is None:
            raise NotSignedIn("you are not signed in", "sign in")
        raise Forbidden("your account may not do this", "ask an administrator")
    if request.method not in SAFE_METHODS:
        await _check_csrf(request)


async def _check_csrf(request: Request) -> None:
    given = request.headers.get(CSRF_HEADER)
    if given is None:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind in ("application/x-www-form-urlencoded", "multipart/form-data"):
            field = (await request.form()).get(CSRF_FIELD)
            given = field if isinstance(field, str) else None
    expected: str = request.state.csrf_token
    if not expected or given is None or not hmac.compare_digest(given.encode(), expected.encode()):
        raise Forbidden(EXPIRED_FORM, "load the page again, then send it again")


async def form_text(request: Request, name: str) -> str:
    """A text field of the form that was sent; "" where it has none."""
    value = (await request.form()).get(name, "")
    return value if isinstance(value, str) else ""


def visit(request: Request, response: Response) -> Response:
    """Give a visitor without a session the cookie that their forms need. Call `prepare_visit` before rendering."""
    secret: str | None = getattr(request.state, "visitor", None)
    if secret is not None:
        _set_cookie(request, response, VISITOR_COOKIE, secret, 3600)
    return response


def prepare_visit(request: Request) -> None:
    """See to it that a page for visitors has a token for its forms."""
    if not request.state.csrf_token:
        request.state.visitor = secrets.token_urlsafe(32)
        request.state.csrf_token = csrf_token(request.state.visitor)


def begin_session(request: Request, response: Response, token: str) -> None:
    """Set the cookie of a new session; the visitor's is over."""
    _set_cookie(request, response, SESSION_COOKIE, token, int(services(request).config.session_hours * 3600))
    response.delete_cookie(VISITOR_COOKIE, path="/")


def end_session(response: Response) -> None:
    """Take the session's cookie back."""
    response.delete_cookie(SESSION_COOKIE, path="/")


def _set_cookie(request: Request, response: Response, name: str, value: str, seconds: int) -> None:
    # Lax: a link in a mail or a chat leads to one's work, not to the sign-in page. What changes something needs the
    # token besides, and Guard refuses other sites.
    secure = services(request).config.secure_cookies or request.url.scheme == "https"
    response.set_cookie(name, value, max_age=seconds, path="/", secure=secure, httponly=True, samesite="lax")
