"""Records of earlier versions are migrated, of later ones refused."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from coordinator.store.migrations import NEWEST, revision_of
from coordinator.store.tables import job, metadata
from fedepth.aggregation.privacy import spent_epsilon
from fedepth.errors import StateError
from fedepth.job import model_spec

# What version 0.1.0 made.
FIRST = """
CREATE TABLE job (id INTEGER NOT NULL, name TEXT NOT NULL, run_id TEXT NOT NULL, model TEXT NOT NULL,
    prepared TEXT NOT NULL, created_at FLOAT NOT NULL, PRIMARY KEY (id));
CREATE TABLE rounds (round INTEGER NOT NULL, digest TEXT NOT NULL, size_bytes BIGINT NOT NULL,
    closed_at FLOAT NOT NULL, devices INTEGER NOT NULL, samples BIGINT NOT NULL, accuracy FLOAT NOT NULL,
    loss FLOAT NOT NULL, export_path TEXT NOT NULL, parity_max_abs FLOAT NOT NULL, PRIMARY KEY (round));
CREATE TABLE devices (device_id TEXT NOT NULL, name TEXT NOT NULL, report TEXT NOT NULL, first_seen FLOAT NOT NULL,
    last_seen FLOAT NOT NULL, PRIMARY KEY (device_id));
CREATE TABLE tasks (task_id TEXT NOT NULL, round INTEGER NOT NULL, device_id TEXT NOT NULL, attempt INTEGER NOT NULL,
    status TEXT NOT NULL, plan TEXT NOT NULL, sample_count BIGINT NOT NULL, given_at FLOAT NOT NULL,
    PRIMARY KEY (task_id), UNIQUE (round, device_id));
CREATE INDEX ix_tasks_round ON tasks (round);
CREATE TABLE updates (task_id TEXT NOT NULL, round INTEGER NOT NULL, device_id TEXT NOT NULL, result TEXT NOT NULL,
    size_bytes BIGINT NOT NULL, received_at FLOAT NOT NULL, PRIMARY KEY (task_id), UNIQUE (round, device_id));
CREATE INDEX ix_updates_round ON updates (round);
CREATE TABLE failures (id INTEGER NOT NULL, task_id TEXT NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL,
    message TEXT NOT NULL, at FLOAT NOT NULL, PRIMARY KEY (id));
