"""Administration: projects with their batches, items, numbers and exports. Reviewers may read the numbers."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, get_args

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from groundup.base.errors import UserError
from groundup.data.prompts import PromptReport
from groundup.feedback import routes_admin_people
from groundup.feedback.clock import utc_now
from groundup.feedback.contents import Gold, ItemContent, parse
from groundup.feedback.errors import Conflict, Invalid
from groundup.feedback.export import DEFAULT_HELD_OUT, export_project
from groundup.feedback.importing import read_items
from groundup.feedback.listing import list_items, show_item
from groundup.feedback.projects import NewItem, ProjectSettings
from groundup.feedback.security import form_text, services, user_of
from groundup.feedback.statistics import item_counts, model_name, project_statistics
from groundup.feedback.tables import Project, ProjectKind
from groundup.feedback.views import redirect, render, sentences

router = APIRouter()
router.include_router(routes_admin_people.router)

KINDS: tuple[ProjectKind, ...] = get_args(ProjectKind)
FIELDS: dict[ProjectKind, tuple[str, ...]] = {
    "preference": (
        "criterion", "overlap", "max_turns", "gold_share", "endpoint_ids", "system_prompt", "entrance_id",
    ),
    "sft": ("criterion", "overlap", "is_reviewed", "entrance_id"),
    "comparison": ("overlap", "gold_share", "endpoint_ids", "system_prompt", "entrance_id"),
    "redteam": ("overlap", "max_turns", "endpoint_ids", "system_prompt", "entrance_id"),
    "entrance": ("pass_mark",),
}  # fmt: skip
"""Of a project's settings, those that mean something for its kind; name, guidelines and lease are everybody's."""
STARTING_VALUES: dict[ProjectKind, dict[str, Any]] = {"comparison": {"overlap": 3}}
"""Three raters an item. Source: section 3.4.2."""
UPLOADS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
MAX_EMPTY_ITEMS = 10_000
_NOT_FOR_FILE_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


@router.get("/admin")
def overview(request: Request) -> Response:
    """All projects, and the runs that wait for ratings."""
    found = services(request)
    handovers = getattr(request.app.state, "handovers", None)
    return render(
        request, "admin/overview.html", projects=found.projects.projects(), counts=item_counts(found.database),
        kinds=KINDS, handovers=handovers.open if handovers else [],
    )  # fmt: skip


@router.get("/admin/projects/new")
def new_project_page(request: Request, kind: ProjectKind) -> Response:
    """The form for a kind of work."""
    return _project_form(request, kind, None)


@router.post("/admin/projects")
async def create_project(request: Request) -> Response:
    """Make a project with its first batch."""
    form = await request.form()
    kind = next((kind for kind in KINDS if kind == form.get("kind")), None)
    if kind is None:
        raise Invalid("kind: not a type of work")
    try:
        values = _project_values(form, kind)
        project = await run_in_threadpool(_create_project, request, kind, values)
    except (Invalid, Conflict) as error:
        return await run_in_threadpool(_project_form, request, kind, None, error, _typed(form))
    return redirect(f"/admin/projects/{project.id}/items", "The project is made; now it needs something to work at.")


def _create_project(request: Request, kind: ProjectKind, values: dict[str, Any]) -> Project:
    projects, user = services(request).projects, user_of(request)
    project = projects.create_project(user, kind=kind, **values)
    projects.open_batch(user, project.id)
    return project


@router.get("/admin/projects/{project_id}/settings")
def settings_page(request: Request, project_id: int) -> Response:
    """Change a project."""
    project = services(request).projects.project(project_id)
    return _project_form(request, project.kind, project)


@router.post("/admin/projects/{project_id}/settings")
async def change_project(request: Request, project_id: int) -> Response:
    """Set what the form says, unless somebody else was faster."""
    form = await request.form()
    project = await run_in_threadpool(services(request).projects.project, project_id)
    try:
        values = _project_values(form, project.kind)
        values["is_open"] = "is_open" in form
        version = _whole_number(form, "version")
        await run_in_threadpool(_change_project, request, project_id, version, values)
    except (Invalid, Conflict) as error:
        return await run_in_threadpool(_project_form, request, project.kind, project, error, _typed(form))
    return redirect(f"/admin/projects/{project_id}", "The settings are changed.")


def _change_project(request: Request, project_id: int, version: int, values: dict[str, Any]) -> None:
    services(request).projects.change_project(user_of(request), project_id, version, **values)


def _project_values(form: FormData, kind: ProjectKind) -> dict[str, Any]:
    """What the form says, for `ProjectSettings`. Raises: Invalid."""
    values: dict[str, Any] = {name: form.get(name) or None for name in ("name", "guidelines")}
    values["lease_seconds"] = 60 * _whole_number(form, "lease_minutes")
    for name in FIELDS[kind]:
        if name == "endpoint_ids":
            values[name] = form.getlist(name)
        elif name == "is_reviewed":
            values[name] = name in form
        elif name in ("system_prompt", "entrance_id"):
            values[name] = form.get(name) or None
        else:
            values[name] = form.get(name, "")
    return values


def _typed(form: FormData) -> dict[str, Any]:
    """The form as it was sent, to be shown again."""
    shown: dict[str, Any] = {key: value for key, value in form.items() if isinstance(value, str)}
    endpoint_ids = [int(str(value)) for value in form.getlist("endpoint_ids") if str(value).isdecimal()]
    is_set = {name: name in form for name in ("is_reviewed", "is_open")}
    return {**shown, **is_set, "endpoint_ids": endpoint_ids}


def _project_form(
    request: Request,
    kind: ProjectKind,
    project: Project | None,
    error: Invalid | Conflict | None = None,
    typed: Mapping[str, Any] | None = None,
) -> Response:
    projects, user = services(request).projects, user_of(request)
    form = {name: field.default for name, field in ProjectSettings.model_fields.items()}
    form |= {"name": "", "endpoint_ids": [], **STARTING_VALUES.get(kind, {})}
    if project is not None:
        form |= {name: getattr(project, name) for name in ProjectSettings.model_fields if name != "endpoint_ids"}
        form["endpoint_ids"] = [endpoint.id for endpoint in projects.endpoints_of(project.id)]
        form["version"] = project.version
    form["lease_minutes"] = form["lease_seconds"] // 60
    message = sentences(error.message, error.remedy) if error else ""
    return render(
        request, "admin/project_form.html", error.status if error else 200, kind=kind, project=project,
        form={**form, **(typed or {})}, fields=FIELDS[kind], endpoints=projects.endpoints(user),
        entrances=[p for p in projects.projects() if p.kind == "entrance"], error=message,
    )  # fmt: skip


@router.get("/admin/projects/{project_id}")
def project_page(request: Request, project_id: int) -> Response:
    """A project in numbers. Names of people and of models are for administrators."""
    found, user = services(request), user_of(request)
    project = found.projects.project(project_id)
    numbers = project_statistics(found.database, project, utc_now().date())
    names = {one.pseudonym: one.name for one in found.accounts.accounts(user)} if user.role == "admin" else {}
    return render(
        request, "admin/project.html", project=project, numbers=numbers, names=names,
        held_out=DEFAULT_HELD_OUT,
    )  # fmt: skip


@router.post("/admin/projects/{project_id}/batches")
async def open_batch(request: Request, project_id: int) -> Response:
    """The next batch."""
    label = (await form_text(request, "label")).strip() or None
    batch = await run_in_threadpool(services(request).projects.open_batch, user_of(request), project_id, label)
    return redirect(f"/admin/projects/{project_id}/items", f"Batch {batch.number} is open.")


@router.post("/admin/batches/{batch_id}/open")
async def set_batch_open(request: Request, batch_id: int) -> Response:
    """Open or close a batch."""
    is_open = await form_text(request, "is_open") == "yes"
    projects = services(request).projects
    batch = await run_in_threadpool(projects.set_batch_open, user_of(request), batch_id, is_open)
    return redirect(
        f"/admin/projects/{batch.project_id}", f"Batch {batch.number} is {'open' if is_open else 'closed'}."
    )


@router.get("/admin/projects/{project_id}/items")
def items_page(request: Request, project_id: int, page: int = 1) -> Response:
    """What is asked, and forms to add to it."""
    return _items(request, project_id, max(1, page))


def _items(request: Request, project_id: int, page: int = 1, error: UserError | None = None) -> Response:
    found = services(request)
    project = found.projects.project(project_id)
    lines, pages = list_items(found.database, project_id, page)
    message = sentences(error.message, error.remedy) if error else ""
    return render(
        request, "admin/items.html", 422 if error else 200, project=project, items=lines, page=page, pages=pages,
        batches=found.projects.batches(project_id), error=message, uploads=UPLOADS,
    )  # fmt: skip


@router.post("/admin/projects/{project_id}/items")
async def add_items(request: Request, project_id: int) -> Response:
    """From a file, from a question typed in, or as many empty ones as are wanted: `how` says which."""
    form = await request.form()
    try:
        batch_id = _whole_number(form, "batch_id")
        how = form.get("how")
        if how == "file":
            items, said = await _uploaded(form)
        elif how == "question":
            items, said = [_question(form)], ""
        else:
            items, said = [NewItem()] * _count(form), ""
        added = await run_in_threadpool(services(request).projects.add_items, user_of(request), batch_id, items)
    except UserError as error:
        return await run_in_threadpool(_items, request, project_id, 1, error)
    there = f", {added.already_there} were there already" if added.already_there else ""
    return redirect(f"/admin/projects/{project_id}/items", f"{added.added} items are added{there}. {said}".strip())


async def _uploaded(form: FormData) -> tuple[list[NewItem], str]:
    file = form.get("file")
    if not isinstance(file, UploadFile) or not file.filename:
        raise Invalid("choose a file")
    suffix = Path(file.filename).suffix.lower()
    if suffix not in UPLOADS:
        raise Invalid(f"files of this kind cannot be read; known: {', '.join(UPLOADS)}")
    return await run_in_threadpool(_read_upload, file, suffix)


def _read_upload(file: UploadFile, suffix: str) -> tuple[list[NewItem], str]:
    report = PromptReport()
    with tempfile.TemporaryDirectory(prefix="groundup-") as folder:
        path = Path(folder, f"file{suffix}")  # the browser's name for it is never part of a path
        with path.open("wb") as target:
            shutil.copyfileobj(file.file, target)
        items = read_items(path, report)
    dropped = ", ".join(f"{count} {reason}" for reason, count in report.dropped.most_common())
    return items, f"Left out: {dropped}." if dropped else ""


def _question(form: FormData) -> NewItem:
    choices = [line.strip() for line in str(form.get("choices", "")).splitlines() if line.strip()]
    content = parse(ItemContent, {"question": form.get("question", ""), "choices": choices})
    return NewItem(content, gold=parse(Gold, {"answers": [_whole_number(form, "right") - 1]}))


def _count(form: FormData) -> int:
    count = _whole_number(form, "count")
    if not 1 <= count <= MAX_EMPTY_ITEMS:
        raise Invalid(f"count: a number from 1 to {MAX_EMPTY_ITEMS}")
    return count


def _whole_number(form: FormData, name: str) -> int:
    text = str(form.get(name, "")).strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise Invalid(f"{name.replace('_', ' ')}: not a whole number")
    return int(text)


@router.get("/admin/items/{item_id}")
def item_page(request: Request, item_id: int) -> Response:
    """One item and everything that was said of it."""
    found = services(request)
    shown = show_item(found.database, item_id)
    project = found.projects.project(shown.project_id)
    return render(request, "admin/item.html", project=project, shown=shown, model_name=model_name)


@router.get("/admin/projects/{project_id}/export")
def download_export(request: Request, project_id: int, held_out: float = DEFAULT_HELD_OUT) -> Response:
    """The export as one zip file."""
    if not 0 <= held_out < 1:
        raise Invalid("held_out: a share from 0 up to 1")
    found = services(request)
    name = found.projects.project(project_id).name
    short = _NOT_FOR_FILE_NAMES.sub("-", name).strip("-.") or f"project-{project_id}"
    with tempfile.TemporaryDirectory(prefix="groundup-export-") as folder:
        export_project(found.database, name, Path(folder, short), held_out_fraction=held_out)
        zipped = shutil.make_archive(str(Path(folder, "export")), "zip", folder, short)
        archive = Path(zipped).open("rb")  # noqa: SIM115 - closed by _chunks
    # The folder is gone, the open file is not: nothing is left behind, however the download ends.
    headers = {
        "content-disposition": f'attachment; filename="{short}.zip"',
        "content-length": str(os.fstat(archive.fileno()).st_size),
    }
    return StreamingResponse(_chunks(archive), media_type="application/zip", headers=headers)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while chunk := file.read(1 << 20):
            yield chunk
