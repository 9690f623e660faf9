"""Bringing a database to the newest schema: all pending migrations in one transaction, by one process at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from groundup.base.errors import UserError
from groundup.feedback.database import Database

MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK = 0x67726F756E647570
"""Key of PostgreSQL's advisory lock: "groundup" in ASCII."""


def migrate(database: Database, migrations: Path = MIGRATIONS) -> None:
    """Apply what is missing; killed anywhere in between, the database is as before.

    Raises: UserError for a database that cannot be opened, is not ours, or was written by a newer groundup.
    """
    config = AlembicConfig()
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    scripts = ScriptDirectory.from_config(config)
    with _exclusive(database) as connection:
        known = {script.revision for script in scripts.walk_revisions()}
        current = MigrationContext.configure(connection).get_current_revision()
        if current is not None and current not in known:
            raise UserError(
                f"{database.name}: was written by a newer groundup (schema {current}; this one knows schemas up to "
                f"{scripts.get_current_head()})",
                "upgrade groundup: pip install --upgrade 'groundup[annotate]'",
            )
        if current is None and inspect(connection).get_table_names():
            raise UserError(f"{database.name}: holds tables that are not groundup's", "name a database of its own")
        if current != scripts.get_current_head():
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            _check_references(database, connection)


@contextmanager
def _exclusive(database: Database) -> Iterator[Connection]:
    """One transaction that no other process's migration runs beside."""
    with database.connect_for_migration() as connection, connection.begin():
        if not database.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        yield connection


def _check_references(database: Database, connection: Connection) -> None:
    """SQLite checks no foreign keys while tables are rebuilt."""
    if database.is_sqlite:
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
        assert not broken, f"a migration left rows that refer to nothing: {broken[:5]}"
