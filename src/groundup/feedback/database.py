"""One database, SQLite or PostgreSQL: transactions that are on the disk when they end, and snapshots to read from."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError
from sqlalchemy.orm import Session

from groundup.base.errors import UserError
from groundup.feedback.tables import Table

BUSY_SECONDS = 30
"""How long a transaction waits for another one's lock before it fails."""
_POOL: dict[str, Any] = {"pool_size": 8, "max_overflow": 40}
"""Connections that are kept, and what busy moments may add: the web server has about as many threads."""
T = TypeVar("T", bound=Table)


class Database:
    """`read()` and `write()` hand out sessions; a write is durable once its block has ended without an exception."""

    def __init__(self, url: str) -> None:
        """Opens nothing yet. `url`: "sqlite:///FILE" or "postgresql://USER:PASSWORD@HOST/NAME".

        Raises: UserError for another kind of address.
        """
        try:
            parsed = make_url(url)
        except ArgumentError:
            raise UserError(f"{url!r} is no address of a database", REMEDY) from None
        self._writer: Engine
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        if self.is_sqlite:
            if "?" in url or not parsed.database:
                raise UserError(f"{url!r}: no file is named, or its name has a question mark", REMEDY)
            self.engine = _sqlite_engine(parsed.set(drivername="sqlite"))
            self._reader = self.engine.execution_options(begin="BEGIN", query_only=1)
            self._writer = self.engine.execution_options(begin="BEGIN IMMEDIATE", query_only=0)
            self._turnstile: AbstractContextManager[Any] = threading.Lock()
        elif parsed.get_backend_name() == "postgresql":
            self.engine = create_engine(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True, **_POOL)
            self._reader = self.engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            self._writer = self.engine
            self._turnstile = nullcontext()
        else:
            raise UserError(f"{parsed.get_backend_name()!r} is not a kind of database that we know", REMEDY)
        self.name = parsed.render_as_string(hide_password=True)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """One consistent snapshot for the whole block; writing in it is an error of the database."""
        with Session(self._reader, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction: all of the block is on the disk when it ends, or nothing of it.

        Why the lock: SQLite has one writer; the threads of a process queue in order here, and only other processes
        meet SQLite's own polling.
        """
        with self._turnstile, Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def connect_for_migration(self) -> Iterator[Connection]:
        """A connection of its own, on which SQLite lets tables be rebuilt that others refer to."""
        try:
            connection = self.engine.connect()
        except DatabaseError as error:
            raise UserError(f"{self.name}: cannot be opened: {error.orig}", REMEDY) from None
        with connection:
            if not self.is_sqlite:
                yield connection
                return
            driver = connection.connection.driver_connection
            assert driver is not None
            driver.execute("PRAGMA foreign_keys = OFF")  # has no effect within a transaction
            try:
                yield connection
            finally:
                driver.execute("PRAGMA foreign_keys = ON")

    def close(self) -> None:
        """Give all connections back."""
        self.engine.dispose()


def find(session: Session, table: type[T], row_id: int) -> T | None:
    """The row, or None; also for numbers that are too large to be anybody's id, of which SQLite would complain."""
    return session.get(table, row_id) if 0 < row_id < 2**31 else None


REMEDY = "use sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"


def _sqlite_engine(url: Any) -> Engine:
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}, **_POOL)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, record: object) -> None:
        connection.isolation_level = None  # the driver begins no transactions by itself: we do, below
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        connection.exec_driver_sql(f"PRAGMA query_only = {options.get('query_only', 0)}")
        connection.exec_driver_sql(options.get("begin", "BEGIN IMMEDIATE"))

    return engine
