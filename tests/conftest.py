"""Fixtures shared by all tests."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real texts and models that lie beside the checkout on the project's own machines; elsewhere such tests skip."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.exists():
        pytest.skip(f"no shared test data beside the checkout ({folder})")
    return folder
