"""Record and files that do not fit together are refused, and nothing is overwritten or deleted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fedepth.errors import StateError


def contents(folder: Path) -> dict[str, bytes]:
    ours = ("job.sqlite", "lock")
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(ours))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture
def job(plain: Any) -> Any:
    """A job in its third round: a task is handed out, another has its update."""
    store = plain.open()
    for number in range(3):
        plain.add_round(store, number)
    plain.add_update(store, plain.task(3, "a"))
    store.record_task(plain.task(3, "b"))
    plain.part(store, plain.task(3, "b"))
    store.close()
    return plain


def refused(job: Any) -> str:
    before = contents(job.folder)
    with pytest.raises(StateError) as error:
        job.open()
    assert contents(job.folder) == before
    with pytest.raises(StateError):
        job.open()  # the lock is free again, the refusal stands
    return str(error.value)


def test_a_sound_state_is_served(job: Any) -> None:
    before = contents(job.folder)
    job.open().close()
    assert contents(job.folder) == before


@pytest.mark.parametrize("loss", ["missing", "emptied"])
def test_a_lost_record_is_not_begun_anew(job: Any, loss: str) -> None:
    (job.folder / "job.sqlite").unlink()
    if loss == "emptied":
        (job.folder / "job.sqlite").touch()
    message = refused(job)
    assert "weights of rounds 0, 1 and 2 that" in message
    assert "holds no round" in message
    assert "fedepth-coordinator backup" in message


def test_a_lost_record_beside_parts_alone_is_refused(job: Any) -> None:
    (job.folder / "job.sqlite").unlink()
    shutil.rmtree(job.folder / "weights")
    assert "parts of updates of 2 tasks" in refused(job)


def test_an_older_record_is_refused(job: Any, tmp_path: Path) -> None:
    shutil.copy(job.folder / "job.sqlite", tmp_path / "older.sqlite")
    store = job.open()
    job.add_round(store, 3)
    store.close()
    shutil.copy(tmp_path / "older.sqlite", job.folder / "job.sqlite")
    message = refused(job)
    assert "weights of round 3 that" in message
    assert "ends with round 2" in message


def test_a_record_without_its_log_is_refused(plain: Any, tmp_path: Path) -> None:
    """The updates of the open round stood in the log alone."""
    store = plain.open()
    plain.add_round(store, 0)
    plain.add_update(store, plain.task(1))
    shutil.copy(plain.folder / "job.sqlite", tmp_path / "alone.sqlite")  # the log is not copied
    store.close()
    shutil.copy(tmp_path / "alone.sqlite", plain.folder / "job.sqlite")
    assert "parts of updates of 1 tasks that" in refused(plain)


def test_a_record_that_is_damaged_is_refused(job: Any) -> None:
    path = job.folder / "job.sqlite"
    whole = path.read_bytes()
    for damaged, told in (
        (b"not a database at all, but long enough to be read as one", "is not a database"),
        (whole[: len(whole) // 2 // 4096 * 4096], "cut short"),
        (whole[:4096] + bytes(4096) + whole[8192:], "damaged|malformed|cannot be read"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(StateError, match=rf"job\.sqlite .*({told}).*fedepth-coordinator backup"):
            job.open()
        assert path.read_bytes() == damaged


def test_missing_parts_of_a_recorded_update_are_refused(job: Any) -> None:
    path = job.folder / "spool" / "t-0003-a-1" / "part-0000.safetensors"
    path.unlink()
    message = refused(job)
    assert f"{path} is not here with its 4 bytes" in message
    assert "rollback --round 2" in message
    store = job.repair()
    store.rollback(2)
    store.close()
    job.open().close()


def test_foreign_weights_are_refused_and_other_files_do_not_matter(job: Any) -> None:
    (job.folder / "weights" / "notes.txt").write_text("mine", encoding="ascii")
    job.open().close()
    (job.folder / "weights" / "round-0001-0123456789ab.safetensors").write_bytes(b"whose?")
    assert "round-0001-0123456789ab.safetensors is one of 1" in refused(job)


def test_what_was_being_written_goes(job: Any) -> None:
    (job.folder / "weights" / "round-0003.partial").write_bytes(b"half an aver")
    job.open().close()
    assert not (job.folder / "weights" / "round-0003.partial").exists()


def test_spools_of_past_rounds_go_at_the_start(job: Any) -> None:
    store = job.open()
    job.add_round(store, 3)
    store.close()  # a crash before the spools were dropped
    assert len(list((job.folder / "spool").iterdir())) == 2
    job.open().close()
    assert list((job.folder / "spool").iterdir()) == []
