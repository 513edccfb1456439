"""The database that holds a record: SQLite in the state directory, or PostgreSQL. Transactions, locks and copies.

A commit that has returned survives a power cut, in either.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import sqlalchemy as sa
import structlog
from sqlalchemy import event

from coordinator.store.migrations import check_revision, migrate
from coordinator.store.postgres import ANSWER_S, Watch, advice, is_temporary, open_postgres
from coordinator.store.tables import holder
from fedepth.errors import StateError, UnavailableError
from fedepth.files import disk_errors, make_durable

BUSY_S = 10.0  # how long a SQLite transaction waits for another one
MIGRATION_S = 120.0  # how long the tables of a record may take to be made anew

_NAME = "job.sqlite"
_HEADER_BYTES = 100
_log = structlog.get_logger()
_MAGIC = b"SQLite format 3\0"
_LOCK_KEY = 0x66656465  # of PostgreSQL's advisory lock; one database holds one job
_WRITING_KEY = _LOCK_KEY + 1  # of another, which a transaction that may write has to its end


class Database:
    """One record's database. Errors of the database are raised as errors of ours.

    Attributes:
        label: names it for people, without user, password and options.
        path: the SQLite file; None for PostgreSQL.
    """

    def __init__(self, directory: Path, url: str) -> None:
        self.path = None if url else directory / _NAME
        if self.path is None:
            parsed = _parse(url)
            self.label = f"{parsed.get_backend_name()}://{parsed.host or ''}/{parsed.database or ''}"
            try:
                self._engine = open_postgres(parsed)
            except ModuleNotFoundError as error:
                raise StateError(
                    f"--database needs {error.name}, which is not installed: pip install 'fedepth[postgres]'"
                ) from None
        else:
            self.label = str(self.path)
            self._engine = open_engine(self.path)
        self._watch = Watch(self._engine) if self.path is None else None
        self._writing = self._engine.execution_options(fedepth_writes=True)
        self._lock: sa.Connection | None = None
        self._lock_process = 0  # of the server, which holds the lock for us
        self._name = ""  # ours, as the record's holder; empty if we are not
        self._one_writer = threading.Lock()  # so that what a transaction has read holds until it ends

    def open(self) -> None:
        """Creates or migrates the tables, and with PostgreSQL keeps other coordinators out.

        Raises:
            StateError: it cannot be used; says why.
        """
        if self.path is None:
            with self._bounded():
                self._warn_unless_durable()
                self._take_lock()
        else:
            _check_length(self.path)
        name = f"process {os.getpid()} on {platform.node()} ({secrets.token_hex(4)})"
        with self._bounded(MIGRATION_S), self._writing.begin() as connection:
            self._fence(connection)
            self._check_sound(connection)
            if self.path is None:
                connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
            migrate(connection, self.label)
            if self.path is None:
                connection.execute(holder.delete())
                connection.execute(holder.insert().values(id=1, name=name))
        if self.path is None:
            self._name = name

    def open_for_reading(self) -> None:
        """Whether the record can be read, beside a running coordinator if need be; changes nothing.

        Raises:
            StateError: it cannot.
        """
        if self.path is not None and not self.path.is_file():
            raise StateError(
                f"{self.path.parent} holds no job: {self.path.name} is missing; give the --state of a coordinator, "
                "and the --database that it was given"
            )
        if self.path is not None:
            with disk_errors("the record cannot be read", self.path):
                _check_length(self.path)
            if not os.access(self.path.parent, os.W_OK):
                self._engine.dispose()
                self._engine = _reading_engine(self.path)
        with self._connect(self._engine) as connection:
            self._check_sound(connection)
            check_revision(connection, self.label)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        self._engine.dispose()
        if self._watch is not None:
            self._watch.close()

    @contextlib.contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A transaction that may write; it is durable once the block has ended.

        Raises:
            UnavailableError: the database cannot be reached or written just now; nothing of the block is recorded.
            StateError: another program has had the record meanwhile.
        """
        with self._one_writer, self._bounded():
            self._hold_lock()
            with self._writing.begin() as connection:
                self._fence(connection)
                yield connection

    def answer_promptly(self) -> None:
        """From now on a server that does not answer is given up after seconds: devices wait for it."""
        if self._watch is not None:
            self._watch.set_limits(ANSWER_S)

    def check_hold(self) -> None:
        """Sees that the record is still ours alone, as every transaction that writes does, and that no earlier one is
        on its way: what is read next holds.

        Raises:
            UnavailableError: the database cannot be reached just now.
            StateError: another program has had the record meanwhile.
        """
        with self.begin():
            pass

    def rows(self, query: sa.Select[Any]) -> list[dict[str, Any]]:
        """What a query finds."""
        with self._connect(self._engine) as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def row(self, query: sa.Select[Any]) -> dict[str, Any] | None:
        """The first that a query finds."""
        found = self.rows(query.limit(1))
        return found[0] if found else None

    def write(self, statement: sa.Executable) -> None:
        """One statement in a transaction of its own."""
        with self.begin() as connection:
            connection.execute(statement)

    def checkpoint(self) -> None:
        """Moves SQLite's log into its file, so that the file alone is up to date.

        While another process reads the record, some of the log may have to stay; the next call takes it. It does not
        wait for such a reader: until it had ended, nobody could write.
        """
        if self.path is None:
            return
        with _translated(self.label):
            connection = self._engine.raw_connection()
            try:
                cursor = connection.cursor()
                try:
                    cursor.execute("PRAGMA busy_timeout=0")
                    cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                finally:
                    cursor.execute(f"PRAGMA busy_timeout={int(BUSY_S * 1000)}")
                    cursor.close()
            finally:
                connection.close()

    def copy_to(self, path: Path) -> None:
        """Writes a consistent copy of a SQLite record to a new file, while others write to the record.

        Raises:
            UnavailableError: the record cannot be read.
            OSError: the copy cannot be written.
        """
        assert self.path is not None
        original = _reading_uri(self.path)
        with (
            _translated(self.label),
            contextlib.closing(sqlite3.connect(original, uri=True, timeout=BUSY_S)) as source,
            contextlib.closing(sqlite3.connect(path)) as target,
        ):
            try:
                source.backup(target)
            except sqlite3.OperationalError as error:
                if "full" not in str(error):
                    raise
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error  # nothing else is written
        make_durable(path)

    @contextlib.contextmanager
    def _connect(self, engine: sa.Engine) -> Iterator[sa.Connection]:
        with self._bounded(), engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def _bounded(self, longest_s: float = 0.0) -> Iterator[None]:
        """What is done with the database within the block fails with errors of ours, and ends in time."""
        with _translated(self.label), contextlib.nullcontext() if self._watch is None else self._watch.call(longest_s):
            yield

    def _check_sound(self, connection: sa.Connection) -> None:
        if self.path is None:
            return
        found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        if found != "ok":
            raise StateError(f"{self.label} is damaged ({' '.join(str(found).split())}); {HOW_TO_RESTORE}")

    def _hold_lock(self) -> None:
        """The lock ends with its connection, such as when the server restarts: then it has to be taken again.

        Whoever had it in between has left his name in the record; what we remember of the record may be wrong then.
        """
        if not self._name:
            return
        if self._lock is not None:
            try:
                self._lock.execute(sa.select(1))
                return
            except sa.exc.DBAPIError:
                lock, self._lock = self._lock, None
                lock.invalidate()  # lest the lock goes back into the pool, where it has survived
                lock.close()
        self._take_lock()

    def _warn_unless_durable(self) -> None:
        """No more than a warning: some services sync nothing because their disks are elsewhere, and say so too."""
        with self._engine.connect() as connection:
            if connection.execute(sa.text("SHOW fsync")).scalar() != "on":
                _log.warning(
                    "this PostgreSQL server runs with fsync = off: unless it is durable by other means, a power cut "
                    "can cost updates of which devices were told that they are recorded",
                    database=self.label,
                )

    def _fence(self, connection: sa.Connection) -> None:
        """Waits for what we have written before, and sees that nobody else has written since.

        A server may still be working on a transaction whose answer we gave up, because its disk or its standby keeps it
        waiting: until it has ended, its writes are in nobody's view, and may appear at any moment.
        """
        if self.path is None:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITING_KEY)))
        if self._name:
            self._check_holder(connection)

    def _take_lock(self) -> None:
        lock = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            taken = lock.execute(sa.select(sa.func.pg_try_advisory_lock(_LOCK_KEY))).scalar()
            if self._name:
                self._check_holder(lock)
            if not taken:
                self._give_up(lock)
            self._lock_process = int(lock.execute(sa.select(sa.func.pg_backend_pid())).scalar_one())
        except BaseException:
            lock.invalidate()
            lock.close()
            raise
        self._lock = lock

    def _check_holder(self, connection: sa.Connection) -> None:
        found = connection.execute(sa.select(holder.c.name)).scalar()
        if found != self._name:
            raise StateError(
                f"{self.label}: the record was changed by another program while the connection was cut: "
                f"{found or 'nobody'} has had it since, not {self._name}; start the coordinator again"
            )

    def _give_up(self, connection: sa.Connection) -> NoReturn:
        """Says why the lock cannot be taken. Where the server has not noticed yet that our last connection is gone, it
        is told to."""
        if not self._name:
            raise StateError(f"{self.label} is in use by another coordinator; stop it, or name another --database")
        connection.execute(
            sa.text(
                "SELECT pg_terminate_backend(pid) FROM pg_locks "
                "WHERE locktype = 'advisory' AND granted AND pid = :process "
                "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            ),
            {"process": self._lock_process},
        )
        raise UnavailableError(
            f"{self.label} cannot be used now: a connection that was cut still holds the job's lock there; "
            "it was told to end"
        )


HOW_TO_RESTORE = (
    "stop the coordinator, move job.sqlite, job.sqlite-wal and job.sqlite-shm away and put back all of a backup made "
    "by fedepth-coordinator backup, or use another --state"
)


def open_engine(path: Path) -> sa.Engine:
    """SQLite in WAL mode; every commit is on the disk when it returns."""
    # The driver's own handling of transactions leaves changes of tables out of them.
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        connect_args={"timeout": BUSY_S, "isolation_level": None},
        hide_parameters=True,
    )

    def prepare(connection: Any, _record: Any) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    def begin(connection: sa.Connection) -> None:
        # A transaction that reads before it writes would fail, not wait, if another one wrote in between.
        writes = connection.get_execution_options().get("fedepth_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    event.listen(engine, "connect", prepare)
    event.listen(engine, "begin", begin)
    return engine


def _reading_engine(path: Path) -> sa.Engine:
    """For a record that cannot be written, such as one on a read-only disk."""
    url = sa.URL.create("sqlite", database=_reading_uri(path), query={"uri": "true"})
    return sa.create_engine(url, connect_args={"timeout": BUSY_S}, hide_parameters=True)


def _reading_uri(path: Path) -> str:
    """Where SQLite cannot make the files that go with a log, it reads a record only if it is told that there is none
    (https://www.sqlite.org/wal.html#read_only_databases)."""
    log = path.with_name(f"{path.name}-wal")
    fixed = not os.access(path.parent, os.W_OK) and not (log.is_file() and log.stat().st_size > 0)
    return f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if fixed else ''}"


