"""The annotation application put together: services, routes, errors, and the guard in front of them."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from groundup.base.errors import UserError
from groundup.base.progress import say
from groundup.feedback import routes_account, routes_admin, routes_dialogue, routes_tasks
from groundup.feedback.accounts import Accounts
from groundup.feedback.clock import Clock, utc_now
from groundup.feedback.database import Database
from groundup.feedback.dialogue import Dialogues
from groundup.feedback.endpoints import Exchanges, new_client
from groundup.feedback.errors import NotSignedIn, Refused, TooManyAttempts
from groundup.feedback.handover import Handovers
from groundup.feedback.migrate import migrate
from groundup.feedback.projects import Projects
from groundup.feedback.security import Services, admit
from groundup.feedback.settings import AnnotateConfig
from groundup.feedback.views import STATIC, render, sentences, static_root
from groundup.feedback.work import Work
from groundup.web.guard import Guard, local_hosts
from groundup.web.run import serve_app

MAX_BODY_BYTES = 32 * 1024 * 1024
"""Of a request; files of prompts are the largest."""
CONTENT_TYPES = ("application/json", "application/x-www-form-urlencoded", "multipart/form-data")
YEAR_SECONDS = 365 * 24 * 3600


def create_app(settings: AnnotateConfig, clock: Clock = utc_now, handover: Sequence[Path] = ()) -> FastAPI:
    """The application on its database, which is brought to the newest schema first.

    `handover`: folders in which runs leave comparisons to be rated; `app.state.handovers.start(url)` begins to look.

    Raises: UserError for a database that cannot be opened.
    """
    database = Database(settings.database_url)
    migrate(database)
    accounts = Accounts(
        database, clock, session_hours=settings.session_hours, invitation_hours=settings.invitation_hours
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with new_client() as client:
            app.state.exchanges = Exchanges(client)
            yield
            await app.state.exchanges.close()
        app.state.handovers.close()
        database.close()

    app = FastAPI(dependencies=[Depends(admit)], lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    projects = Projects(database, clock)
    app.state.services = Services(
        settings, database, accounts, projects, Work(database, clock), Dialogues(database, clock)
    )
    app.state.handovers = Handovers(database, projects, handover, settings.handover_overlap)
    for routes in (routes_account, routes_tasks, routes_dialogue, routes_admin):
        app.include_router(routes.router)
    app.mount(static_root(), Static(directory=STATIC))
    app.add_exception_handler(UserError, _on_user_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_middleware(ErrorPage)
    app.add_middleware(
        Guard,
        hosts=[*local_hosts(settings.host), *settings.hosts],
        max_body_bytes=MAX_BODY_BYTES,
        content_types=CONTENT_TYPES,
    )
    return app


def run_app(settings: AnnotateConfig, handover: Sequence[Path] = ()) -> None:
    """Serve until a signal; at the first start of a database, tell the link that makes its administrator."""
    app = create_app(settings, handover=handover)

    def on_started(url: str) -> None:
        url = _reachable(url)
        print(f"Annotation at {url}", flush=True)
        token = app.state.services.accounts.first_admin_token()
        if token is not None:
            print(f"Make the first administrator's account (works once): {url}/invitations/{token}", flush=True)
        app.state.handovers.start(url)

    say(f"database: {app.state.services.database.name}")
    serve_app(app, settings.host, settings.port, is_protected=True, on_started=on_started)


def _reachable(url: str) -> str:
    """An address for a browser on this machine; 0.0.0.0 and :: are addresses to listen at only."""
    parts = urlsplit(url)
    if not ip_address(parts.hostname or "127.0.0.1").is_unspecified:
        return url
    return urlunsplit(parts._replace(netloc=f"127.0.0.1:{parts.port}"))


class ErrorPage:
    """A mistake of ours as a page, where a browser was on its way to one; Guard logs it, and answers scripts."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_started = False

        async def noted(event: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(event)

        try:
            await self.app(scope, receive, noted)
        except Exception:
            if scope["type"] == "http" and not is_started and wants_page(request := Request(scope)):
                words = "Something went wrong on the server. Your drafts are kept; try again in a moment."
                await render(request, "error.html", 500, status=500, message=words)(scope, receive, send)
            raise


class Static(StaticFiles):
    """Our own files, whose addresses change with their bytes."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        answer = await super().get_response(path, scope)
        if answer.status_code == 200:
            answer.headers["cache-control"] = f"public, max-age={YEAR_SECONDS}, immutable"
        return answer


def _on_user_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    status = error.status if isinstance(error, Refused) else 422
    if isinstance(error, NotSignedIn) and request.method == "GET" and wants_page(request):
        path = request.url.path
        return Response(
            status_code=303, headers={"location": "/login" + (f"?next={quote(path)}" if path != "/" else "")}
        )
    answer = _refusal(request, status, type(error).__name__.lower(), sentences(error.message, error.remedy))
    if isinstance(error, TooManyAttempts):
        answer.headers["retry-after"] = str(error.retry_after_seconds)
    return answer


def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # The input itself stays out: it may be long, or a password.
    wrong = "; ".join(f"{'.'.join(str(part) for part in item['loc'][1:])}: {item['msg']}" for item in error.errors())
    return _refusal(request, 422, "invalid", f"The request is not as it should be: {wrong}.")


def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "There is no such page.", 405: "This address takes no such request."}
    return _refusal(request, error.status_code, "error", words.get(error.status_code, str(error.detail)))


def wants_page(request: Request) -> bool:
    """Whether a browser is going somewhere, rather than a script of ours asking."""
    return "text/html" in request.headers.get("accept", "")


def _refusal(request: Request, status: int, kind: str, message: str) -> Response:
    if wants_page(request):
        return render(request, "error.html", status, status=status, message=message)
    return JSONResponse({"kind": kind, "message": message}, status)
