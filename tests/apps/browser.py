"""A real Chromium for tests of the applications, and pages that notice what must not happen in them."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "device_scale_factor": 2}
_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
# Far more than anything takes: a busy machine must not fail a test.
_MOST_MS = 60_000
expect.set_options(timeout=_MOST_MS)
_LOCAL_SCHEMES = {"about", "blob", "data"}


@contextmanager
def start_chromium() -> Iterator[Browser]:
    """The system's Chromium with an empty profile; skips the tests where there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def wait_until(page: Page, script: str) -> None:
    """Until an expression or a function without arguments gives something true in the page.

    Why not the library's own way: from the second look on it evaluates text inside the page, which our policy forbids.
    """
    deadline = time.monotonic() + _MOST_MS / 1000
    while not page.evaluate(script):
        assert time.monotonic() < deadline, script
        page.wait_for_timeout(20)


@dataclass
class Noticed:
    """What a page did that a test may have to refuse."""

    errors: list[str] = field(default_factory=list)
    """Messages of level error on the console (violations of the policy are among them) and uncaught exceptions."""
    dialogs: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    """Requests to any other host; they are not let out."""

    def nothing(self) -> bool:
        return not (self.errors or self.dialogs or self.foreign)


@contextmanager
def watched_page(browser: Browser, origin: str, **context_options: Any) -> Iterator[tuple[Page, Noticed]]:
    """A page with a storage of its own, at `about:blank`; `origin` ("http://127.0.0.1:1234") is the application's."""
    noticed = Noticed()
    host = urlsplit(origin).netloc

    def is_foreign(url: str) -> bool:
        parts = urlsplit(url)
        return parts.scheme not in _LOCAL_SCHEMES and parts.netloc != host

    def on_request(request: Request) -> None:
        if is_foreign(request.url):
            noticed.foreign.append(request.url)

    def on_console(message: ConsoleMessage) -> None:
        if message.type == "error":
            noticed.errors.append(message.text)

    context = browser.new_context(**context_options)
    try:
        context.route(is_foreign, lambda route: route.abort())
        page = context.new_page()
        page.set_default_timeout(_MOST_MS)
        page.on("request", on_request)
        page.on("console", on_console)
        page.on("pageerror", lambda error: noticed.errors.append(str(error)))

        def on_dialog(dialog: Any) -> None:
            noticed.dialogs.append(dialog.message)
            dialog.dismiss()

        page.on("dialog", on_dialog)
        yield page, noticed
    finally:
        context.close()
