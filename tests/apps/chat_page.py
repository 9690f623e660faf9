"""The chat page as its user sees it, on the real application with models that answer as they are told."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Locator, Page, expect
from tests.apps.browser import Noticed, wait_until, watched_page
from tests.apps.raw_http import Site, running
from tests.apps.scripted_backend import ScriptedBackend
from tests.apps.small_model import save_small_model

from groundup.model.checkpoint import Checkpoint, load_checkpoint
from groundup.serve.app import create_app
from groundup.serve.config import ServeConfig

MODELS = ("early", "late")


@dataclass
class World:
    site: Site
    checkpoint: Checkpoint
    backends: dict[str, ScriptedBackend]


@contextmanager
def scripted_world(checkpoint: Checkpoint | None = None, context: int = 100_000, **config: Any) -> Iterator[World]:
    """A running server; its models have the tokenizer and chat format of `checkpoint` (None: of a new small one)."""
    checkpoint = checkpoint or small_checkpoint()
    backends = {
        name: ScriptedBackend(checkpoint.tokenizer, checkpoint.chat, name=name, max_tokens=context) for name in MODELS
    }
    with running(create_app(backends, ServeConfig(**config))) as site:
        yield World(site, checkpoint, backends)


def small_checkpoint() -> Checkpoint:
    with tempfile.TemporaryDirectory() as folder:
        return load_checkpoint(save_small_model(Path(folder) / "small"))


class Chat:
    """The page as its user sees it."""

    def __init__(self, page: Page, noticed: Noticed, world: World) -> None:
        self.page, self.noticed, self.world = page, noticed, world
        self.field = page.locator("#composer-text")
        self.answers = page.locator(".turn.answer")
        self.questions = page.locator(".turn.user .said")
        self.titles = page.locator(".conversation .title")

    def open(self) -> "Chat":
        self.page.goto(self.world.site.url)
        expect(self.page.locator("#model option")).to_have_count(len(MODELS))
        return self

    def send(self, text: str) -> None:
        self.field.fill(text)
        self.field.press("Enter")

    def ask(self, text: str) -> Locator:
        """Send, and wait until every answer is complete; the last one."""
        before = self.questions.count()
        self.send(text)
        expect(self.questions).to_have_count(before + 1)
        return self.complete()

    def complete(self) -> Locator:
        expect(self.page.locator("#send")).to_be_visible()
        expect(self.page.locator(".answer[aria-busy=true]")).to_have_count(0)
        return self.answers.last

    def keys(self, *names: str) -> None:
        """Press keys while no field has the focus."""
        self.page.locator("#scroller").focus()
        for name in names:
            self.page.keyboard.press(name)

    def focused(self) -> str:
        return str(self.page.evaluate("document.activeElement.id || document.activeElement.className"))

    def saved(self) -> None:
        """Wait until the conversation is on the disk."""
        finished = """async () => {
            const request = indexedDB.open("groundup-chat");
            const database = await new Promise((done) => { request.onsuccess = () => done(request.result); });
            const all = database.transaction("bodies").objectStore("bodies").getAll();
            const bodies = await new Promise((done) => { all.onsuccess = () => done(all.result); });
            database.close();
            const turns = bodies.flatMap((body) => Object.values(body.nodes));
            return turns.length && turns.every((turn) => turn.finish !== null);
        }"""
        wait_until(self.page, finished)


@contextmanager
def open_chat(browser: Browser, world: World, **context_options: Any) -> Iterator[Chat]:
    """An open page; at its end nothing may have gone wrong in it."""
    options = {"viewport": {"width": 1280, "height": 800}, **context_options}
    with watched_page(browser, world.site.url, **options) as (page, noticed):
        yield Chat(page, noticed, world).open()
        assert noticed.nothing(), noticed
