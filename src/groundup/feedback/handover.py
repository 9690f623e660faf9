"""Comparisons that a run waits for: taken from its `tasks.jsonl`, rated by people, and handed back in `ratings.jsonl`.

The two files are described in align/human.py. The database is what counts: a rating is acknowledged once it is there,
and what the file lacks, after a kill or a full disk, is appended as soon as the application looks again.
"""

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_low
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from groundup.align.durable import DurableLines
from groundup.align.human import APPLICATION, RATINGS_FILE, TASKS
from groundup.align.judges import RATINGS
from groundup.base.errors import UserError
from groundup.base.files import read_json, sha256_json, write_json
from groundup.base.records import Criterion, read_jsonl
from groundup.feedback.contents import ItemContent, JudgedPair, parse
from groundup.feedback.database import Database
from groundup.feedback.importing import OPERATOR
from groundup.feedback.projects import NewItem, Projects
from groundup.feedback.quality import GRADES
from groundup.feedback.tables import Item, Project, Submission, User

PATTERNS = ("", "*/", ".work/*/annotation/")
"""Where below a folder given to --handover tasks may lie: there, in an annotation_folder, in a run at work."""
LOOK_SECONDS = 1.0
_logger = logging.getLogger(__name__)


@dataclass
class Handover:
    """One folder of tasks; `projects`: criterion -> the project that its tasks went to."""

    folder: Path
    projects: dict[str, str] = field(default_factory=dict)
    tasks: int = 0
    rated: int = 0
    trouble: str = ""
    """Why it could not be read or written the last time; tried again each time."""
    _seen: object = None
    _stamp: object = None


