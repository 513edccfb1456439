"""A backup can be served alone, and is consistent though the job goes on meanwhile."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.store import backup
from fedepth.errors import DiskError, StateError
from fedepth.job import training_spec


def begun(place: Any) -> Any:
    """The open store of a job after round 2, with one update and one task of round 3."""
    store = place.open()
    store.files.graph().write_bytes(place.kit.graph)
    graph = (place.kit.sha256(place.kit.graph), len(place.kit.graph))
    store.record_prepared(backup.Prepared(place.kit.layout, training_spec(place.kit.config(), 1), *graph))
    for number in range(3):
        place.add_round(store, number, accuracy=0.5 + number / 10)
    place.add_update(store, place.task(3, "a"), b"an update")
    store.record_task(place.task(3, "b"))
    return store


def full_for_the_record(patch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect

    def small(path: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(path, **options)
        if "unfinished" in str(path):
            connection.execute("PRAGMA max_page_count = 2").close()
        return connection

    patch.setattr("sqlite3.connect", small)


def full_for_a_file(patch: pytest.MonkeyPatch) -> None:
    def copyfile(source: Path, target: Path) -> None:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        error.filename2 = str(target)  # as shutil tells it
        raise error

    patch.setattr("shutil.copyfile", copyfile)


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("full", [full_for_the_record, full_for_a_file])
def test_a_full_disk_is_told_where_it_is_and_leaves_nothing(
    full: Callable[[pytest.MonkeyPatch], None], exists: bool, plain: Any, tmp_path: Path
) -> None:
    target = tmp_path / "copies" / "today"
    if exists:
        target.mkdir(parents=True)
    store = begun(plain)
    with pytest.MonkeyPatch.context() as patch:
        full(patch)
        with pytest.raises(DiskError, match=rf"the backup cannot be written: {target}/.*: No space left on device; fr"):
            store.backup(target)
    assert target.exists() == exists
    assert store.backup(target).round == 2
    store.close()


@pytest.mark.parametrize("kind", ["sqlite", "bucket"])
def test_a_backup_can_be_served_alone(kind: str, plain: Any, request: Any, tmp_path: Path) -> None:
    if kind == "bucket":
        plain.files = request.getfixturevalue("new_bucket")()
    store = begun(plain)
    reader = plain.read()
    made = reader.backup(tmp_path / "copies" / "today")
    reader.close()
    assert (made.job, made.round, made.updates, made.has_record) == ("demo", 2, 1, True)
    assert made.size_bytes == len(b"weights 2") + len(b"an update") + len(plain.kit.graph)
    run_id, prepared = store.run_id, store.prepared()
    plain.add_round(store, 3)  # the original goes on
    store.close()

    copied = replace(plain, folder=tmp_path / "copies" / "today", files="").open()
    assert copied.run_id != run_id
    assert copied.prepared() == prepared
    assert copied.weights_of(copied.latest_round()).read_bytes() == b"weights 2"
    assert [each.accuracy for each in copied.rounds()] == [0.5, 0.6, 0.7]
    assert [each.round for each in copied.kept_rounds()] == [2]
    assert [(each.task_id, each.status) for each in copied.tasks_of(3)] == [
        ("t-0003-a", "accepted"),
        ("t-0003-b", "given"),
    ]
    (update,) = copied.updates_of(3)
    assert plain.parts(copied, update) == [b"an update"]
    copied.close()
    assert sorted(path.name for path in (tmp_path / "copies" / "today").iterdir()) == [
        "exports",
        "job.sqlite",
        "lock",
        "model",
        "spool",
        "weights",
    ]


def test_a_backup_of_an_unpublished_round_and_of_an_intent(plain: Any, tmp_path: Path) -> None:
    store = begun(plain)
    plain.refuse_round(store, 3, b"worse")
    store.seal_weights(plain.partial(b"four"), 4)
    store.backup(tmp_path / "copy")
    store.close()
    copied = replace(plain, folder=tmp_path / "copy").open()
    assert (copied.latest_round().round, copied.latest_round().published) == (3, False)
    assert copied.weights_of(copied.latest_round()).read_bytes() == b"weights 2"
    plain.folder = tmp_path / "copy"
    plain.add_round(copied, 4, b"another four")
    copied.close()


def test_a_target_in_use_is_refused(plain: Any, tmp_path: Path) -> None:
    store = begun(plain)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").touch()
    for target in ("state", "state/copies/one", "weights"):
        (tmp_path / "weights").exists() or (tmp_path / "weights").symlink_to(plain.folder / "weights")
        with pytest.raises(StateError, match=r"lies in \S+state, which it is to be a copy of; name a folder elsewhere"):
            store.backup(tmp_path / target)
    for target in ("full", "file"):
        with pytest.raises(StateError, match=f"{target} exists and is not an empty folder"):
            store.backup(tmp_path / target)
    (tmp_path / "empty").mkdir()
    assert store.backup(tmp_path / "empty").round == 2
    store.close()


def test_the_copy_begins_again_when_a_round_closes_meanwhile(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = begun(plain)
    copy_file = backup._copy_file
    closed = []

    def slow(files: Any, name: str, digest: str, target: Path) -> None:
        if not closed:
            closed.append(plain.add_round(store, 3, b"three"))
            store.drop_spools_before(4)
        copy_file(files, name, digest, target)

    monkeypatch.setattr(backup, "_copy_file", slow)
    made = store.backup(tmp_path / "copy")
    assert (made.round, made.updates) == (3, 0)
    store.close()
    copied = replace(plain, folder=tmp_path / "copy").open()
    assert copied.weights_of(copied.latest_round()).read_bytes() == b"three"
    copied.close()


def test_a_damaged_state_is_not_copied(plain: Any, tmp_path: Path) -> None:
    store = begun(plain)
    store.files.weights(2, plain.kit.sha256(b"weights 2")).write_bytes(b"weights X")
    with pytest.raises(StateError, match=r"is damaged.*the same happened 5 times"):
        store.backup(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    store.close()


def test_a_backup_that_broke_off_is_not_served(plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = begun(plain)

    def end(record: Any, held: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(backup, "_forget_others", end)
    with pytest.raises(KeyboardInterrupt):
        store.backup(tmp_path / "interrupted")
    assert not (tmp_path / "interrupted").exists()
    monkeypatch.setattr(backup, "_clear", lambda *_: None)  # a kill cleans nothing up
    with pytest.raises(KeyboardInterrupt):
        store.backup(tmp_path / "copy")
    store.close()
    with pytest.raises(StateError, match="holds no round"):
        replace(plain, folder=tmp_path / "copy").open()


def test_with_postgres_the_record_is_left_to_its_own_tools(plain: Any, postgres: Any, tmp_path: Path) -> None:
    plain.database = postgres.new_database()
    store = begun(plain)
    made = store.backup(tmp_path / "copy")
    assert not made.has_record
    assert sorted(path.name for path in (tmp_path / "copy" / "weights").iterdir()) == [
        f"round-0002-{plain.kit.sha256(b'weights 2')[:12]}.safetensors"
    ]
    store.close()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from coordinator.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_commands(plain: Any, tmp_path: Path) -> None:
    store = begun(plain)
    state, copy = str(plain.folder), str(tmp_path / "copy")
    told = run("backup", "--state", state, "--output", copy)
    assert told.returncode == 0, told.stderr
    assert f"{copy}: job demo after round 2, 1 updates of the next, files of " in told.stdout
    assert f"serve --state {copy}" in told.stdout
    busy = run("rollback", "--state", state, "--round", "1")
    assert busy.returncode == 1
    assert "is in use by another coordinator (process " in busy.stderr
    store.close()
    assert "round 1 is the last one again" in run("rollback", "--state", state, "--round", "1").stdout
    wrong = run("rollback", "--state", state, "--round", "7")
    assert wrong.returncode == 1
    assert "there is no round 7; " in wrong.stderr
    assert wrong.stderr.strip().endswith("has the weights of rounds 0 and 1")
