"""Administration of people and of the models that answer. Addresses of models are set here and nowhere else."""

import asyncio
from typing import Any, get_args

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from groundup.feedback.contents import Turn
from groundup.feedback.dialogue import Generation
from groundup.feedback.endpoints import Answer, EndpointFailed, new_client, stream
from groundup.feedback.errors import Conflict, Invalid, NotFound
from groundup.feedback.projects import EndpointSettings
from groundup.feedback.security import form_text, services, user_of
from groundup.feedback.tables import Endpoint, Role
from groundup.feedback.views import redirect, render, sentences

router = APIRouter()
ROLES: tuple[Role, ...] = get_args(Role)
TEST_SECONDS = 60.0
TEST_PROMPT = "Say hello in one short sentence."
ENDPOINT_FIELDS = tuple(name for name in EndpointSettings.model_fields if name != "is_active")


@router.get("/admin/people")
def people_page(request: Request) -> Response:
    """Everybody, and the links that wait to be used."""
    return _people(request)


def _people(request: Request, status: int = 200, **values: Any) -> Response:
    accounts, user = services(request).accounts, user_of(request)
    shown = {"link": "", "link_note": "", "error": "", **values}
    people, invitations = accounts.accounts(user), accounts.open_invitations(user)
    return render(request, "admin/people.html", status, people=people, invitations=invitations, roles=ROLES, **shown)


@router.post("/admin/people/invitations")
async def invite(request: Request) -> Response:
    """A one-time link, shown once."""
    role = await form_text(request, "role")
    if role not in ROLES:
        raise Invalid("role: not one of " + ", ".join(ROLES))
    note = (await form_text(request, "note")).strip()
    token = await run_in_threadpool(services(request).accounts.invite, user_of(request), role, note)
    return await run_in_threadpool(_people, request, link=_link(request, token), link_note=note or role)


@router.post("/admin/people/invitations/{invitation_id}/revoke")
def revoke_invitation(request: Request, invitation_id: int) -> Response:
    """Make a link void."""
    services(request).accounts.revoke_invitation(user_of(request), invitation_id)
    return redirect("/admin/people", "The link is void.")


@router.post("/admin/people/{user_id}/password")
def reset_password(request: Request, user_id: int) -> Response:
    """A one-time link with which somebody sets a new password."""
    token = services(request).accounts.reset_password(user_of(request), user_id)
    return _people(request, link=_link(request, token), link_note="a new password")


@router.post("/admin/people/{user_id}/role")
async def set_role(request: Request, user_id: int) -> Response:
    """Change what somebody may do."""
    role = await form_text(request, "role")
    if role not in ROLES:
        raise Invalid("role: not one of " + ", ".join(ROLES))
    account = await run_in_threadpool(services(request).accounts.set_role, user_of(request), user_id, role)
    return redirect("/admin/people", f"{account.name} is {account.role} now.")


@router.post("/admin/people/{user_id}/active")
async def set_active(request: Request, user_id: int) -> Response:
    """Let somebody in or out."""
    is_active = await form_text(request, "is_active") == "yes"
    account = await run_in_threadpool(services(request).accounts.set_active, user_of(request), user_id, is_active)
    return redirect("/admin/people", f"{account.name} {'may sign in again' if is_active else 'is locked out'}.")


def _link(request: Request, token: str) -> str:
    """The host is one of ours: Guard has checked it."""
    return f"{request.base_url}invitations/{token}"


@router.get("/admin/endpoints")
def endpoints_page(request: Request) -> Response:
    """The models that can answer."""
    return _endpoints(request)


def _endpoints(request: Request, status: int = 200, **values: Any) -> Response:
    found = services(request).projects.endpoints(user_of(request))
    shown = {"error": "", "form": {}, "tested": None, **values}
    defaults = {name: field.default for name, field in EndpointSettings.model_fields.items()}
    shown["form"] = {**defaults, "name": "", "base_url": "", "model": "", **shown["form"]}
    return render(request, "admin/endpoints.html", status, endpoints=found, **shown)


@router.post("/admin/endpoints")
async def create_endpoint(request: Request) -> Response:
    """Add a model."""
    values = {name: await form_text(request, name) for name in ENDPOINT_FIELDS}
    try:
        endpoint = await run_in_threadpool(_create_endpoint, request, values)
    except (Invalid, Conflict) as error:
        values["api_key"] = ""
        message = sentences(error.message, error.remedy)
        return await run_in_threadpool(_endpoints, request, error.status, error=message, form=values)
    return redirect("/admin/endpoints", f"{endpoint.name} is added.")


def _create_endpoint(request: Request, values: dict[str, Any]) -> Endpoint:
    return services(request).projects.create_endpoint(user_of(request), **values)


@router.get("/admin/endpoints/{endpoint_id}")
def endpoint_page(request: Request, endpoint_id: int) -> Response:
    """Change a model's address or settings."""
    return _endpoint_form(request, endpoint_id)


def _endpoint_form(request: Request, endpoint_id: int, status: int = 200, error: str = "", **form: Any) -> Response:
    endpoint = _endpoint(request, endpoint_id)
    now = {name: getattr(endpoint, name) for name in EndpointSettings.model_fields}
    has_key = bool(now.pop("api_key"))
    values = {"endpoint": endpoint, "form": {**now, **form}, "has_key": has_key, "error": error}
    return render(request, "admin/endpoint.html", status, **values)


@router.post("/admin/endpoints/{endpoint_id}")
async def change_endpoint(request: Request, endpoint_id: int) -> Response:
    """An empty key leaves the old one, unless the address changes."""
    values: dict[str, Any] = {name: await form_text(request, name) for name in ENDPOINT_FIELDS}
    values["is_active"] = await form_text(request, "is_active") == "yes"
    if not values["api_key"]:
        del values["api_key"]
    try:
        await run_in_threadpool(_change_endpoint, request, endpoint_id, values)
    except (Invalid, Conflict) as error:
        values.pop("api_key", None)
        message = sentences(error.message, error.remedy)
        return await run_in_threadpool(_endpoint_form, request, endpoint_id, error.status, message, **values)
    return redirect("/admin/endpoints", f"{values['name']} is changed.")


def _change_endpoint(request: Request, endpoint_id: int, values: dict[str, Any]) -> None:
    services(request).projects.change_endpoint(user_of(request), endpoint_id, **values)


@router.post("/admin/endpoints/{endpoint_id}/test")
async def test_endpoint(request: Request, endpoint_id: int) -> Response:
    """Ask a model one question, at the address that is on record."""
    endpoint = await run_in_threadpool(_endpoint, request, endpoint_id)
    generation = Generation(
        0, endpoint.id, endpoint.base_url, endpoint.model, endpoint.revision, endpoint.api_key,
        endpoint.min_temperature, min(64, endpoint.max_new_tokens), 0, (Turn(role="user", content=TEST_PROMPT),),
    )  # fmt: skip
    answer, failure = Answer(), ""
    try:
        async with asyncio.timeout(TEST_SECONDS), new_client() as client:
            async for chunk in stream(client, generation):
                answer.take(chunk)
    except EndpointFailed as error:
        failure = str(error)
    except TimeoutError:
        failure = "The model took too long."
    tested = {"endpoint": endpoint, "prompt": TEST_PROMPT, "text": answer.text.strip(), "failure": failure}
    return await run_in_threadpool(_endpoints, request, tested=tested)


def _endpoint(request: Request, endpoint_id: int) -> Endpoint:
    found = services(request).projects.endpoints(user_of(request))
    for endpoint in found:
        if endpoint.id == endpoint_id:
            return endpoint
    raise NotFound("there is no such model")
