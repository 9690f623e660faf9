"""Each test of the services runs on SQLite and on a real PostgreSQL."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.apps.feedback_world import World, new_postgres_database, postgres_server, sqlite_database

from groundup.feedback.database import Database
from groundup.feedback.migrate import migrate

TEMPLATE = "groundup_template"


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Address of a server."""
    with postgres_server() as address:
        yield address


@pytest.fixture(scope="session")
def postgres_template(postgres: str) -> str:
    """Address of a server that has a migrated database to be copied: that is quicker than to migrate for each test."""
    database = Database(new_postgres_database(postgres, TEMPLATE))
    migrate(database)
    database.close()
    return postgres


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Likewise."""
    folder = tmp_path_factory.mktemp("template")
    database = Database(sqlite_database(folder))
    migrate(database)
    database.close()
    return folder


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Address of an empty database."""
    if request.param == "sqlite":
        return sqlite_database(tmp_path)
    return new_postgres_database(request.getfixturevalue("postgres"), "groundup_test")


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A migrated one."""
    if request.param == "sqlite":
        shutil.copytree(request.getfixturevalue("sqlite_template"), tmp_path, dirs_exist_ok=True)
        url = sqlite_database(tmp_path)
    else:
        server = request.getfixturevalue("postgres_template")
        url = new_postgres_database(server, "groundup_test", TEMPLATE)
    database = Database(url)
    yield database
    database.close()


@pytest.fixture
def world(database: Database) -> World:
    """With an administrator in it."""
    return World(database)
