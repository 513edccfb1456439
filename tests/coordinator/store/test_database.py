"""The database: durable commits, transactions, locks, and errors that name it without its password."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

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
    # Another coordinator was faster: this one must not write any more.
    end_connections(store._database)
    other = plain.open()
    with pytest.raises(StateError, match="is in use by another coordinator"):
        store.count_refusal("late", "by one that lost its place", "t")
    assert other.failure_counts() == {"refused/late": 1}
    other.close()
    store.close()


def test_a_server_that_stays_away_for_some_tries_does_not_end_the_job(
    postgres: Any, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(engine: sa.Engine) -> sa.Connection:
        raise sa.exc.OperationalError("", {}, ConnectionError("the server is not there"))

    plain.database = postgres.new_database()
    store = plain.open()
    end_connections(store._database)
    with monkeypatch.context() as patch:
        patch.setattr(sa.Engine, "connect", connect)
        for _ in range(3):
            with pytest.raises(UnavailableError, match="the server is not there"):
                store.count_refusal("late", "while it was away", "t")
    store.count_refusal("late", "after that", "t")
    assert store.failure_counts() == {"refused/late": 1}
    with pytest.raises(StateError, match="is in use by another coordinator"):
        plain.folder = plain.folder.with_name("another state")
        plain.open()
    store.close()


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