"""


def text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


@pytest.fixture
def first(plain: Any, kit: Any) -> Any:
    """The state of a job in round 2, as the first version left it."""
    for folder in ("weights", "spool", "model", "exports"):
        (plain.folder / folder).mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(plain.folder / "job.sqlite")) as record, record:
        record.executescript("PRAGMA journal_mode=WAL;" + FIRST)
        job = (1, "demo", "0123456789ab", text(model_spec(kit.config())), "", 1.5)
        record.execute("INSERT INTO job VALUES (?, ?, ?, ?, ?, ?)", job)
        for number, known in ((0, (-1.0, -1.0, "", -1.0)), (1, (0.75, 0.5, "/old/exports/demo-round-0001.onnx", 1e-7))):
            content = b"weights %d" % number
            (plain.folder / "weights" / f"round-{number:04d}.safetensors").write_bytes(content)
            values = (number, kit.sha256(content), len(content), 10.25, 2 * number, 40 * number, *known)
            record.execute(f"INSERT INTO rounds VALUES ({', '.join('?' * 10)})", values)
        record.execute("INSERT INTO devices VALUES ('a', 'board a', ?, 1.0, 2.0)", (text(kit.report("a")),))
        for number, device, status in ((1, "a", "accepted"), (2, "a", "given"), (2, "b", "lost")):
            task = plain.task(number, device)
            values = (task.task_id, number, device, 1, status, text(task.plan), 20, 3.0)
            record.execute("INSERT INTO tasks VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
        # The first version could record an update and hand the same task out again.
        for number in (1, 2):
            task = plain.task(number, "a")
            result = kit.result(task, {0: b"part"})
            values = (task.task_id, number, "a", text(result), 4, 4.0)
            record.execute("INSERT INTO updates VALUES (?, ?, ?, ?, ?, ?)", values)
        (plain.folder / "spool" / "t-0002-a-1").mkdir()
        (plain.folder / "spool" / "t-0002-a-1" / "part-0000.safetensors").write_bytes(b"part")
        for reason, message in (("late", "first"), ("shape", "only"), ("late", "second")):
            record.execute(
                "INSERT INTO failures (task_id, status, reason, message, at) VALUES ('t', 'refused', ?, ?, 5.0)",
                (reason, message),
            )
    return plain


def test_the_record_of_the_first_version_is_migrated(first: Any, kit: Any) -> None:
    store = first.open()
    assert store.run_id == "0123456789ab"
    zero, one = store.rounds()
    assert (zero.accuracy, zero.loss, zero.parity_max_abs, zero.export_path) == (None, None, None, "")
    assert (one.accuracy, one.loss, one.parity_max_abs) == (0.75, 0.5, 1e-7)
    assert (one.closed_at, one.devices, one.samples, one.published, one.kept) == (10.25, 2, 40, True, True)
    assert (one.epsilon, one.note, one.aside_digest, one.superseded) == (None, "", "", False)
    assert [store.weights_of(each).read_bytes() for each in (zero, one)] == [b"weights 0", b"weights 1"]
    assert sorted(path.name for path in (first.folder / "weights").iterdir()) == [
        f"round-{each.round:04d}-{each.digest[:12]}.safetensors" for each in (zero, one)
    ]
    assert [(each.task_id, each.status) for each in store.tasks_of(2)] == [
        ("t-0002-a", "accepted"),
        ("t-0002-b", "lost"),
    ]
    assert [each.round for each in store.updates()] == [1, 2]
    assert store.norms_of(2) == []
    assert store.device_names() == {"a": "board a"}
    late, shape = store.failures()
    assert (late.reason, late.times, late.message) == ("late", 2, "second")
    assert (shape.reason, shape.times) == ("shape", 1)
    first.add_round(store, 2)
    store.close()
    first.open().close()


def test_a_migration_that_breaks_off_changes_nothing(first: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from alembic.operations import Operations

    broken = iter([None] * 4)

    def fail(*arguments: Any, **named: Any) -> None:
        if next(broken, "end") == "end":
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Operations, "drop_table", fail)
        with pytest.raises(OSError, match="No space"):
            first.open()
    store = first.open()
    assert [each.accuracy for each in store.rounds()] == [None, 0.75]
    store.close()


def test_reading_the_first_version_says_how_to_migrate_it(first: Any) -> None:
    with pytest.raises(StateError, match=r"earlier version \(revision 0001, this program reads 0006\); start the"):
        first.read()
    first.open().close()
    first.read().close()


def test_damaged_weights_of_the_first_version_are_refused(first: Any) -> None:
    (first.folder / "weights" / "round-0001.safetensors").write_bytes(b"weights X")
    with pytest.raises(StateError, match="is damaged: its sha256"):
        first.open()


def test_a_later_revision_is_refused(place: Any) -> None:
    store = place.open()
    with store._database.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0999'"))
    store.close()
    for opened in (place.open, place.read, place.repair):
        with pytest.raises(StateError, match="has revision 0999, this program knows revisions up to 0006"):
            opened()


NOISY = {"privacy.noise_multiplier": 4.0, "privacy.clip_norm": 1.5, "privacy.delta": 1e-6}


@pytest.mark.parametrize(
    ("settings", "spent", "known", "said"),
    [
        ({}, [None, None], [0.0, 0.0], ""),
        (NOISY, [[4.0], [4.0, 4.0]], [4.0, 4.0], ""),
        ({}, [[4.0], [4.0, 4.0]], [None, None], "epsilon is not known: rounds 1 to 2 were closed with noise that"),
        # The settings are those of the last start; what was recorded tells whether they held before.
        (NOISY, [[2.0], [4.0, 4.0]], [None, 4.0], "epsilon is not known: round 1 was closed with noise that"),
        (NOISY, [None, [4.0, 4.0]], [0.0, 4.0], "not private: round 1 was closed without noise"),
    ],
)
def test_earlier_rounds_have_the_noise_that_their_record_tells(
    place: Any, settings: dict[str, float], spent: list[Any], known: list[Any], said: str
) -> None:
    store = place.open()
    for number, multipliers in enumerate([None, *spent]):
        epsilon = None if multipliers is None else spent_epsilon(multipliers, 1e-6)
        place.add_round(store, number, b"weights %d" % number, epsilon=epsilon)
    with store._database.begin() as connection:
        for name in ("noise_multiplier", "clip_norm", "delta"):
            connection.execute(sa.text(f"ALTER TABLE rounds DROP COLUMN {name}"))
        connection.execute(sa.text("ALTER TABLE job DROP COLUMN statistics"))
        connection.execute(job.update().values(settings=text(settings) if settings else ""))
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0004'"))
    store.close()
    store = place.open()
    assert store.noise_multipliers() == known
    assert [(each.clip_norm, each.delta) for each in store.rounds()[1:]] == [
        (1.5, 1e-6) if multiplier else (None, None) for multiplier in known
    ]
    assert store.not_private().startswith(said) and bool(said) == bool(store.not_private())
    store.close()


def test_a_database_of_something_else_is_refused(plain: Any) -> None:
    plain.folder.mkdir()
    with contextlib.closing(sqlite3.connect(plain.folder / "job.sqlite")) as other:
        other.execute("CREATE TABLE songs (title TEXT)")
    with pytest.raises(StateError, match="holds the tables songs, which are not a job's record"):
        plain.open()


def test_all_revisions_together_make_the_tables_of_the_program(place: Any) -> None:
    store = place.open()
    with store._database.begin() as connection:
        assert revision_of(connection, "here") == NEWEST
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    store.close()


def test_migrating_leaves_logging_alone(plain: Any) -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers), root.disabled)
    plain.open().close()
    assert (root.level, list(root.handlers), root.disabled) == before
    assert not logging.getLogger("coordinator").disabled


def test_the_revisions_are_packaged() -> None:
    import coordinator.store.migrations

    folder = Path(coordinator.store.migrations.__file__).parent
    assert [path.name for path in sorted((folder / "versions").glob("*.py"))] == [
        "revision_0001.py",
        "revision_0002.py",
        "revision_0003.py",
        "revision_0004.py",
        "revision_0005.py",
        "revision_0006.py",
    ]