class Handovers:
    """All the folders below those that were named; new ones are taken as they come, finished ones are let go."""

    def __init__(self, database: Database, projects: Projects, roots: Sequence[Path], overlap: int = 1) -> None:
        """`overlap`: how many people rate each comparison."""
        self._database, self._projects, self._overlap = database, projects, overlap
        self._roots = [root.expanduser().resolve() for root in roots]
        self._open: dict[Path, Handover] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def open(self) -> list[Handover]:
        """Those that a run waits for."""
        return list(self._open.values())

    def start(self, url: str) -> None:
        """Look every second, in a thread of its own; `url` is where people find the application."""
        self._thread = threading.Thread(target=self._watch, args=(url,), name="handovers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, url: str) -> None:
        while not self._stop.is_set():
            self.look(url)
            self._stop.wait(LOOK_SECONDS)

    def look(self, url: str) -> None:
        """Take what is new, and hand back what has been rated since."""
        folders = {
            path.parent for root in self._roots for pattern in PATTERNS for path in root.glob(f"{pattern}{TASKS}")
        }
        for folder in self._open.keys() - folders:
            del self._open[folder]  # the run took the ratings and removed its work
        for folder in sorted(folders):
            handover = self._open.setdefault(folder, Handover(folder))
            try:
                self._take(handover, url)
                self._hand_back(handover)
                handover.trouble = ""
            except (UserError, OSError, SQLAlchemyError) as error:
                if handover.trouble != str(error):
                    _logger.error("%s: %s", folder, error)
                handover.trouble = str(error)

    def _take(self, handover: Handover, url: str) -> None:
        """Make a project for each criterion, unless these very tasks have been taken before."""
        stat = (handover.folder / TASKS).stat()
        seen = (stat.st_mtime_ns, stat.st_size, url)
        if handover._seen == seen:
            return
        tasks = list(read_jsonl(handover.folder / TASKS))
        if not all({"id", "criterion", "prompt", "responses"} <= task.keys() for task in tasks):
            raise UserError(f"{handover.folder / TASKS}: not a run's tasks", "align/human.py describes them")
        label, by_criterion = _label(handover.folder), _by_criterion(tasks)
        names: dict[str, str] = {
            criterion: f"{label} {criterion} {_digest(own)}" for criterion, own in by_criterion.items()
        }
        for criterion, own in by_criterion.items():
            self._take_project(names[criterion], criterion, own)
        file = handover.folder / APPLICATION
        said = {"url": url, "projects": names}
        if not file.exists() or read_json(file) != said:
            self._close_others(read_json(file)["projects"] if file.exists() else {}, names)
            write_json(file, said)
        handover.projects, handover.tasks, handover._seen = names, len(tasks), seen

    def _take_project(self, name: str, criterion: Criterion, tasks: Sequence[Mapping[str, Any]]) -> None:
        project = next((project for project in self._projects.projects() if project.name == name), None)
        if project is None:
            project = self._projects.create_project(
                OPERATOR, name=name, kind="preference", criterion=criterion, overlap=self._overlap
            )
        batches = self._projects.batches(project.id)
        if not batches:
            batches = [self._projects.open_batch(OPERATOR, project.id, f"round {tasks[0].get('batch', 1)}")]
        self._projects.add_items(OPERATOR, batches[0].id, [_item(task) for task in tasks])

    def _close_others(self, before: Mapping[str, str], now: Mapping[str, str]) -> None:
        """A run that makes its tasks anew wants nobody to rate the old ones."""
        stale = set(before.values()) - set(now.values())
        for project in self._projects.projects():
            if project.name in stale:
                self._projects.change_project(OPERATOR, project.id, project.version, is_open=False)

    def _hand_back(self, handover: Handover) -> None:
        names = list(handover.projects.values())
        stamp = self._stamp(names)
        if handover._stamp == stamp:
            return
        verdicts, undone = self._verdicts(names)
        if verdicts or undone:  # else there is no file yet, which tells the run that it may make its tasks anew
            self._append(handover.folder / RATINGS_FILE, verdicts, undone)
        handover.rated, handover._stamp = len(verdicts), stamp

    def _append(self, path: Path, verdicts: Mapping[str, dict[str, Any]], undone: Iterable[str]) -> None:
        with DurableLines(path) as lines:
            last = {row.get("id"): row for row in lines.rows}
            for task, verdict in verdicts.items():
                if last.get(task) != verdict:
                    lines.append(verdict)
            for task in sorted(undone):
                if task in last and not last[task].get("withdrawn"):
                    lines.append({"id": task, "withdrawn": True})

    def _stamp(self, names: Sequence[str]) -> object:
        """Equal as long as nobody has submitted or taken back anything."""
        with self._database.read() as session:
            last = select(func.max(Submission.id), func.count(Submission.superseded_at))
            return tuple(
                session.execute(
                    last.join(Project, Project.id == Submission.project_id).where(Project.name.in_(names))
                ).one()
            )

    def _verdicts(self, names: Sequence[str]) -> tuple[dict[str, dict[str, Any]], set[str]]:
        """Task -> verdict, where enough people have rated it; and the tasks where somebody took a rating back since."""
        with self._database.read() as session:
            projects = select(Project.id).where(Project.name.in_(names))
            needed = {
                row.external_id: row.overlap
                for row in session.execute(
                    select(Item.external_id, func.coalesce(Item.overlap, Project.overlap).label("overlap"))
                    .join(Project, Project.id == Item.project_id)
                    .where(Item.project_id.in_(projects), Item.is_gold.is_(False))
                )
            }
            rows = session.execute(
                select(Item.external_id, User.pseudonym, Submission.answer, Submission.superseded_at)
                .join(Item, Item.id == Submission.item_id)
                .join(User, User.id == Submission.user_id)
                .where(Submission.project_id.in_(projects))
                .order_by(Submission.id)
            ).all()
        standing: dict[str, list[tuple[str, JudgedPair]]] = {}
        for task, pseudonym, answer, superseded_at in rows:
            if superseded_at is None and task in needed:
                (turn,) = answer["turns"]
                standing.setdefault(task, []).append((pseudonym, parse(JudgedPair, turn)))
        verdicts = {
            task: merged(task, said[: needed[task]]) for task, said in standing.items() if len(said) >= needed[task]
        }
        return verdicts, {row[0] for row in rows if row[3] is not None} - verdicts.keys()


def merged(task: str, said: Sequence[tuple[str, JudgedPair]]) -> dict[str, Any]:
    """What several people say of a pair, as one line of `ratings.jsonl`.

    Choice: the response that most of them chose wins (no majority: undecided) by the median of their strengths, the
    weaker of two; a response is safe if more than half call it so. `annotator` names those who chose the winner.
    """
    votes = Counter(pair.winner for _, pair in said)
    winner, count = votes.most_common(1)[0]
    if 2 * count <= len(said):
        winner = None
    agreeing = [(name, pair) for name, pair in said if pair.winner == winner]
    row: dict[str, Any] = {"id": task, "winner": winner}
    if winner is not None:
        strength = median_low(GRADES[pair.rating] for _, pair in agreeing if pair.rating is not None)
        row["rating"] = RATINGS[strength - 1]
        labels = [pair.is_safe for _, pair in said if pair.is_safe is not None]
        if labels:
            row["is_safe"] = [2 * sum(label[place] for label in labels) > len(labels) for place in (0, 1)]
    row["annotator"] = "+".join(sorted(name for name, _ in agreeing))
    reasons = [pair.reason for _, pair in agreeing if pair.reason]
    return {**row, "reason": " / ".join(reasons)} if reasons else row


def _item(task: Mapping[str, Any]) -> NewItem:
    values = {
        "messages": task["prompt"], "responses": task["responses"], "order_seed": task.get("order_seed"),
        "metadata": {"id": task["id"]},
    }  # fmt: skip
    return NewItem(parse(ItemContent, values), external_id=str(task["id"]))


def _by_criterion(tasks: Iterable[Mapping[str, Any]]) -> dict[Criterion, list[Mapping[str, Any]]]:
    """One criterion a project: helpfulness and safety have guidelines of their own."""
    found: dict[Criterion, list[Mapping[str, Any]]] = {}
    for task in tasks:
        found.setdefault(task["criterion"], []).append(task)
    return found


def _digest(tasks: Iterable[Mapping[str, Any]]) -> str:
    """The same for the same tasks: their ids say what they ask."""
    return sha256_json([task["id"] for task in tasks])[:8]


def _label(folder: Path) -> str:
    """The run's and the artifact's name, as far as the path tells."""
    if folder.name == "annotation" and folder.parent.parent.name == ".work":
        artifact = folder.parent.name.rpartition("-")[0] or folder.parent.name
        return f"{folder.parents[2].name} {artifact}"[:60]
    return folder.name[:60]
