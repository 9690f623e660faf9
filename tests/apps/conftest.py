"""Fixtures of the applications' tests, and which of them take minutes."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser
from tests.apps.browser import start_chromium

SLOW_FILES = (
    "test_annotate_admin", "test_annotate_everybody", "test_annotate_export", "test_annotate_loop",
    "test_annotate_trouble", "test_annotate_xss", "test_chat_page_access", "test_chat_page_trouble",
    "test_feedback_promises", "test_serve_load",
)  # fmt: skip
"""Most browsers, hundreds of clients, databases under load: together they take minutes and belong to `make test-slow`.
Who may do what, each type of work and the chat page itself are tested in a browser every time."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Why first: what is slow must be known before pytest leaves it out."""
    for item in items:
        if item.path.parent.name == "apps" and item.path.name.startswith(SLOW_FILES):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for a file of tests; each test opens a page with a storage of its own.

    Why no longer than that: while it is open its event loop runs, and tests that start one of their own would fail.
    """
    with start_chromium() as browser:
        yield browser
