"""What has the name of a file and is none: a FIFO, a device, a link, far too many bytes. Nothing waits for it.

A new reader is a line in READERS, a new thing to read a line in KINDS.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fedepth_wire.chunks import Source, append

from edge_client.config import load
from edge_client.identity import device_id, recall
from edge_client.outbox import Entry, Outbox
from fedepth.commands import check_picture
from fedepth.costs import Calibration
from fedepth.data.damage import Damage, load_damage, load_sound
from fedepth.errors import ConfigError, FedepthError
from fedepth.files import WrongFileError, file_digest, not_writable, open_regular, read_regular
from fedepth.job import load_config
from fedepth.models.traced import read_costs
from fedepth.plan import Plan, Policy
from fedepth.plan_command import _calibration
from fedepth.settings import read_settings
from fedepth.task import PartInfo, Result
from fedepth.weights import open_weights


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def socket_file(path: Path) -> None:
    os.mknod(path, 0o140600)


KINDS: list[Callable[[Path], None]] = [fifo, device, socket_file]
READERS: dict[str, Callable[[Path], object]] = {
    "open_regular": open_regular,
    "read_regular": lambda path: read_regular(path, 10),
    "file_digest": file_digest,
    "a weights file": open_weights,
    "a graph": read_costs,
    "chunks to send": lambda path: Source(path, 1, "").pieces([(0, 1)]),
    "--calibration": _calibration,
    "a settings file": lambda path: read_settings(path, path.name),
    "the job file": load_config,
    "the settings of an agent": load,
    "the device's id": lambda path: device_id(path.parent),
}


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """A reader that waits ends with the test, and not with the suite."""
    signal.alarm(20)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_refuses_at_once(tmp_path: Path, reader: str, kind: Callable[[Path], None]) -> None:
    path = tmp_path / "device-id"
    kind(path)
    with pytest.raises((FedepthError, WrongFileError)) as caught:
        READERS[reader](path)
    assert "device-id" in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_learnt_is_learnt_again(tmp_path: Path, kind: Callable[[Path], None]) -> None:
    kind(tmp_path / "calibration.json")
    assert recall(tmp_path / "calibration.json", Calibration) is None


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_checked_is_checked_again(tmp_path: Path, kind: Callable[[Path], None]) -> None:
    for name in ("data-check", "data-check.sound"):
        kind(tmp_path / name)
    assert load_damage(tmp_path / "data-check") == Damage()
    assert not load_sound(tmp_path / "data-check")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["entry.json", "part-0000.safetensors"])
def test_such_an_entry_of_the_outbox_is_set_aside(
    tmp_path: Path, make_update: Any, name: str, kind: Callable[[Path], None]
) -> None:
    entry = make_update(tmp_path)
    (entry.folder / name).unlink()
    kind(entry.folder / name)
    assert Outbox(tmp_path).entries() == []
    assert (tmp_path / "damaged" / f"{entry.folder.name}.0").is_dir()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_in_its_place(tmp_path: Path, kind: Callable[[Path], None]) -> None:
    """A link to a device would be replaced, and a FIFO keep its writer waiting."""
    kind(tmp_path / "x.png")
    assert "x.png is not a regular file; name another one" in not_writable(tmp_path / "x.png")
    with pytest.raises(ConfigError, match=r"--plot: .*is not a regular file"):
        check_picture(tmp_path / "x.png")


def test_a_chunk_does_not_wait_for_a_reader(tmp_path: Path) -> None:
    fifo(tmp_path / "part.partial")
    with pytest.raises(OSError, match=r"part\.partial"):
        append(tmp_path / "part.partial", 0, b"x", 0, 1)


def test_a_file_may_be_a_link_where_people_put_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link", 4) == b"text"
    with pytest.raises(WrongFileError, match="has more than 3 bytes"):
        read_regular(tmp_path / "link", 3)
    with pytest.raises(WrongFileError, match="is not a regular file"):
        read_regular(tmp_path / "link", 4, follow=False)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path, 4)


@pytest.fixture
def make_update() -> Callable[[Path], Entry]:
    """The only update in an outbox."""

    def make(state: Path) -> Entry:
        part = PartInfo(0, 1, hashlib.sha256(b"x").hexdigest())
        result = Result("t", 1, "d", 1, 1, Plan((), (), Policy.AUTO, 0), (), (), (part,), 1.0, "none", 0)
        parts = state / "parts"
        parts.mkdir()
        (parts / "part-0000.safetensors").write_bytes(b"x")
        return Outbox(state).put(result, parts)

    return make
