"""The annotation application on a real port and a real database, with people, projects and models for tests."""

import dataclasses
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Browser, Page, expect
from sqlalchemy import select
from tests.apps.browser import Noticed, watched_page
from tests.apps.fake_models import FakeModels
from tests.apps.feedback_world import PASSWORD, QUICK_HASHER

from groundup.feedback.accounts import Account, Accounts
from groundup.feedback.app import create_app
from groundup.feedback.clock import Clock, utc_now
from groundup.feedback.contents import GivenResponse, Gold, ItemContent, Turn
from groundup.feedback.projects import NewItem
from groundup.feedback.security import Services
from groundup.feedback.settings import AnnotateConfig
from groundup.feedback.tables import Project, Submission
from groundup.web.run import make_server


@contextmanager
def running(app: Any) -> Iterator[str]:
    """An application on a free port, in a thread; its address."""
    started = threading.Event()
    server = make_server(app, "127.0.0.1", 0, on_started=lambda url: started.set())
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert started.wait(60)
        yield server.url
    finally:
        server.should_exit = True
        thread.join()


@dataclass
class Annotation:
    """A running application; `services` is its inside, for setting things up and for looking at what was stored."""

    url: str
    services: Services
    models: FakeModels
    models_url: str
    admin: Account
    app: Any

    def person(self, name: str, role: Any = "annotator") -> Account:
        token = self.services.accounts.invite(self.admin, role)
        return self.services.accounts.accept(token, name, PASSWORD)

    def session(self, name: str) -> str:
        """A session's token, as the cookie carries it."""
        return self.services.accounts.sign_in(name, PASSWORD, "")

    @contextmanager
    def client(self, name: str | None = None) -> Iterator[httpx.Client]:
        """A client of the API, signed in with its token against forged requests; None: a visitor."""
        cookies = {} if name is None else {"groundup_session": self.session(name)}
        with httpx.Client(base_url=self.url, cookies=cookies, timeout=60) as client:
            client.headers["x-csrf-token"] = csrf_of(client.get("/login" if name is None else "/account").text)
            yield client

    def endpoints(self) -> list[int]:
        """The two models, made once."""
        projects = self.services.projects
        there = {endpoint.name: endpoint.id for endpoint in projects.endpoints(self.admin)}
        for model in ("alpha-7b", "beta-13b"):
            if model not in there:
                endpoint = projects.create_endpoint(
                    self.admin, name=model, base_url=f"{self.models_url}/v1", model=model, revision=f"sha-of-{model}"
                )
                there[model] = endpoint.id
        return list(there.values())

    def project(self, name: str, kind: str, items: Sequence[NewItem], **values: Any) -> Project:
        """A project with one batch of these items."""
        projects = self.services.projects
        if kind in ("preference", "redteam", "comparison"):
            values.setdefault("endpoint_ids", self.endpoints())
        project = projects.create_project(self.admin, name=name, kind=kind, **values)
        projects.add_items(self.admin, projects.open_batch(self.admin, project.id).id, items)
        return project

    def answers(self, project: Project) -> list[dict[str, Any]]:
        """What counts, in the order in which it came."""
        with self.services.database.read() as session:
            found = select(Submission).where(
                Submission.project_id == project.id, Submission.superseded_at.is_(None), Submission.kind != "review"
            )
            return [row.answer for row in session.scalars(found.order_by(Submission.id))]

    @contextmanager
    def page(self, browser: Browser, name: str, **options: Any) -> Iterator[tuple[Page, Noticed]]:
        """A page of somebody who is signed in."""
        with watched_page(browser, self.url, **options) as (page, noticed):
            page.context.add_cookies([{"name": "groundup_session", "value": self.session(name), "url": self.url}])
            yield page, noticed


def begin(page: Page, annotation: Annotation, project: Project) -> None:
    """Open the project, and start."""
    page.goto(f"{annotation.url}/projects/{project.id}")
    ready(page)
    page.keyboard.press("Enter")
    page.wait_for_selector("#task")
    ready(page)


def ready(page: Page) -> None:
    """Wait until the page's own script has run."""
    expect(page.locator("html"), page.url).to_have_attribute("data-ready", "yes")


def asked(text: str) -> NewItem:
    """An item with a prompt."""
    return NewItem(ItemContent(messages=[Turn(role="user", content=text)]))


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def choose(page: Page) -> None:
    """Wait until both responses are there to be compared."""
    expect(page.locator("fieldset.scale")).to_be_visible()


def pair(first: str, second: str) -> NewItem:
    responses = (GivenResponse(text=first, model="alpha-7b"), GivenResponse(text=second, model="beta-13b"))
    messages = [Turn(role="user", content="How do I get into this car?")]
    return NewItem(ItemContent(messages=messages, responses=responses, order_seed=0))


def question(text: str, right: int) -> NewItem:
    return NewItem(ItemContent(question=text, choices=["yes", "no", "it depends"]), gold=Gold(answers=[right]))


def csrf_of(page: str) -> str:
    found = re.search(r'<meta name="csrf-token" content="([0-9a-f]+)">', page)
    assert found, "no token in the page"
    return found[1]


@contextmanager
def annotation(folder: Path, clock: Clock = utc_now, **settings: Any) -> Iterator[Annotation]:
    """A fresh application and two models beside it, with one administrator called admin."""
    models = FakeModels()
    app = create_app(AnnotateConfig(database=str(folder / "annotations.sqlite"), **settings), clock)
    # Hashing as it should be takes longer than most tests.
    accounts = Accounts(app.state.services.database, clock, hasher=QUICK_HASHER)
    services: Services = dataclasses.replace(app.state.services, accounts=accounts)
    app.state.services = services
    token = services.accounts.first_admin_token()
    assert token is not None
    admin = services.accounts.accept(token, "admin", PASSWORD)
    with running(models.app()) as models_url, running(app) as url:
        yield Annotation(url, services, models, models_url, admin, app)
