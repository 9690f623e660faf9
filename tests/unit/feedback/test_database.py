"""Transactions that are whole and durable, snapshots that stand still, addresses that are refused."""

import sqlite3
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DatabaseError, IntegrityError
from tests.apps.feedback_world import World, an_item

from groundup.base.errors import UserError
from groundup.feedback.database import Database
from groundup.feedback.migrate import migrate
from groundup.feedback.settings import AnnotateConfig
from groundup.feedback.tables import LoginFailure

NOW = datetime(2026, 8, 3, 9, 30, 15, 123456, tzinfo=UTC)


def failure(name: str) -> LoginFailure:
    return LoginFailure(name=name, address="here", at=NOW)


def names(database: Database) -> list[str]:
    with database.read() as session:
        return list(session.scalars(select(LoginFailure.name).order_by(LoginFailure.id)))


def test_a_failed_block_leaves_nothing(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.write() as session:
        session.add(failure("half"))
        session.flush()
        raise ZeroDivisionError
    assert names(database) == []


def test_a_snapshot_stands_still(database: Database) -> None:
    with database.write() as session:
        session.add(failure("before"))
    with database.read() as session:
        assert len(session.scalars(select(LoginFailure)).all()) == 1
        with database.write() as other:
            other.add(failure("meanwhile"))
        assert len(session.scalars(select(LoginFailure.name)).all()) == 1
    assert names(database) == ["before", "meanwhile"]


def test_reading_cannot_write(database: Database) -> None:
    with pytest.raises(DatabaseError), database.read() as session:
        session.add(failure("sneaked in"))
        session.flush()
    with database.write() as session:  # the connection writes again
        session.add(failure("allowed"))
    assert names(database) == ["allowed"]


def test_references_are_checked(world: World) -> None:
    project = world.project("preference")
    [batch] = world.projects.batches(project.id)
    world.projects.add_items(world.admin, batch.id, [an_item("preference")])
    with pytest.raises(IntegrityError), world.database.write() as session:
        session.execute(text("DELETE FROM batches"))


def test_times_keep_their_moment(database: Database) -> None:
    elsewhere = NOW.astimezone(timezone(timedelta(hours=9)))
    with database.write() as session:
        session.add(LoginFailure(name="ann", address="here", at=elsewhere))
    with database.read() as session:
        [at] = session.scalars(select(LoginFailure.at))
        assert (at, at.tzinfo) == (NOW, UTC)
        assert session.scalars(select(LoginFailure.name).where(LoginFailure.at < NOW + timedelta(seconds=1))).all()
        assert not session.scalars(select(LoginFailure.name).where(LoginFailure.at < NOW)).all()


def test_writers_wait_for_each_other(database: Database) -> None:
    def count_up() -> None:
        for _ in range(25):
            with database.write() as session:
                session.execute(text("UPDATE login_failures SET address = CAST(CAST(address AS INTEGER) + 1 AS TEXT)"))

    with database.write() as session:
        session.add(LoginFailure(name="counter", address="0", at=NOW))
    threads = [threading.Thread(target=count_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        assert session.scalars(select(LoginFailure.address)).all() == ["100"]


def test_sqlite_is_durable(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'a.sqlite'}")
    migrate(database)
    with database.write() as session:
        settings = {
            name: session.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}  # 2: FULL
    database.close()


@pytest.mark.parametrize(
    "url", ["nonsense", "mysql://host/name", "oracle://host", "", "sqlite://", "sqlite:///a?b.sqlite"]
)
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="sqlite:///FILE"):
        Database(url)


def test_passwords_stay_out_of_messages(tmp_path: Path) -> None:
    database = Database("postgresql://ann:hunter2@127.0.0.1:9/name?connect_timeout=2")
    assert "hunter2" not in database.name
    with pytest.raises(UserError, match="cannot be opened") as refusal:
        migrate(database)
    assert "hunter2" not in str(refusal.value)


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.sqlite"
    path.write_text("these are notes, " * 100)
    with pytest.raises(UserError, match=r"notes\.sqlite"):
        migrate(Database(f"sqlite:///{path}"))
    with pytest.raises(UserError, match="cannot be opened"):
        migrate(Database(f"sqlite:///{tmp_path / 'no such folder' / 'a.sqlite'}"))


def test_a_plain_file_name_is_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    database = Database(AnnotateConfig(database="with space.sqlite").database_url)
    migrate(database)
    database.close()
    with sqlite3.connect(tmp_path / "with space.sqlite") as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall()
