"""Connections to PostgreSQL: bounds on every wait for the server, and which of its errors pass by themselves."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout  # before Python 3.11 it is another class
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from fedepth.printable import printable

ANSWER_S = 5.0  # how long a transaction may take while devices wait for it; all of ours are short
PATIENT_S = 60.0  # and before: a long record is read at the start, and by commands, perhaps over a slow network
CONNECT_S = 20.0  # how long a connection may take in all: the lookup of its host's name, and each address in turn
REST_S = 5.0  # how long a server that did not answer is left alone before it is tried again

# What libpq and the server's own bounds can do. A URL may say otherwise.
_CONNECT = {
    "connect_timeout": int(ANSWER_S),
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
# A server that lost sight of us must let go of the job's lock; over a Unix socket these have no effect.
_SESSION = {
    "statement_timeout": f"{int(PATIENT_S * 1000)}",
    "lock_timeout": f"{int(0.8 * ANSWER_S * 1000)}",  # before the whole call is cut off
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}

# Somebody may have set less for the server, the database or the user, for speed; more stays.
_DURABLE = (
    "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') <> 'remote_apply'"
)

# Classes of SQLSTATE, and single ones (PostgreSQL's manual, appendix A), that say nothing about the statement itself:
# connections, resources, an operator's intervention, the system; read-only for a while, as after a failover or with a
# full disk; transactions that met others.
_TEMPORARY = ("08", "53", "57", "58", "25006", "25P03", "25P04", "40001", "40P01", "55P03")
# What to do about the others; the first that fits.
_ADVICE = (
    ("28", "see that the user and the password in --database are right, and start the coordinator again"),
    ("3D000", "create the database, or name another --database"),
    ("42501", "grant the user in --database all rights on the job's tables, and start the coordinator again"),
    ("42", "see that nobody changed the job's tables, or restore a backup of the database; then start it again"),
    ("XX", "the database is damaged, or PostgreSQL has a fault: see its log, restore a backup, and start it again"),
    ("", "see that nothing else writes to the record, fix what it names, and start the coordinator again"),
)


def is_temporary(state: str) -> bool:
    """Whether what the server says with this SQLSTATE may pass by itself."""
    return state.startswith(_TEMPORARY)


def advice(state: str) -> str:
    """What to do about an error with this SQLSTATE, which does not pass."""
    return next(text for prefix, text in _ADVICE if state.startswith(prefix))


def open_postgres(url: sa.URL) -> sa.Engine:
    """An engine whose waits are bounded, as far as the server and the kernel take part; `Watch` does the rest."""
    bounds = {name: value for name, value in _CONNECT.items() if name not in url.query}
    return sa.create_engine(url, pool_pre_ping=True, hide_parameters=True, connect_args=bounds)


def connect(dialect: sa.Dialect, positional: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """A connection of the driver's, or an error in time.

    The system's lookup of a name has no bound that we could set, and cannot be interrupted: a thread is left behind
    with it.

    Raises:
        TimeoutError: neither came.
    """
    answer: Future[Any] = Future()

    def run() -> None:
        try:
            made = dialect.connect(*positional, **named)
        except BaseException as error:  # noqa: BLE001 - raised by whoever waits
            if answer.set_running_or_notify_cancel():
                answer.set_exception(error)
            return
        if answer.set_running_or_notify_cancel():
            answer.set_result(made)
        else:
            made.close()

    threading.Thread(target=run, name="connecting to the database", daemon=True).start()
    try:
        return answer.result(CONNECT_S)
    except FutureTimeout:
        if not answer.cancel():  # it came just now
            return answer.result()
        host = printable(str(named.get("host") or "localhost"))
        raise TimeoutError(
            f"could not connect to {host} within {CONNECT_S:g} s; if `getent hosts {host}` takes long as well, "
            "fix name resolution, or give an IP address"
        ) from None


class Watch:
    """Ends calls that a server does not answer, and keeps others from waiting for it as well.

    A server that is stopped, or behind a path that drops everything, enforces no timeout, and its kernel may go on
    acknowledging. So a thread shuts down the sockets of a call that takes too long: the call then fails like one
    whose connection broke. Whoever calls next would wait as long; hence no other call is let in until the server has
    accepted a connection again, which the thread tries by itself.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._answer_s = PATIENT_S
        self._rest_s = REST_S
        self._changed = threading.Condition()
        self._ends: dict[object, float] = {}  # when each call in progress has taken too long
        self._connections: dict[int, Any] = {}  # those of the driver, by id
        self._silent = False
        self._closed = False
        self._thread: threading.Thread | None = None
        event.listen(engine, "do_connect", self._opening)
        event.listen(engine, "connect", self._opened)
        event.listen(engine, "close", self._closing)

    def set_limits(self, answer_s: float, rest_s: float = REST_S) -> None:
        """From now on a call may take `answer_s`, and a server that did not answer is left alone for `rest_s`."""
        with self._changed:
            self._answer_s, self._rest_s = answer_s, rest_s
            self._changed.notify_all()

    @contextlib.contextmanager
    def call(self, longest_s: float = 0.0) -> Iterator[None]:
        """What is done with the database within the block is bounded: by `longest_s`, if it is given.

        Raises:
            TimeoutError: the server did not answer some time ago, and has accepted no connection since.
        """
        call = object()
        with self._changed:
            if self._silent:
                raise TimeoutError(self._why())
            self._ends[call] = time.monotonic() + (longest_s or self._answer_s)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="database watch", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._changed:
                self._ends.pop(call, None)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _why(self) -> str:
        return f"it did not answer within {self._answer_s:g} s, and has not come back since"

    def _opening(self, dialect: sa.Dialect, _record: Any, positional: Sequence[Any], named: Mapping[str, Any]) -> Any:
        if self._silent:  # a call that was cut off must not wait for a new connection next
            raise dialect.loaded_dbapi.OperationalError(self._why())
        try:
            return connect(dialect, positional, named)
        except TimeoutError as error:
            with self._changed:
                self._silent = True
                self._changed.notify_all()
            raise dialect.loaded_dbapi.OperationalError(str(error)) from None

    def _opened(self, connection: Any, _record: Any) -> None:
        with self._changed:
            self._connections[id(connection)] = connection
        settings = ", ".join(f"set_config('{name}', '{value}', false)" for name, value in _SESSION.items())
        connection.execute(f"SELECT {settings}")
        connection.execute(_DURABLE)
        connection.commit()

    def _closing(self, connection: Any, _record: Any) -> None:
        with self._changed:  # not while its socket is being shut down: another file may get its number
            self._connections.pop(id(connection), None)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait(self._rest_s if self._silent else self._answer_s / 5)
                if self._closed:
                    return
                if not self._silent:
                    if min(self._ends.values(), default=float("inf")) > time.monotonic():
                        continue
                    self._silent = True
                    self._ends.clear()
                    for connection in self._connections.values():
                        self._cut(connection)
                    continue
            if self._accepts():
                with self._changed:
                    self._silent = False

    def _cut(self, connection: Any) -> None:
        with (
            contextlib.suppress(OSError, self._engine.dialect.loaded_dbapi.Error),
            socket.socket(fileno=os.dup(connection.fileno())) as end,
        ):
            end.shutdown(socket.SHUT_RDWR)

    def _accepts(self) -> bool:
        """Whether the server lets us in. It has to start a process and to look at the database for that."""
        dialect = self._engine.dialect
        positional, named = dialect.create_connect_args(self._engine.url)
        try:
            connect(dialect, positional, {**_CONNECT, **named}).close()
        except (OSError, dialect.loaded_dbapi.Error):
            return False
        return True
