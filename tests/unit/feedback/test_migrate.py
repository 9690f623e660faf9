"""Every schema that there ever was becomes the newest one, whole or not at all, whoever starts first."""

import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config as AlembicConfig
from alembic.migration import MigrationContext
from sqlalchemy import MetaData, create_engine, inspect, select, text
from tests.apps.feedback_world import PASSWORD, QUICK_HASHER

from groundup.base.errors import UserError
from groundup.feedback.accounts import Accounts
from groundup.feedback.database import Database
from groundup.feedback.migrate import MIGRATIONS, migrate
from groundup.feedback.tables import Submission, Table
from groundup.feedback.work import Work

FIXTURES = Path(__file__).resolve().parents[2] / "apps" / "fixtures"
DUMPS = sorted(FIXTURES.glob("feedback_schema_*.sql"))

NEXT = """
import os, signal
import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = "0001"


def upgrade() -> None:
    op.create_table("extra", sa.Column("id", sa.Integer(), primary_key=True))
    op.execute("INSERT INTO extra (id) VALUES (1)")
    with op.batch_alter_table("users", recreate="auto") as batch:
        batch.add_column(sa.Column("colour", sa.String(10), nullable=False, server_default="blue"))
        batch.alter_column("pseudonym", existing_type=sa.String(32), type_=sa.String(64))
    op.execute("UPDATE users SET name = 'overwritten'")
    {end}
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
RAISED = "raise OSError('the disk is full')"


def later(folder: Path, end: str) -> Path:
    """Our migrations and one more."""
    migrations = folder / "migrations"
    shutil.rmtree(migrations, ignore_errors=True)
    shutil.copytree(MIGRATIONS, migrations, ignore=shutil.ignore_patterns("__pycache__"))
    (migrations / "versions" / "v9999_next.py").write_text(NEXT.format(end=end))
    return migrations


def revision(database: Database) -> str | None:
    with database.engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def load_dump(dump: Path, url: str, tmp_path: Path) -> None:
    """A past schema with its rows: SQLite's as it was, PostgreSQL's by the migrations of then with the same rows."""
    source = tmp_path / "dump.sqlite" if url.startswith("postgresql") else Path(url.removeprefix("sqlite:///"))
    with sqlite3.connect(source) as connection:
        connection.executescript(dump.read_text())
    if not url.startswith("postgresql"):
        return
    database = Database(url)
    config = AlembicConfig()
    config.set_main_option("script_location", str(MIGRATIONS))
    with database.engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, dump.stem.rpartition("_")[2])
    old, new = MetaData(), MetaData()
    new.reflect(database.engine)
    with create_engine(f"sqlite:///{source}").connect() as connection, database.engine.begin() as target:
        old.reflect(connection)
        for table in new.sorted_tables:
            if table.name == "alembic_version":
                continue
            rows = [_with_zones(row._mapping) for row in connection.execute(select(old.tables[table.name]))]
            if rows:
                target.execute(table.insert(), rows)
            target.execute(text(f"SELECT setval(pg_get_serial_sequence('{table.name}', 'id'), {len(rows) + 1}, false)"))
    database.close()


def _with_zones(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.replace(tzinfo=UTC) if isinstance(value, datetime) else value for name, value in row.items()}


def test_migrations_make_what_the_code_expects(empty_url: str) -> None:
    database = Database(empty_url)
    migrate(database)
    migrate(database)
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Table.metadata) == []
    database.close()


def test_there_is_a_dump_of_every_past_schema() -> None:
    versions = sorted(path.stem.removeprefix("v").partition("_")[0] for path in (MIGRATIONS / "versions").glob("v*.py"))
    assert [dump.stem.rpartition("_")[2] for dump in DUMPS] == versions


@pytest.mark.parametrize("dump", DUMPS, ids=lambda dump: dump.stem)
def test_past_schemas_become_the_newest(dump: Path, empty_url: str, tmp_path: Path) -> None:
    load_dump(dump, empty_url, tmp_path)
    database = Database(empty_url)
    migrate(database)
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Table.metadata) == []
        rows = {table.name: connection.execute(select(table)).fetchall() for table in Table.metadata.sorted_tables}
    assert {name: len(found) for name, found in rows.items() if name != "login_failures"} == {
        "users": 3,
        "invitations": 4,
        "login_sessions": 1,
        "endpoints": 2,
        "projects": 2,
        "project_endpoints": 2,
        "batches": 2,
        "items": 5,
        "assignments": 3,
        "turns": 1,
        "submissions": 3,
        "reviews": 2,
    }
    # And it works on.
    accounts, work = Accounts(database, hasher=QUICK_HASHER), Work(database)
    ann = accounts.who(accounts.sign_in("ann", PASSWORD, "here"))
    assert ann is not None
    with database.read() as session:
        assert session.scalars(select(Submission).where(Submission.user_id == ann.id)).first() is not None
    task = work.claim(ann.id, 1)
    assert task is not None
    assert task.turns[0].prompt == "How do magnets work?"
    assert task.turns[0].responses is not None
    database.close()


@pytest.mark.parametrize("end", [KILLED, RAISED], ids=["killed", "raised"])
def test_an_interrupted_migration_leaves_the_database_as_it_was(empty_url: str, tmp_path: Path, end: str) -> None:
    database = Database(empty_url)
    migrate(database)
    accounts = Accounts(database, hasher=QUICK_HASHER)
    accounts.accept(accounts.first_admin_token() or "", "boss", PASSWORD)
    code = (
        "import sys; from pathlib import Path\n"
        "from groundup.feedback.database import Database\n"
        "from groundup.feedback.migrate import migrate\n"
        "migrate(Database(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    argv = [sys.executable, "-c", code, empty_url, str(later(tmp_path, end))]
    finished = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert finished.returncode == (-9 if end == KILLED else 1)
    assert (end == RAISED) == ("the disk is full" in finished.stderr)
    assert revision(database) == "0001"
    assert "extra" not in inspect(database.engine).get_table_names()
    assert "colour" not in {column["name"] for column in inspect(database.engine).get_columns("users")}
    assert accounts.sign_in("boss", PASSWORD, "here")
    migrate(database, later(tmp_path, "pass"))
    assert revision(database) == "9999"
    with database.read() as session:
        assert session.execute(text("SELECT name, colour FROM users")).fetchall() == [("overwritten", "blue")]
        assert session.scalar(text("SELECT count(*) FROM login_sessions")) == 1
    database.close()


def test_many_may_start_at_once(empty_url: str) -> None:
    databases = [Database(empty_url) for _ in range(4)]
    trouble = []

    def start(database: Database) -> None:
        try:
            migrate(database)
        except BaseException as error:
            trouble.append(error)

    threads = [threading.Thread(target=start, args=(database,)) for database in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trouble == []
    assert {revision(database) for database in databases} == {"0001"}
    for database in databases:
        database.close()


def test_a_newer_database_is_refused(empty_url: str, tmp_path: Path) -> None:
    database = Database(empty_url)
    migrate(database, later(tmp_path, "pass"))
    with pytest.raises(UserError, match="newer groundup") as refusal:
        migrate(database)
    assert "upgrade" in str(refusal.value)
    assert revision(database) == "9999"
    database.close()


def test_a_foreign_database_is_refused(empty_url: str) -> None:
    database = Database(empty_url)
    with database.write() as session:
        session.execute(text("CREATE TABLE cats (id INTEGER PRIMARY KEY)"))
    with pytest.raises(UserError, match="not groundup's"):
        migrate(database)
    assert inspect(database.engine).get_table_names() == ["cats"]
    database.close()
