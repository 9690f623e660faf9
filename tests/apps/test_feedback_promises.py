"""Eight people at once over real HTTP, people who walk away, applications that are killed: nothing lost or doubled."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import func, select, text
from tests.apps.feedback_world import (
    PASSWORD,
    QUICK_HASHER,
    World,
    new_postgres_database,
    postgres_server,
    sqlite_database,
)

from groundup.feedback.accounts import Accounts, csrf_token
from groundup.feedback.clock import utc_now
from groundup.feedback.database import Database
from groundup.feedback.migrate import migrate
from groundup.feedback.tables import Assignment, Item, Submission

ROOT = Path(__file__).resolve().parents[2]
PEOPLE = 8
OVERLAP = 2
STANDSTILL_SECONDS = 120


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with postgres_server() as address:
        yield address


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return sqlite_database(tmp_path)
    return new_postgres_database(request.getfixturevalue("postgres"), "groundup_promises")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Application:
    """The application in a process of its own, which may be killed and started again."""

    database_url: str
    folder: Path
    port: int = 0
    pid: int = 0

    def __enter__(self) -> "Application":
        self.clock = self.folder / "clock"
        self.clock.write_text("0")
        self.port = free_port()
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.apps.feedback_server", self.database_url, str(self.clock), str(self.port)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.start()
        return self

    def start(self) -> None:
        assert self._parent.stdin
        assert self._parent.stdout
        self._parent.stdin.write("start\n")
        self._parent.stdin.flush()
        self.pid = json.loads(self._parent.stdout.readline())["pid"]

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def __exit__(self, *error: object) -> None:
        self.kill()
        self._parent.kill()
        self._parent.communicate()


class Crowd:
    """Eight annotators, each a process, on one project of items with given responses."""

    def __init__(self, application: Application, items: int, abandon: float) -> None:
        self.database = Database(application.database_url)
        migrate(self.database)
        world = World(self.database)
        world.clock.now = utc_now()
        # The clock will be turned by years.
        accounts = Accounts(self.database, session_hours=24 * 365 * 10, hasher=QUICK_HASHER)
        self.ratings = items * OVERLAP
        self.project_id = world.project("preference", items, overlap=OVERLAP).id
        self.folder, self.stop = application.folder, application.folder / "stop"
        self.processes = []
        for number in range(PEOPLE):
            world.person(f"ann{number}")
            session = accounts.sign_in(f"ann{number}", PASSWORD, "here")
            argv = [application.port, self.project_id, session, csrf_token(session), f"ann{number}", abandon]
            argv += [application.clock, self.stop, self.folder / f"ann{number}.log"]
            script = Path(__file__).with_name("feedback_annotator.py")
            self.processes.append(subprocess.Popen([sys.executable, "-S", str(script), *map(str, argv)]))

    def left(self) -> int:
        assert all(process.poll() is None for process in self.processes), "an annotator died"
        with self.database.read() as session:
            return session.scalar(select(func.count()).where(Item.is_done.is_(False)).select_from(Item)) or 0

    def wait(self) -> None:
        left, since = self.left(), time.monotonic()
        while left:
            time.sleep(0.25)
            if (now_left := self.left()) < left:
                left, since = now_left, time.monotonic()
            assert time.monotonic() < since + STANDSTILL_SECONDS, f"{left} items are left, and nobody rates them"

    def go_home(self) -> None:
        self.stop.touch()
        for process in self.processes:
            process.wait()

    def log(self) -> list[dict[str, object]]:
        lines = [line for path in self.folder.glob("ann*.log") for line in path.read_text().splitlines()]
        return [json.loads(line) for line in lines]

    def check(self) -> Counter[object]:
        """What holds whatever happened."""
        log = self.log()
        assert [event for event in log if int(str(event["status"])) >= 500] == []
        assert [event for event in log if event["event"] == "refused claim"] == []
        with self.database.read() as session:
            standing = list(session.scalars(select(Submission)))
            places = list(session.scalars(select(Assignment)))
            if self.database.is_sqlite:
                assert session.scalar(text("PRAGMA integrity_check")) == "ok"
        acknowledged = {event["key"] for event in log if event["event"] == "acknowledged"}
        kept = Counter(row.idempotency_key for row in standing)
        assert acknowledged - set(kept) == set(), "acknowledged answers are lost"
        assert set(kept.values()) == {1}, "an answer is there twice"
        assert {row.answer["turns"][0]["reason"] == row.idempotency_key for row in standing} == {True}
        assert set(Counter(row.item_id for row in standing).values()) == {OVERLAP}
        assert len(standing) == self.ratings
        assert len({(row.item_id, row.user_id) for row in standing}) == len(standing)
        assert len({(place.item_id, place.user_id) for place in places}) == len(places)
        assert {place.id for place in places if place.state == "submitted"} == {row.assignment_id for row in standing}
        return Counter(event["event"] for event in log)


def rate(database_url: str, folder: Path, items: int, abandon: float) -> Counter[object]:
    with Application(database_url, folder) as application:
        crowd = Crowd(application, items, abandon)
        try:
            crowd.wait()
        finally:
            crowd.go_home()
        return crowd.check()


def rate_while_killing(database_url: str, folder: Path, items: int, kills: int) -> None:
    chance = random.Random(0)
    with Application(database_url, folder) as application:
        crowd = Crowd(application, items, abandon=0.0)
        try:
            for _ in range(kills):
                time.sleep(chance.uniform(0.05, 0.6))
                application.kill()
                assert crowd.left() > 0, "there was no load left to kill the application under"
                application.start()
            crowd.wait()
        finally:
            crowd.go_home()
        crowd.check()


@pytest.mark.parametrize("abandon", [0.0, 0.3])
def test_eight_people_at_once(database_url: str, tmp_path: Path, abandon: float) -> None:
    events = rate(database_url, tmp_path, items=40, abandon=abandon)
    assert events["acknowledged"] >= 80


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("abandon", [0.0, 0.3])
def test_eight_people_give_five_hundred_ratings_each(database_url: str, tmp_path: Path, abandon: float) -> None:
    events = rate(database_url, tmp_path, items=PEOPLE * 500 // OVERLAP, abandon=abandon)
    assert events["acknowledged"] >= 4000
    print(events)


def test_what_was_acknowledged_survives_kills(database_url: str, tmp_path: Path) -> None:
    rate_while_killing(database_url, tmp_path, items=150, kills=4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_was_acknowledged_survives_fifty_kills(database_url: str, tmp_path: Path) -> None:
    rate_while_killing(database_url, tmp_path, items=2000, kills=50)
