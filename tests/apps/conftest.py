"""Fixtures of the applications' tests."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser
from tests.apps.browser import start_chromium


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for the whole session; each test opens a page with a storage of its own."""
    with start_chromium() as browser:
        yield browser
