"""`groundup annotate export` and `groundup annotate import`: what is done at the machine, without the application."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from groundup.base.artifacts import MANIFEST
from groundup.base.errors import UserError
from groundup.data.prompts import PromptReport
from groundup.feedback.database import Database
from groundup.feedback.export import PROJECT_FILE, export_project
from groundup.feedback.importing import OPERATOR, import_export, read_items
from groundup.feedback.migrate import migrate
from groundup.feedback.projects import Projects
from groundup.feedback.settings import AnnotateConfig
from groundup.feedback.tables import Project


@contextmanager
def opened(database: str, *, is_new: bool = False) -> Iterator[Database]:
    """The database, at the newest schema. Raises: UserError where there is none, unless it may be made."""
    url = AnnotateConfig(database=database).database_url
    path = Path(url.removeprefix("sqlite:///"))
    if not is_new and url.startswith("sqlite:") and not path.exists():
        raise UserError(f"{path}: no such database", "name the folder that groundup annotate --data was started with")
    found = Database(url)
    try:
        migrate(found)
        yield found
    finally:
        found.close()


def export(database: str, project: str, out: Path, held_out_fraction: float) -> list[str]:
    """Write a project's export; the application may be running. `database`: as in `AnnotateConfig`.

    Returns what to say about it.
    """
    with opened(database) as found:
        artifact = export_project(found, project, out, held_out_fraction=held_out_fraction)
    return [*(f"{key}: {value}" for key, value in artifact.metrics.items()), str(artifact.path)]


def import_source(database: str, source: str, project: str | None, new_batch: bool) -> list[str]:
    """Into the database: an export (`project`: a name other than its own), or items for the project of that name.

    Returns what to say about it. Raises: UserError for a source that cannot be read, or a project that is not there.
    """
    is_export = all((Path(source) / name).exists() for name in (MANIFEST, PROJECT_FILE))
    with opened(database, is_new=is_export) as found:
        if is_export:
            made = import_export(found, Path(source), project)
            return [f"{made.project}: {made.items} items, {made.submissions} answers, {made.people} people"]
        projects, report = Projects(found), PromptReport()
        into = _named(projects, project)
        items = read_items(source, report)
        batches = projects.batches(into.id)
        batch = projects.open_batch(OPERATOR, into.id) if new_batch or not batches else batches[-1]
        added = projects.add_items(OPERATOR, batch.id, items)
        return [
            *report.lines(),
            f"{into.name}: {added.added} items added to batch {batch.number}, {added.already_there} were there already",
        ]


def _named(projects: Projects, name: str | None) -> Project:
    there = projects.projects()
    for project in there:
        if project.name == name:
            return project
    names = ", ".join(project.name for project in there) or "none"
    raise UserError(
        f"no project is called {name!r}" if name else "which project are these items for?",
        f"give --project; projects: {names}",
    )
