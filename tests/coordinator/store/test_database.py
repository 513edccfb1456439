"""The database: durable commits, transactions, locks, and errors that name it without its password."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
import structlog

from coordinator.store import postgres
from coordinator.store.database import Database, open_engine
from coordinator.store.tables import job
from fedepth.errors import StateError, UnavailableError


def test_commits_are_synchronous_and_in_wal_mode(tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "job.sqlite")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
    engine.dispose()


def test_a_transaction_that_raises_leaves_nothing(place: Any) -> None:
    store = place.open()
    with pytest.raises(ZeroDivisionError), store._database.begin() as connection:
        connection.execute(job.update().values(name="half"))
        raise ZeroDivisionError
    assert store.job_name == "demo"
    store.close()


def test_tables_are_changed_in_transactions(place: Any) -> None:
    store = place.open()
    with pytest.raises(ZeroDivisionError), store._database.begin() as connection:
        connection.execute(sa.text("CREATE TABLE half (id INTEGER)"))
        raise ZeroDivisionError
    with store._database.begin() as connection:
        assert "half" not in sa.inspect(connection).get_table_names()
    store.close()


def test_a_full_disk_is_told_and_nothing_is_recorded(plain: Any, kit: Any) -> None:
    store = plain.open()
    plain.add_round(store, 0)

    def limit(pages: int) -> None:
        with store._database.begin() as connection:
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")

    limit(1)  # SQLite raises it to what is in use
    with pytest.raises(UnavailableError, match=r"job\.sqlite cannot be used now: database or disk is full"):
        for number in range(100):
            store.see_device(kit.report(f"device-{number}"))
    held = len(store.device_names())
    limit(1 << 30)
    assert store.see_device(kit.report("another"))
    assert len(store.device_names()) == held + 1
    store.close()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("mysql://user:secret@host/db", "--database mysql: is not supported"),
        ("sqlite:///job.sqlite", "--database sqlite: is not supported"),
        ("user:secret@host", "--database is not a URL"),
        ("postgresql://user:secret@[::1/db", "--database is not a URL"),
        ("postgresql://user:secret@host:x/db", "--database is not a URL"),
        ("postgresql://user:secret@127.0.0.1:1/db?password=secret", r"postgresql://127\.0\.0\.1/db cannot be used now"),
    ],
)
def test_a_database_that_cannot_be_used_is_told_without_its_password(tmp_path: Path, url: str, told: str) -> None:
    with pytest.raises(StateError, match=told) as refused:
        database = Database(tmp_path, url)
        try:
            database.open()
        finally:
            database.close()
    assert "secret" not in str(refused.value)


def test_the_lookup_of_a_name_that_hangs_is_told_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end, asked = threading.Event(), []

    def hanging(host: str, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        end.wait(60)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    monkeypatch.setattr(postgres, "CONNECT_S", 0.1)
    database = Database(tmp_path, "postgresql://user:secret@db.example/jobs")
    try:
        with pytest.raises(UnavailableError, match=r"could not connect to db\.example within 0\.1 s") as told:
            database.open()
        assert "secret" not in str(told.value) and "`getent hosts db.example`" in str(told.value)
        with pytest.raises(UnavailableError, match="has not come back since"):  # the next one does not wait for it
            database.open()
        assert asked == ["db.example"]
    finally:
        end.set()
        database.close()


def test_two_coordinators_cannot_share_a_database(postgres: Any, plain: Any, tmp_path: Path) -> None:
    plain.database = postgres.new_database()
    store = plain.open()
    plain.folder = tmp_path / "another state"
    with pytest.raises(StateError, match=r"postgresql:///test_\w+ is in use by another coordinator"):
        plain.open()
    store.close()
    plain.open().close()


def end_connections(database: Database) -> None:
    """What a restart of the server does to those who use it."""
    engine = sa.create_engine(database._engine.url)
    with engine.begin() as connection:
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        connection.execute(sa.text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"))
    engine.dispose()


def test_a_server_that_restarts_does_not_end_the_job_or_its_lock(postgres: Any, plain: Any, tmp_path: Path) -> None:
    plain.database = postgres.new_database()
    store = plain.open()
    end_connections(store._database)
    store.count_refusal("late", "after the restart", "t")
    assert store.failure_counts() == {"refused/late": 1}
    plain.folder = tmp_path / "another state"
    with pytest.raises(StateError, match="is in use by another coordinator"):
        plain.open()
    store.close()


@pytest.mark.parametrize("stays", [True, False])
@pytest.mark.parametrize("look", ["check_hold", "write"])
def test_one_that_lost_its_lock_to_another_writes_no_more(
    postgres: Any, plain: Any, tmp_path: Path, stays: bool, look: str
) -> None:
    plain.database = postgres.new_database()
    store = plain.open()
    end_connections(store._database)
    plain.folder = tmp_path / "another state"
    other = plain.open()
    if not stays:
        other.close()
    for _ in range(2):
        with pytest.raises(StateError, match=r"changed by another program while .*; start the coordinator again") as no:
            store.check_hold() if look == "check_hold" else store.count_refusal(
                "late", "by one that lost its place", "t"
            )
        assert not isinstance(no.value, UnavailableError)
    assert other.failure_counts() == {}
    other.close()
    store.close()


@pytest.mark.parametrize(("usual", "ours"), [("off", "on"), ("local", "on"), ("remote_apply", "remote_apply")])
def test_commits_are_synchronous_whatever_is_usual_on_the_server(
    postgres: Any, plain: Any, usual: str, ours: str
) -> None:
    """Else a device may be told that its update is recorded, and it is gone after a crash of the server."""
    plain.database = postgres.new_database()
    postgres.execute(f"ALTER DATABASE {sa.make_url(plain.database).database} SET synchronous_commit = {usual}")
    store = plain.open()
    with store._database.begin() as connection:
        assert connection.execute(sa.text("SHOW synchronous_commit")).scalar() == ours
    store.close()


def test_a_server_that_syncs_nothing_is_told(postgres: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain.database = postgres.new_database()
    real = sa.text
    monkeypatch.setattr(sa, "text", lambda query: real("SELECT 'off'" if query == "SHOW fsync" else query))
    with structlog.testing.capture_logs() as told:
        plain.open().close()
    assert [each["log_level"] for each in told if "runs with fsync = off" in each["event"]] == ["warning"]


@contextlib.contextmanager
def stalling(postgres: Any) -> Iterator[None]:
    """A server that waits at the end of every transaction that writes, as for a standby that is gone."""
    postgres.execute("ALTER SYSTEM SET synchronous_standby_names = 'gone'")
    postgres.execute("SELECT pg_reload_conf()")
    while postgres.execute("SHOW synchronous_standby_names") != "gone":
        pass
    try:
        yield
    finally:
        postgres.execute("ALTER SYSTEM RESET synchronous_standby_names")
        postgres.execute("SELECT pg_reload_conf()")


def until(look: Callable[[], object]) -> None:
    """Looks again until the record can be used and what is looked for is so."""
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(UnavailableError):
            if look() is not False:
                return
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_was_given_up_and_may_still_come_is_waited_for(postgres: Any, plain: Any, kit: Any) -> None:
    """Until its server has ended a transaction, nobody sees what it has written; read past it, the record would say
    that there is no update, and have one a moment later."""
    plain.database = postgres.new_database()
    store = plain.open()
    plain.add_round(store, 0)
    task = plain.task()
    store.record_task(task)
    plain.part(store, task)
    result = kit.result(task, {0: b"part"})
    store.keep_parts(result)
    store._database._watch.set_limits(1.0, 0.1)
    with stalling(postgres):
        with pytest.raises(UnavailableError):
            store.record_update(result, None)
        until(lambda: store.accepted_ids(1) == frozenset())  # the record answers again
        with pytest.raises(UnavailableError):
            store.check_hold()
    until(store.check_hold)
    assert set(store.accepted_ids(1)) == {task.task_id}
    store.close()


def test_a_lock_that_an_old_connection_holds_is_taken_back(postgres: Any, plain: Any) -> None:
    """The server may notice later than we that a connection is gone."""
    plain.database = postgres.new_database()
    store = plain.open()
    database = store._database
    kept, database._lock = database._lock, None
    with pytest.raises(UnavailableError, match="still holds the job's lock"):
        store.check_hold()
    while True:
        try:
            store.check_hold()
            break
        except UnavailableError:
            continue
    kept.invalidate()
    kept.close()
    store.close()


def test_a_server_that_cannot_be_reached_for_several_calls_is_told_each_time(
    postgres: Any, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain.database = postgres.new_database()
    store = plain.open()
    dialect = store._database._engine.dialect

    def refuse(*_arguments: Any, **_named: Any) -> None:
        raise psycopg.OperationalError("connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(dialect, "connect", refuse)
        end_connections(store._database)
        for _ in range(3):
            with pytest.raises(UnavailableError, match="cannot be used now: "):
                store.count_refusal("late", "during the outage", "t")
    store.count_refusal("late", "after it", "t")
    assert store.failure_counts() == {"refused/late": 1}
    store.close()


@pytest.mark.parametrize(
    ("state", "passes", "told"),
    [
        ("08006", True, "see that the database runs"),
        ("53100", True, "see that the database runs"),
        ("57P03", True, "see that the database runs"),
        ("57014", True, "see that the database runs"),
        ("25006", True, "see that the database runs"),
        ("40001", True, "see that the database runs"),
        ("40P01", True, "see that the database runs"),
        ("55P03", True, "see that the database runs"),
        ("42501", False, r"\(SQLSTATE 42501\); grant the user"),
        ("42P01", False, "see that nobody changed the job's tables"),
        ("XX001", False, "restore a backup"),
        ("22003", False, "see that nothing else writes"),
    ],
)
def test_what_passes_is_told_from_what_does_not(postgres: Any, plain: Any, state: str, passes: bool, told: str) -> None:
    plain.database = postgres.new_database()
    store = plain.open()
    raising = sa.text(f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END $$")
    with pytest.raises(StateError, match=told) as refused:
        store._database.write(raising)
    assert isinstance(refused.value, UnavailableError) == passes
    store.close()


class DeafServer:
    """Stands between a program and its server, and at times lets nothing through, without closing anything."""

    def __init__(self, folder: Path, target: Path) -> None:
        self.path, self._target = folder / ".s.PGSQL.5432", target / ".s.PGSQL.5432"
        self.hears = threading.Event()
        self.hears.set()
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(self.path))
        self._listening.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                one, _ = self._listening.accept()
            except OSError:
                return
            other = socket.socket(socket.AF_UNIX)
            other.connect(str(self._target))
            for source, sink in ((one, other), (other, one)):
                threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError), source:
            while data := source.recv(65536):
                self.hears.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.hears.set()
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()


def test_a_server_that_does_not_answer_is_left_alone_until_it_does(postgres: Any, plain: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = DeafServer(Path(folder), postgres.socket_folder)
        url = postgres.new_database()
        plain.database = f"{url.split('?')[0]}?host={folder}"
        store = plain.open()
        store.answer_promptly()
        watch = store._database._watch
        assert watch is not None
        server.hears.clear()
        watch.set_limits(0.1)
        with pytest.raises(UnavailableError, match="cannot be used now"):  # and does not wait for ever
            store.count_refusal("late", "not heard", "t")
        for look in (store.check_hold, store.failure_counts):
            with pytest.raises(UnavailableError, match=r"did not answer within 0\.1 s, and has not come back since"):
                look()
        server.hears.set()
        while True:
            watch.set_limits(5.0)  # and ends its rest
            try:
                store.count_refusal("late", "heard", "t")
                break
            except UnavailableError:
                continue
        assert store.failure_counts() == {"refused/late": 1}
        store.close()
        server.close()


def test_a_record_that_is_cut_short_is_refused_wherever_it_is_cut(plain: Any) -> None:
    store = plain.open()
    for device in "abcdef":
        store.record_task(plain.task(1, device))
    store.close()
    path = plain.folder / "job.sqlite"
    whole = path.read_bytes()
    for size in (1, 99, 100, 4095, 4096, len(whole) // 2, len(whole) - 4096, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(StateError, match="cut short"):
            plain.open()
        assert path.read_bytes() == whole[:size]
    path.write_bytes(whole)
    plain.open().close()
