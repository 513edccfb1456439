"""Whatever step of the disk fails, once or for a while, no trained update is lost."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from edge_client import outbox
from edge_client.outbox import KEPT_ASIDE, READ_TRIES, Outbox
from fedepth.errors import DiskError, StateError
from fedepth.task import Result
from tests.edge_client.faults import Disk

Maker = Callable[..., tuple[Result, Path]]
MIB = 1 << 20


def waiting(state: Path) -> list[str]:
    return [entry.result.task_id for entry in Outbox(state).entries()]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("times", [1, 2, 5])
def test_storing_is_tried_again_until_it_succeeds(
    tmp_path: Path, make_result: Maker, monkeypatch: pytest.MonkeyPatch, code: int, times: int
) -> None:
    met = set()
    for step in count(1):
        state = tmp_path / f"state-{step}"
        result, parts = make_result(f"t{step}", b"one", b"two")
        disk = Disk(tmp_path, fails_from=step, times=times, code=code)
        box = Outbox(state)
        with monkeypatch.context() as patch:
            disk.install(patch)
            for _ in range(times + 1):
                try:
                    box.put(result, parts)
                    break
                except DiskError as error:
                    assert os.strerror(code) in str(error)
            entries = box.entries()
        assert [entry.result for entry in entries] == [result]
        (entry,) = Outbox(state).entries()  # nor does the next agent miss anything
        assert [entry.part_path(part).read_bytes() for part in result.parts] == [b"one", b"two"]
        if not disk.failed:
            break
        met.add(disk.names[step - 1])
    assert met >= {"write", "fsync", "replace", "rename"}


@pytest.mark.parametrize("times", [1, 2, 5])
def test_what_is_delivered_is_not_sent_again_while_it_cannot_be_deleted(
    tmp_path: Path, make_result: Maker, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    for step in count(1):
        state = tmp_path / f"state-{step}"
        box = Outbox(state)
        entry = box.put(*make_result(f"t{step}", b"one"))
        disk = Disk(state, fails_from=step, times=times, code=errno.EIO)
        with monkeypatch.context() as patch:
            disk.install(patch)
            box.remove(entry)
            assert box.entries() == []
            assert box.find(entry.result.task_id, "") is None
            for _ in range(times):
                box.entries()
        box.entries()
        assert list((state / "outbox").iterdir()) == []
        if not disk.failed:
            break
    assert step > 3


class PowerCut(BaseException):
    """Nothing catches it, as nothing catches a power cut."""


def test_a_crash_at_any_step_after_the_seal_is_recovered(
    tmp_path: Path, make_result: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(at: int) -> Callable[[int], None]:
        def on_step(number: int) -> None:
            if number == at:
                raise PowerCut

        return on_step

    found = []
    for step in count(1):
        state = tmp_path / f"state-{step}"
        result, parts = make_result(f"t{step}", b"one", b"two")
        disk = Disk(tmp_path, on_step=cut(step))
        box = Outbox(state)
        with monkeypatch.context() as patch:
            disk.install(patch)
            try:
                box.put(result, parts)
                break
            except PowerCut:
                pass
        after = Outbox(state)
        after.recover(parts)
        found.append(len(after.entries()))
        assert not found[-1] or not parts.exists()
    # Write, sync and name the seal: three steps until there is something to recover.
    assert found == [0, 0, 0] + [1] * (len(found) - 3) and len(found) >= 6


def test_a_full_disk_has_room_for_the_seal_in_its_reserve(
    tmp_path: Path, make_result: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Outbox(tmp_path)
    box.check_room(MIB)
    reserve = tmp_path / "outbox" / ".reserve"
    assert reserve.stat().st_size == outbox.RESERVE_BYTES
    result, parts = make_result("t1", b"one")
    real = outbox.write_atomically

    def full(path: Path, data: bytes) -> None:
        if reserve.exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, data)

    monkeypatch.setattr(outbox, "write_atomically", full)
    box.put(result, parts)
    assert waiting(tmp_path) == ["t1"]
    assert not reserve.exists()


@pytest.mark.parametrize(
    ("disk", "says"),
    [
        ({"f_bavail": 63 << 8}, r"has 63\.0 MiB free, but a task may take 64\.0 MiB; free some space"),
        ({"f_favail": 3}, "has room for 3 more files"),
        ({"f_flag": os.ST_RDONLY}, "Read-only file system"),
    ],
)
def test_where_nothing_could_be_stored_is_found_out_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: dict[str, int], says: str
) -> None:
    box = Outbox(tmp_path)
    fields = {"f_bavail": 64 << 8, "f_frsize": 4096, "f_files": 10**6, "f_favail": 10**5, "f_flag": 0}
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(**fields | disk))
    with pytest.raises(DiskError, match=says):
        box.check_room(64 * MIB)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(**fields | {"f_files": 0, "f_favail": 0}))
    box.check_room(64 * MIB)  # Btrfs has no bound on files, and says 0 of 0


def test_a_quota_is_found_out_by_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Outbox(tmp_path)
    with monkeypatch.context() as patch:
        Disk(tmp_path, fails_from=1, times=99, code=errno.EDQUOT).install(patch)
        with pytest.raises(DiskError, match=r"nothing could be stored: .*quota exceeded"):
            box.check_room(MIB)
    box.check_room(MIB)
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path)
        disk.install(patch)
        box.check_room(MIB)
    assert disk.names == ["mkdir"]  # of a folder that is there: a look wears no memory card


def unreadable(path: Path, *, follow: bool = True) -> str:
    raise OSError(errno.EIO, "Input/output error", str(path))


def test_what_cannot_be_read_now_is_not_damaged_yet(
    tmp_path: Path, make_result: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    Outbox(tmp_path).put(*make_result("t1", b"one"))
    box = Outbox(tmp_path)
    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(outbox, "file_digest", unreadable)
        for _ in range(READ_TRIES - 1):
            assert box.entries() == []
    assert [line["tries"] for line in logs] == [1, 2]
    assert len(box.entries()) == 1
    box = Outbox(tmp_path)
    with monkeypatch.context() as patch, capture_logs():
        patch.setattr(outbox, "file_digest", unreadable)
        for _ in range(READ_TRIES):
            assert box.entries() == []
    assert [path.name for path in (tmp_path / "damaged").iterdir()] == ["t1-1.0"]


def test_a_damaged_update_that_cannot_be_moved_holds_up_no_other(
    tmp_path: Path, make_result: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for task_id in ("t1", "t2"):
        Outbox(tmp_path).put(*make_result(task_id, b"one"))
    (tmp_path / "outbox/t1-1/entry.json").write_bytes(b"{")
    box = Outbox(tmp_path)
    with monkeypatch.context() as patch, capture_logs() as logs:
        Disk(tmp_path, fails_from=1, times=99, code=errno.EROFS).install(patch)
        for _ in range(5):
            assert [entry.result.task_id for entry in box.entries()] == ["t2"]
    assert [line["event"] for line in logs] == ["a kept update is damaged and cannot be moved"]  # once
    assert len(box.entries()) == 1
    assert (tmp_path / "damaged/t1-1.0").exists()


def test_only_the_last_of_what_is_moved_aside_stays(tmp_path: Path, make_result: Maker) -> None:
    box = Outbox(tmp_path)
    with capture_logs():
        for number in range(KEPT_ASIDE + 3):
            entry = box.put(*make_result(f"t{number}", b"x"))
            box.set_aside(entry, "INVALID_ARGUMENT: no")
        for number in range(KEPT_ASIDE + 2):
            entry = box.put(*make_result(f"d{number}", b"x"))
            (entry.folder / "entry.json").unlink()
            box.entries()
    kept = sorted(path.name for path in (tmp_path / "undelivered").iterdir())
    assert kept == [f"t{number}-1.{number}" for number in range(3, KEPT_ASIDE + 3)]
    assert len(list((tmp_path / "damaged").iterdir())) == KEPT_ASIDE
    assert (box._verified, box._unread, box._acknowledged, box._stuck) == (set(), {}, set(), set())


def test_what_is_moved_aside_is_told_before_what_is_deleted_for_it(tmp_path: Path, make_result: Maker) -> None:
    box = Outbox(tmp_path)
    for number in range(KEPT_ASIDE + 1):
        entry = box.put(*make_result(f"d{number}", b"x"))
        (entry.folder / "entry.json").unlink()
        with capture_logs() as logs:
            box.entries()
    moved, deleted = logs
    assert moved["moved_to"] == str(tmp_path / "damaged" / f"d{KEPT_ASIDE}-1.{KEPT_ASIDE}")
    assert deleted["event"] == "the oldest update that was moved aside before is deleted"
    assert deleted["message"].startswith(f"{tmp_path / 'damaged' / 'd0-1.0'} is deleted: of the updates in")


def test_what_was_set_aside_is_found_when_its_task_comes_again(tmp_path: Path, make_result: Maker) -> None:
    box = Outbox(tmp_path)
    result, parts = make_result("t-1", b"x")
    where = box.set_aside(box.put(result, parts), "no")
    assert (where.name, waiting(tmp_path)) == ("t-1-1.0", [])
    assert box.find("t", "w") is None
    found = box.find("t-1", "w")  # what does not say its weights is taken at its task's id
    assert found is not None and found.result == result
    assert waiting(tmp_path) == ["t-1"]
    assert not where.exists()


@pytest.mark.parametrize("aside", [False, True])
def test_an_update_from_other_weights_answers_no_task_of_the_same_id(
    tmp_path: Path, make_result: Maker, aside: bool
) -> None:
    box = Outbox(tmp_path)
    result, parts = make_result("t-1", b"x")
    entry = box.put(replace(result, weights_digest="a" * 64), parts)
    if aside:
        box.set_aside(entry, "no")
    assert box.find("t-1", "b" * 64) is None
    assert waiting(tmp_path) == []
    (kept,) = (tmp_path / "undelivered").iterdir()
    found = box.find("t-1", "a" * 64)
    assert found is not None and found.result.weights_digest == "a" * 64
    assert not kept.exists()


def test_an_update_takes_the_place_of_one_from_other_weights(tmp_path: Path, make_result: Maker) -> None:
    box = Outbox(tmp_path)
    result, parts = make_result("t-1", b"x")
    box.put(replace(result, weights_digest="a" * 64), parts)
    parts.rename(tmp_path / "gone") if parts.exists() else None
    again, parts = make_result("t-1", b"y")
    kept = box.put(replace(again, weights_digest="b" * 64), parts)
    assert kept.result.weights_digest == "b" * 64
    assert [path.name for path in (tmp_path / "undelivered").iterdir()] == ["t-1-1.0"]


def test_an_outbox_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "outbox").touch()
    with pytest.raises(StateError, match=r"no outbox can be made: .*/outbox: File exists"):
        Outbox(tmp_path)


def test_leftovers_of_an_earlier_version_are_deleted(tmp_path: Path, make_result: Maker) -> None:
    Outbox(tmp_path).put(*make_result("t1", b"x"))
    shutil.copytree(tmp_path / "outbox/t1-1", tmp_path / "outbox/.new-t2-1")
    assert waiting(tmp_path) == ["t1"]
    assert [path.name for path in (tmp_path / "outbox").iterdir()] == ["t1-1"]
