import errno
import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from edge_client.outbox import Outbox
from fedepth.errors import StateError
from fedepth.task import Result

Maker = Callable[..., tuple[Result, Path]]


def waiting(state: Path) -> list[str]:
    return [entry.result.task_id for entry in Outbox(state).entries()]


def test_an_update_survives_a_restart_until_it_is_removed(tmp_path: Path, make_result: Maker) -> None:
    result, parts = make_result("t1", b"one", b"two")
    Outbox(tmp_path).put(result, parts)
    (entry,) = Outbox(tmp_path).entries()
    assert entry.result == result
    assert [entry.part_path(part).read_bytes() for part in result.parts] == [b"one", b"two"]
    Outbox(tmp_path).remove(entry)
    assert waiting(tmp_path) == []
    assert list((tmp_path / "outbox").iterdir()) == []


def test_order_is_that_of_putting_whatever_the_clock_and_the_names_say(tmp_path: Path, make_result: Maker) -> None:
    for task_id in ("zz", "aa", "mm"):
        Outbox(tmp_path).put(*make_result(task_id, b"x"))
        os.utime(tmp_path / "outbox" / f"{task_id}-1" / "entry.json", (0, 0))
    assert waiting(tmp_path) == ["zz", "aa", "mm"]


def test_the_first_update_of_an_attempt_stays(tmp_path: Path, make_result: Maker) -> None:
    result, parts = make_result("t1", b"one")
    Outbox(tmp_path).put(result, parts)
    other, parts = make_result("t1", b"other")
    assert Outbox(tmp_path).put(other, parts).result == result
    assert (tmp_path / "outbox/t1-1/part-0000.safetensors").read_bytes() == b"one"


class PowerCut(BaseException):
    """Nothing catches it, as nothing catches a power cut."""


def cut_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Lets the power go at the given step of whatever changes names or syncs."""
    left = step

    def cut(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                raise PowerCut
            return real(*args, **kwargs)

        return call

    for name in ("rename", "replace", "mkdir"):
        patch.setattr(Path, name, cut(getattr(Path, name)))
    patch.setattr(os, "fsync", cut(os.fsync))
    patch.setattr(shutil, "rmtree", cut(shutil.rmtree))


def test_a_power_cut_at_any_step_leaves_all_of_an_update_or_nothing(
    tmp_path: Path, make_result: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for step in count(1):
        state = tmp_path / f"state-{step}"
        Outbox(state).put(*make_result(f"before-{step}", b"kept"))
        result, parts = make_result(f"t-{step}", b"one", b"two")
        box = Outbox(state)
        with monkeypatch.context() as patch:
            cut_at(step, patch)
            try:
                box.remove(box.put(result, parts))
            except PowerCut:
                cut = True
            else:
                cut = False
        with capture_logs() as logs:
            entries = Outbox(state).entries()
        assert logs == []  # what a cut leaves is never damaged
        assert entries[0].result.task_id == f"before-{step}"
        for entry in entries[1:]:
            assert [entry.part_path(part).read_bytes() for part in result.parts] == [b"one", b"two"]
        seen.append(len(entries))
        if not cut:
            break
    # Nothing of it, then all of it, then nothing again: each for at least one step.
    assert [n for n, before in zip(seen, [0, *seen], strict=False) if n != before] == [1, 2, 1]


@pytest.mark.parametrize("damage", ["part", "missing part", "json", "no json", "other name"])
def test_a_damaged_update_is_moved_aside_with_an_error(tmp_path: Path, make_result: Maker, damage: str) -> None:
    Outbox(tmp_path).put(*make_result("t1", b"one"))
    Outbox(tmp_path).put(*make_result("t2", b"two"))
    folder = tmp_path / "outbox/t1-1"
    if damage == "part":
        (folder / "part-0000.safetensors").write_bytes(b"onf")  # the same length
    elif damage == "missing part":
        (folder / "part-0000.safetensors").unlink()
    elif damage == "json":
        (folder / "entry.json").write_bytes(b'{"sequence": 1')
    elif damage == "no json":
        (folder / "entry.json").unlink()
    else:
        folder.rename(folder.with_name("t9-1"))
    with capture_logs() as logs:
        assert waiting(tmp_path) == ["t2"]
    assert [line["log_level"] for line in logs] == ["error"]
    (aside,) = (tmp_path / "damaged").iterdir()
    assert aside.name == ("t9-1.0" if damage == "other name" else "t1-1.0")
    assert str(aside) == logs[0]["moved_to"]


def test_a_part_that_the_trainer_did_not_write_is_named(tmp_path: Path, make_result: Maker) -> None:
    result, parts = make_result("t1", b"one", b"two")
    (parts / "part-0001.safetensors").unlink()
    with pytest.raises(StateError, match=r"part-0001\.safetensors with 3 bytes, but it is missing"):
        Outbox(tmp_path).put(result, parts)
    assert waiting(tmp_path) == []


def test_a_full_disk_is_told(tmp_path: Path, make_result: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    result, parts = make_result("t1", b"one")
    box = Outbox(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError, match="No space left on device; free some space there"):
        box.put(result, parts)