def _check_length(path: Path) -> None:
    """SQLite takes what is missing at the end of a file for zeros, and may find nothing wrong with them.

    With a log beside it the file may rightly be shorter than it says. (https://www.sqlite.org/fileformat2.html,
    section 1.3: page size, size of the database in pages, and whether that is to be believed.)

    Raises:
        StateError: the file has been cut short.
    """
    log = path.with_name(f"{path.name}-wal")
    if not path.is_file() or (log.is_file() and log.stat().st_size > 0):
        return
    with open(path, "rb") as file:
        header = file.read(_HEADER_BYTES)
    if not header or not header.startswith(_MAGIC[: len(header)]):
        return  # empty, or no database at all: SQLite says so
    page = int.from_bytes(header[16:18], "big")
    stated = int.from_bytes(header[28:32], "big") * (65536 if page == 1 else page)
    size = path.stat().st_size
    if size < _HEADER_BYTES or (header[24:28] == header[92:96] and size < stated):
        raise StateError(f"{path} is cut short: it has {size} of {max(stated, _HEADER_BYTES)} bytes; {HOW_TO_RESTORE}")


def _parse(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):  # the second of a host or a port that is none
        raise StateError(  # the text may hold a password
            "--database is not a URL such as postgresql://user@host/database; give one, or none for SQLite in --state"
        ) from None
    if parsed.drivername not in ("postgresql", "postgresql+psycopg"):
        raise StateError(
            f"--database {parsed.drivername}: is not supported; give a URL such as postgresql://user@host/database, "
            "or none for SQLite in --state"
        )
    return parsed.set(drivername="postgresql+psycopg")


@contextlib.contextmanager
def _translated(label: str) -> Iterator[None]:
    try:
        yield
    except (sa.exc.DBAPIError, sqlite3.Error) as error:
        cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
        if getattr(cause, "sqlite_errorname", "") in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
            raise StateError(f"{label} cannot be read: {cause}; {HOW_TO_RESTORE}") from None
        state = getattr(cause, "sqlstate", None) or ""
        broken = isinstance(error, (sa.exc.OperationalError, sa.exc.InterfaceError, sqlite3.OperationalError))
        if not (is_temporary(state) if state else broken):
            said, named = " ".join(str(cause).split()), f" (SQLSTATE {state})" if state else ""
            raise StateError(f"{label} rejected this: {said}{named}; {advice(state)}") from error
        raise UnavailableError(
            f"{label} cannot be used now: {' '.join(str(cause).split())}; see that the database runs and its disk has "
            "room"
        ) from error
    except TimeoutError as error:
        raise UnavailableError(
            f"{label} cannot be used now: {error}; see that the database runs and can be reached"
        ) from error
    except sa.exc.TimeoutError as error:
        raise UnavailableError(f"{label} gave no connection in time: {error}; try again") from error
