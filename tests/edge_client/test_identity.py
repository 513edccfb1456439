import errno
import os
import uuid
from pathlib import Path

import pytest

from edge_client.identity import StateLock, device_id, recall, remember
from fedepth.errors import DiskError, StateError
from tests.edge_client.faults import Disk


def test_the_id_is_made_once_and_kept(tmp_path: Path) -> None:
    first = device_id(tmp_path)
    assert uuid.UUID(first).version == 4
    assert device_id(tmp_path) == first


def test_a_damaged_id_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "device-id").write_bytes(b"\xff\0nonsense")
    with pytest.raises(StateError, match="not a UUID"):
        device_id(tmp_path)
    assert (tmp_path / "device-id").read_bytes() == b"\xff\0nonsense"


def test_two_agents_cannot_share_a_state_directory(tmp_path: Path) -> None:
    with StateLock(tmp_path / "new" / "state"), pytest.raises(StateError, match="in use by another agent"):
        StateLock(tmp_path / "new" / "state")
    with StateLock(tmp_path / "new" / "state"):
        pass  # free again


def test_leftovers_of_a_cut_write_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".device-id.0a1b.tmp").write_bytes(b"half")
    with StateLock(tmp_path):
        assert not list(tmp_path.glob(".*.tmp"))


def test_values_are_recalled_and_damaged_ones_learnt_anew(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    assert recall(path, dict[str, int]) is None
    remember(path, {"a": 1})
    assert recall(path, dict[str, int]) == {"a": 1}
    path.write_bytes(b"{")
    assert recall(path, dict[str, int]) is None


def test_what_a_full_disk_cannot_take_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Disk(tmp_path, fails_from=1, times=99, code=errno.ENOSPC).install(patch)
        with pytest.raises(DiskError, match=r"the device's id cannot be read or made: .*No space left on device"):
            device_id(tmp_path)
        with pytest.raises(DiskError, match=r"value\.json cannot be written: .*No space left on device"):
            remember(tmp_path / "value.json", 1)
    assert list(tmp_path.iterdir()) == []


def test_an_agent_can_start_on_a_full_disk_and_deliver_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / ".x.tmp").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        patch.setattr(os, "unlink", full)
        with StateLock(tmp_path), pytest.raises(StateError, match="in use by another agent"):
            StateLock(tmp_path)
