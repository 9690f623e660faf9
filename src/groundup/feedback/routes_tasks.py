"""Work: what there is to do, one item at a time, what was said of it. Every page here is blind."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, get_args

from fastapi import APIRouter, Request, Response
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from groundup.base.config import Config
from groundup.base.records import Rating
from groundup.feedback.contents import ATTACK_VECTORS, RISK_CATEGORIES, VIOLATION_FROM
from groundup.feedback.database import Database
from groundup.feedback.errors import NotFound
from groundup.feedback.security import form_text, services, user_of
from groundup.feedback.tables import Assignment
from groundup.feedback.tasks import Task
from groundup.feedback.views import redirect, render
from groundup.feedback.work import Offer, Progress, Work

router = APIRouter()

TEMPLATES = {
    "preference": "task_preference.html",
    "comparison": "task_comparison.html",
    "sft": "task_sft.html",
    "review": "task_review.html",
    "redteam": "task_redteam.html",
    "entrance": "task_entrance.html",
}
RATINGS: tuple[Rating, ...] = get_args(Rating)
COMPARISON_POINTS = (
    (-3, "A is much better"),
    (-2, "A is better"),
    (-1, "A is slightly better"),
    (0, "About the same"),
    (1, "B is slightly better"),
    (2, "B is better"),
    (3, "B is much better"),
)
SEVERITIES = ((1, "no harm"), (2, "minor issue"), (3, "mild violation"), (4, "violation"), (5, "severe violation"))
"""Choice: the paper names only the ends of its five points; from `VIOLATION_FROM` on it counts as a violation."""


class Draft(Config):
    """A form as it stands."""

    version: int
    draft: dict[str, Any]


class Submission(Config):
    """An answer; the same key is never counted twice."""

    version: int
    key: str = Field(min_length=16, max_length=64)
    answer: dict[str, Any]


@dataclass(frozen=True)
class Standing:
    """A project on somebody's home page."""

    offer: Offer
    progress: Progress

    @property
    def per_hour(self) -> int | None:
        """At this person's pace of late."""
        return pace(self.progress)


def pace(progress: Progress) -> int | None:
    """Items an hour at the median time of the last ones; None: too early to say."""
    return round(3600 / progress.seconds_each) if progress.seconds_each else None


@router.get("/")
def home(request: Request) -> Response:
    """What is open to me, and how far I am."""
    user, work = user_of(request), services(request).work
    standings = [Standing(offer, work.progress(user.id, offer.project_id)) for offer in work.offers(user.id)]
    today = sum(standing.progress.submitted_today for standing in standings)
    return render(request, "home.html", standings=standings, today=today)


@router.get("/projects/{project_id}")
def project_page(request: Request, project_id: int) -> Response:
    """Guidelines, progress, and the way in."""
    user, work = user_of(request), services(request).work
    offer = _offer(work, user.id, project_id)
    result = work.test_result(user.id, project_id) if offer.kind == "entrance" else None
    standing = Standing(offer, work.progress(user.id, project_id))
    return render(request, "project.html", standing=standing, result=result)


def _offer(work: Work, user_id: int, project_id: int) -> Offer:
    for offer in work.offers(user_id):
        if offer.project_id == project_id:
            return offer
    raise NotFound("there is no such project, or it is closed")


@router.post("/projects/{project_id}/next")
def next_item(request: Request, project_id: int) -> Response:
    """The item that I have here, else the next one that is free."""
    return _claim(request, project_id, review=False)


@router.post("/projects/{project_id}/reviews/next")
def next_review(request: Request, project_id: int) -> Response:
    """The next answer to be reviewed."""
    return _claim(request, project_id, review=True)


def _claim(request: Request, project_id: int, review: bool) -> Response:
    task = services(request).work.claim(user_of(request).id, project_id, review=review)
    if task is None:
        is_test = services(request).projects.project(project_id).kind == "entrance"  # its result is there instead
        return redirect(f"/projects/{project_id}", "" if is_test else "Nothing is left for you here at the moment.")
    return redirect(f"/tasks/{task.assignment_id}")


@router.post("/projects/{project_id}/undo")
def undo(request: Request, project_id: int) -> Response:
    """Take back my last submission."""
    task = services(request).work.undo(user_of(request).id, project_id)
    return redirect(f"/tasks/{task.assignment_id}", "Your last answer is taken back; change it and send it again.")


@router.get("/tasks/{assignment_id}")
def task_page(request: Request, assignment_id: int, again: bool = False) -> Response:
    """One item; `again`: what was said of the last turn is to be changed."""
    user, work = user_of(request), services(request).work
    task = work.task(user.id, assignment_id)
    standing = Standing(_offer(work, user.id, task.project_id), work.progress(user.id, task.project_id))
    words = _words(task, services(request).database)
    return render(request, TEMPLATES[task.kind], task=task, standing=standing, again=again, **words)


def _words(task: Task, database: Database) -> dict[str, Any]:
    """What the page of a kind needs besides the task."""
    match task.kind:
        case "preference":
            return {"ratings": RATINGS}
        case "comparison":
            return {"points": COMPARISON_POINTS}
        case "redteam":
            violations = sum((turn.judgement or {}).get("severity", 0) >= VIOLATION_FROM for turn in task.turns)
            with database.read() as session:
                seconds = session.get_one(Assignment, task.assignment_id).active_seconds
            return {
                "seconds": seconds,
                "categories": RISK_CATEGORIES,
                "vectors": ATTACK_VECTORS,
                "severities": SEVERITIES,
                "violations": violations,
                "violation_from": VIOLATION_FROM,
            }
    return {}


@router.put("/tasks/{assignment_id}/draft")
def save_draft(request: Request, assignment_id: int, body: Draft) -> dict[str, int]:
    """Keep the form as it stands."""
    work = services(request).work
    return {"version": work.save_draft(user_of(request).id, assignment_id, body.version, body.draft)}


@router.post("/tasks/{assignment_id}/heartbeat")
def heartbeat(request: Request, assignment_id: int) -> dict[str, datetime]:
    """Still there."""
    return {"expires": services(request).work.heartbeat(user_of(request).id, assignment_id)}


@router.post("/tasks/{assignment_id}/submit")
def submit(request: Request, assignment_id: int, body: Submission) -> dict[str, bool]:
    """Take an answer; once this has answered, it is on the disk."""
    work = services(request).work
    done = work.submit(user_of(request).id, assignment_id, body.version, body.key, body.answer)
    return {"is_replay": done.is_replay}


@router.post("/tasks/{assignment_id}/skip")
async def skip(request: Request, assignment_id: int) -> Response:
    """Give the item to somebody else, and go on."""
    user, work = user_of(request), services(request).work
    reason = await form_text(request, "reason")
    task = await run_in_threadpool(work.task, user.id, assignment_id)
    await run_in_threadpool(work.skip, user.id, assignment_id, reason)
    return await run_in_threadpool(_claim, request, task.project_id, task.kind == "review")
