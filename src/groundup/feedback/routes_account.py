"""Getting in and out: signing in, invitations (the first administrator's link is one), passwords."""

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from groundup.feedback.accounts import MAX_PASSWORD_CHARACTERS, MIN_PASSWORD_CHARACTERS
from groundup.feedback.errors import Conflict, Forbidden, Invalid, NotSignedIn, TooManyAttempts
from groundup.feedback.security import (
    SESSION_COOKIE,
    begin_session,
    end_session,
    form_text,
    prepare_visit,
    services,
    user_of,
    visit,
)
from groundup.feedback.views import redirect, render, sentences

router = APIRouter()
PASSWORD_LENGTHS = {"shortest": MIN_PASSWORD_CHARACTERS, "longest": MAX_PASSWORD_CHARACTERS}


@router.get("/health")
def health(request: Request) -> dict[str, bool]:
    """Answers once the application runs and its database is there."""
    services(request).accounts.who("")
    return {"ok": True}


@router.get("/login")
def login_page(request: Request, next: str = "/") -> Response:
    """The form; who is signed in already goes on."""
    if request.state.user is not None:
        return redirect(_local(next))
    return _login_form(request, next)


@router.post("/login")
async def login(request: Request) -> Response:
    """Sign in."""
    name, password = await form_text(request, "name"), await form_text(request, "password")
    next_url = _local(await form_text(request, "next"))
    address = request.client.host if request.client else ""
    try:
        token = await run_in_threadpool(services(request).accounts.sign_in, name, password, address)
    except (NotSignedIn, TooManyAttempts) as error:
        return _login_form(request, next_url, name, error.status, sentences(error.message, error.remedy))
    response = redirect(next_url)
    begin_session(request, response, token)
    return response


def _login_form(request: Request, next_url: str, name: str = "", status: int = 200, error: str = "") -> Response:
    prepare_visit(request)
    return visit(request, render(request, "login.html", status, next=_local(next_url), name=name, error=error))


def _local(url: str) -> str:
    """A path of ours; "/" for anything that could lead elsewhere."""
    is_path = url.startswith("/") and not url.startswith(("//", "/\\")) and url.isprintable() and url.isascii()
    return url if is_path else "/"


@router.post("/logout")
def logout(request: Request) -> Response:
    """Sign out; drafts stay."""
    services(request).accounts.sign_out(request.cookies[SESSION_COOKIE])
    response = redirect("/login", "You are signed out. Your drafts are kept.")
    end_session(response)
    return response


@router.get("/invitations/{token}")
def invitation_page(request: Request, token: str) -> Response:
    """Make an account, or set a new password."""
    return _invitation_form(request, token)


@router.post("/invitations/{token}")
async def accept_invitation(request: Request, token: str) -> Response:
    """Use the link, and sign in."""
    name, password = await form_text(request, "name"), await form_text(request, "password")
    if password != await form_text(request, "again"):
        return await run_in_threadpool(_invitation_form, request, token, name, 422, "The two passwords differ.")
    address = request.client.host if request.client else ""
    accounts = services(request).accounts
    try:
        account = await run_in_threadpool(accounts.accept, token, name, password)
        session = await run_in_threadpool(accounts.sign_in, account.name, password, address)
    except (Invalid, Conflict) as error:
        message = sentences(error.message, error.remedy)
        return await run_in_threadpool(_invitation_form, request, token, name, error.status, message)
    response = redirect("/", f"Welcome, {account.name}.")
    begin_session(request, response, session)
    return response


def _invitation_form(request: Request, token: str, name: str = "", status: int = 200, error: str = "") -> Response:
    invitation = services(request).accounts.invitation(token)
    prepare_visit(request)
    values = {"invitation": invitation, "name": name, "error": error, **PASSWORD_LENGTHS}
    return visit(request, render(request, "invitation.html", status, **values))


@router.get("/account")
def account_page(request: Request) -> Response:
    """One's own account."""
    return render(request, "account.html", error="", **PASSWORD_LENGTHS)


@router.post("/account/password")
async def change_password(request: Request) -> Response:
    """Set a new password; all other browsers are signed out."""
    accounts, user = services(request).accounts, user_of(request)
    old, new = await form_text(request, "old"), await form_text(request, "password")
    try:
        if new != await form_text(request, "again"):
            raise Invalid("the two passwords differ")
        await run_in_threadpool(accounts.change_password, user, old, new)
    except (Forbidden, Invalid) as error:
        message = sentences(error.message, error.remedy)
        return render(request, "account.html", error.status, error=message, **PASSWORD_LENGTHS)
    address = request.client.host if request.client else ""
    token = await run_in_threadpool(accounts.sign_in, user.name, new, address)
    response = redirect("/account", "Your password is changed; other browsers are signed out.")
    begin_session(request, response, token)
    return response
