"""Uploads: resumable, bounded, digest checked; commits: checked, recorded once."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fedepth_wire.v1.federation_pb2 import Chunk

from coordinator import admission
from coordinator import uploads as uploads_module
from coordinator.store.records import Store
from coordinator.uploads import PartHeader, Uploads, late
from fedepth.aggregation import norms
from fedepth.aggregation.rules import Norms
from fedepth.errors import ProtocolError, StateError, UnavailableError, UpdateError
from fedepth.job import model_spec, training_spec
from fedepth.layout import ModelLayout, TensorInfo, UnitLayout
from fedepth.task import Result

DATA = bytes(range(200)) * 10
PIECE = 500


class Setup:
    def __init__(self, folder: Path, kit: Any) -> None:
        self.kit = kit
        self.store = Store.open(folder, "demo", model_spec(kit.config()))
        self.task = kit.task()
        self.store.record_task(self.task)
        self.open = True
        self.room = 1 << 40
        self.uploads = self.new_uploads()

    def new_uploads(self) -> Uploads:
        """As after a restart."""

        def accepts(task_id: str) -> bool:
            return self.open and task_id == self.task.task_id

        def check_room(size_bytes: int) -> None:
            if size_bytes > self.room:
                raise UnavailableError("the disk is full")

        async def record(result: Result, norms: Norms) -> None:
            if not accepts(result.task_id):
                raise late(result.task_id)
            await self.store.short(self.store.record_update, result, norms)

        return Uploads(
            self.store,
            self.kit.layout,
            accepts,
            check_room,
            record,
            lambda: Path("base"),
            partial(training_spec, self.kit.config()),
        )

    def header(self, data: bytes = DATA, **changes: Any) -> PartHeader:
        fields: dict[str, Any] = {
            "task_id": self.task.task_id,
            "attempt": 1,
            "device_id": "a",
            "part": 0,
            "size_bytes": len(data),
            "digest": self.kit.sha256(data),
        }
        return PartHeader(**{**fields, **changes})

    async def receive(self, header: PartHeader, data: bytes = DATA, end: int | None = None) -> list[int]:
        """Sends from where the coordinator says; returns what it said."""
        told: list[int] = []

        async def acknowledge(held: int) -> None:
            told.append(held)

        async def sent() -> AsyncIterator[Chunk]:
            async for chunk in chunks(data, told[0], end):
                yield chunk

        await self.uploads.receive(header, sent(), acknowledge)
        return told

    def send(self, header: PartHeader, data: bytes = DATA, end: int | None = None) -> list[int]:
        return asyncio.run(self.receive(header, data, end))

    def held(self, data: bytes = DATA, **changes: Any) -> int:
        """How much a device is told to be here of a part; all of it if there is nothing to send."""
        header = self.header(data, **changes)

        class Told(Exception):
            pass

        async def acknowledge(held: int) -> None:
            raise Told(held)

        try:
            asyncio.run(self.uploads.receive(header, chunks(b"", 0), acknowledge))
        except Told as told:
            return int(told.args[0])
        return header.size_bytes

    def commit(self, **changes: Any) -> bool:
        return asyncio.run(self.uploads.commit(self.kit.result(self.task, {0: DATA}, **changes)))


async def chunks(data: bytes, offset: int, end: int | None = None) -> AsyncIterator[Chunk]:
    end = len(data) if end is None else end
    for start in range(offset, end, PIECE):
        yield Chunk(offset=start, data=data[start : min(start + PIECE, end)])


async def ignore(held: int) -> None:
    """A device that does not listen."""


@pytest.fixture
def setup(tmp_path: Path, kit: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setup]:
    monkeypatch.setattr(admission, "check_update", lambda paths, layout, result: None)
    monkeypatch.setattr(norms, "update_norms", lambda *_: Norms(0.0, 0.0))
    made = Setup(tmp_path, kit)
    yield made
    made.store.close()


def test_a_part_is_received_and_committed_once(setup: Setup) -> None:
    assert setup.send(setup.header()) == [
        0,
        500,
        1000,
        1500,
    ]  # and the answer after the last chunk is that it is sealed
    assert setup.commit() is True
    assert setup.commit() is False
    stored = setup.store.updates_of(1)
    assert [update.task_id for update in stored] == [setup.task.task_id]
    assert [path.read_bytes() for path in setup.uploads.paths(stored[0])] == [DATA]
    setup.open = False  # the round is closed: asking again still finds the update accepted
    assert setup.commit() is False
    assert setup.send(setup.header()) == []


@pytest.mark.parametrize("fixed", [False, True])
def test_an_update_holds_no_statistics_where_its_round_fixes_them(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, fixed: bool
) -> None:
    layouts: list[ModelLayout] = []
    monkeypatch.setattr(admission, "check_update", lambda paths, layout, result: layouts.append(layout))
    (first, *others), head = setup.kit.layout.units, setup.kit.layout.head
    mean = TensorInfo("unit0.mean", (10,), "F32", parameter=False, statistic=True)
    layout = ModelLayout((UnitLayout("unit0", (*first.tensors, mean)), *others), head)
    after = {"batch_norm": "fixed", "fixed_after": 0 if fixed else 1}
    setup.kit = replace(setup.kit, layout=layout, config=partial(setup.kit.config, rounds=2, training=after))
    setup.uploads = setup.new_uploads()
    setup.send(setup.header())
    assert setup.commit()
    assert [mean in layout.tensors for layout in layouts] == [not fixed]


def test_weights_that_rotted_refuse_no_update(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def update_norms(base: Path, parts: Sequence[Path], parameters: Any, scales: Any) -> Norms:
        raise StateError(f"{base} is damaged")

    setup.send(setup.header())
    with monkeypatch.context() as patch:
        patch.setattr(norms, "update_norms", update_norms)
        with pytest.raises(UnavailableError, match="cannot be compared with the weights before it: base is damaged"):
            setup.commit()
    assert setup.commit() is True


def test_two_commits_at_once_record_one_update(setup: Setup) -> None:
    setup.send(setup.header())
    result = setup.kit.result(setup.task, {0: DATA})

    async def both() -> list[bool]:
        return list(await asyncio.gather(setup.uploads.commit(result), setup.uploads.commit(result)))

    assert sorted(asyncio.run(both())) == [False, True]
    assert len(setup.store.updates_of(1)) == 1


def test_an_upload_resumes_where_it_broke(setup: Setup) -> None:
    with pytest.raises(ProtocolError, match="ended at 1200 of 2000"):
        setup.send(setup.header(), end=1200)
    assert setup.held() == 1200
    assert setup.send(setup.header()) == [1200, 1700]
    assert setup.send(setup.header()) == []
    assert setup.commit()


@pytest.mark.parametrize("restarted", [False, True])
def test_a_part_that_is_trained_anew_takes_the_place_of_the_one_before(setup: Setup, restarted: bool) -> None:
    """After a plan that went over its budget in a later stage: its first parts are up by then, and of the same size."""
    other = DATA[::-1]
    setup.send(setup.header(other), other)
    if restarted:
        setup.uploads = setup.new_uploads()
    assert setup.held(other) == len(other)
    assert setup.send(setup.header()) == [0, 500, 1000, 1500]
    assert setup.commit()


def test_an_upload_resumes_after_a_restart(setup: Setup) -> None:
    with pytest.raises(ProtocolError):
        setup.send(setup.header(), end=700)
    setup.uploads = setup.new_uploads()
    assert setup.held() == 700
    assert setup.send(setup.header()) == [700, 1200, 1700]


def test_a_part_that_came_whole_but_was_not_sealed_counts(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(uploads_module, "_seal", killed)
        setup.send(setup.header())
    setup.uploads = setup.new_uploads()
    assert setup.held() == len(DATA)  # so the device does not send it again
    assert setup.commit()
    (stored,) = setup.store.updates_of(1)
    assert [path.read_bytes() for path in setup.uploads.paths(stored)] == [DATA]


def test_a_part_that_came_whole_but_damaged_is_sent_again(setup: Setup) -> None:
    folder = setup.store.files.spool(setup.task.task_id, 1)
    folder.mkdir()
    uploads_module._partial_path(folder, 0, setup.kit.sha256(DATA)).write_bytes(DATA[::-1])
    with pytest.raises(ProtocolError, match=r"part-0000.*: sha256 is .*, expected .*send it again"):
        setup.commit()
    assert setup.held() == 0
    assert setup.send(setup.header())[0] == 0
    assert setup.commit()


def test_a_commit_waits_for_a_part_whose_stream_was_cut_while_it_was_sealed(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal, sealing, go_on = uploads_module._seal, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> None:
        sealing.set()
        go_on.wait()
        seal(*arguments)

    monkeypatch.setattr(uploads_module, "_seal", slow)

    async def scene() -> bool:
        upload = asyncio.create_task(setup.receive(setup.header()))
        await asyncio.to_thread(sealing.wait)
        upload.cancel()
        await asyncio.wait({upload})
        try:
            assert setup.uploads._lock(setup.task.task_id).locked()
            commit = asyncio.create_task(setup.uploads.commit(setup.kit.result(setup.task, {0: DATA})))
        finally:
            go_on.set()
        return await commit

    assert asyncio.run(scene())


def test_an_older_stream_of_the_same_part_gives_way(setup: Setup) -> None:
    async def scene() -> list[int]:
        stalled, go_on = asyncio.Event(), asyncio.Event()

        async def slow() -> AsyncIterator[Chunk]:
            yield Chunk(offset=0, data=DATA[:PIECE])
            stalled.set()
            await go_on.wait()
            yield Chunk(offset=PIECE, data=DATA[PIECE : 2 * PIECE])

        old = asyncio.create_task(setup.uploads.receive(setup.header(), slow(), ignore))
        await stalled.wait()
        told = await setup.receive(setup.header())
        go_on.set()
        with pytest.raises(ProtocolError, match="newer stream"):
            await old
        return told

    assert asyncio.run(scene()) == [500, 1000, 1500]
    assert setup.commit()


def test_a_wrong_digest_is_told_and_the_part_starts_anew(setup: Setup) -> None:
    with pytest.raises(ProtocolError, match="sha256"):
        setup.send(setup.header(digest="0" * 64))
    assert setup.held(digest="0" * 64) == 0
    assert setup.send(setup.header())[0] == 0


def test_more_data_than_announced_is_not_written(setup: Setup) -> None:
    with pytest.raises(ProtocolError, match="the file has 700 bytes"):
        setup.send(setup.header(size_bytes=700))
    assert setup.held() == 500


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task_id": "unknown"}, "late"),
        ({"task_id": "../../up"}, "late"),
        ({"device_id": "b"}, "device"),
        ({"attempt": 2}, "plan"),
        ({"attempt": 0}, "plan"),
        ({"part": 7}, "size"),
        ({"part": -1}, "size"),
        ({"size_bytes": 2 * 12_400 + (1 << 20) + 1}, "size"),
    ],
)
def test_unwanted_parts_are_refused_before_anything_is_written(
    setup: Setup, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UpdateError) as caught:
        setup.send(setup.header(**changes))
    assert caught.value.reason == reason
    assert list((setup.store.directory / "spool").iterdir()) == []


def test_the_sum_of_the_parts_is_bounded(setup: Setup) -> None:
    half = setup.uploads.limit_bytes // 2 + 1
    with pytest.raises(ProtocolError, match="ended"):
        setup.send(setup.header(size_bytes=half), end=500)
    with pytest.raises(UpdateError) as caught:
        setup.send(setup.header(size_bytes=half, part=1))
    assert caught.value.reason == "size"


def test_a_round_that_closes_during_an_upload_ends_it(setup: Setup) -> None:
    async def closing() -> AsyncIterator[Chunk]:
        yield Chunk(offset=0, data=DATA[:PIECE])
        setup.open = False
        yield Chunk(offset=PIECE, data=DATA[PIECE : 2 * PIECE])

    with pytest.raises(UpdateError) as caught:
        asyncio.run(setup.uploads.receive(setup.header(), closing(), ignore))
    assert caught.value.reason == "late"


def test_an_update_that_is_recorded_while_its_part_comes_again_is_not_told_as_late(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commit was cut and goes through meanwhile. A device that is told "late" takes back what its encoding has left
    out of the update, which counts."""
    setup.send(setup.header())
    check = setup.uploads._check_header

    async def recorded_by_now(header: PartHeader) -> None:
        await setup.uploads.commit(setup.kit.result(setup.task, {0: DATA}))
        setup.open = False
        await check(header)

    monkeypatch.setattr(setup.uploads, "_check_header", recorded_by_now)
    assert setup.send(setup.header()) == []
    with pytest.raises(UpdateError, match="is no longer wanted"):
        setup.send(setup.header(b"another"))


def test_a_round_that_closes_during_the_check_takes_no_update(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def close(paths: Sequence[Path], layout: ModelLayout, result: Result) -> None:
        setup.open = False

    monkeypatch.setattr(admission, "check_update", close)
    setup.send(setup.header())
    with pytest.raises(UpdateError) as caught:
        setup.commit()
    assert caught.value.reason == "late"
    assert setup.store.updates_of(1) == []


def test_a_refused_update_leaves_no_spool(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(paths: Sequence[Path], layout: ModelLayout, result: Result) -> None:
        raise UpdateError("not_finite", "head.weight holds nan")

    monkeypatch.setattr(admission, "check_update", refuse)
    setup.send(setup.header())
    with pytest.raises(UpdateError, match="holds nan"):
        setup.commit()
    assert list((setup.store.directory / "spool").iterdir()) == []
    assert setup.store.update(setup.task.task_id) is None


def test_another_device_cannot_commit_nor_delete_an_update(setup: Setup) -> None:
    setup.send(setup.header())
    with pytest.raises(UpdateError) as caught:
        setup.commit(device_id="b")
    assert caught.value.reason == "device"
    assert setup.commit() is True


def test_parts_that_are_not_here_or_have_changed_are_asked_for_again(setup: Setup) -> None:
    """A disk may have lost or changed them, and the device has them still: no reason to refuse its update for good."""
    with pytest.raises(ProtocolError, match="part 0 is not here; send it"):
        setup.commit()
    setup.send(setup.header())
    (path,) = setup.uploads.paths(setup.kit.result(setup.task, {0: DATA}))
    path.write_bytes(DATA[::-1])
    with pytest.raises(ProtocolError, match="not the one that the update names; send it again"):
        setup.commit()
    assert setup.held() == 0
    setup.send(setup.header())
    assert setup.commit() is True


def test_a_part_that_was_replaced_by_one_that_looks_as_old_is_asked_for_again(setup: Setup) -> None:
    """A backup that is played back while the coordinator runs: cp -p and rsync -t set the time that a file had."""
    setup.send(setup.header())
    (path,) = setup.uploads.paths(setup.kit.result(setup.task, {0: DATA}))
    while time.time_ns() - path.stat().st_mtime_ns < 20_000_000:
        pass  # digests of younger files are not remembered
    assert setup.held() == len(DATA)
    copy = path.with_name("copy")
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # the kernel's clock ticks every few milliseconds
        copy.write_bytes(DATA[::-1])
        os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
        shutil.copyfile(copy, path)
        shutil.copystat(copy, path)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    with pytest.raises(ProtocolError, match="not the one that the update names; send it again"):
        setup.commit()


@pytest.mark.parametrize("kind", ["folder", "fifo", "link to nowhere"])
@pytest.mark.parametrize("place", ["whole", "partial", "another's partial"])
def test_what_is_no_file_in_its_place_keeps_no_part_from_arriving(setup: Setup, place: str, kind: str) -> None:
    """After a disk was checked and repaired, or somebody has restored half of a folder."""
    (whole,) = setup.uploads.paths(setup.kit.result(setup.task, {0: DATA}))
    whole.parent.mkdir()
    path = {
        "whole": whole,
        "partial": uploads_module._partial_path(whole.parent, 0, setup.kit.sha256(DATA)),
        "another's partial": uploads_module._partial_path(whole.parent, 0, "0" * 64),
    }[place]
    if kind == "folder":
        path.mkdir()
        (path / "inside").touch()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")
    with pytest.raises(ProtocolError, match="part 0 is not here; send it"):
        setup.commit()
    setup.send(setup.header())
    assert whole.read_bytes() == DATA
    assert setup.commit() is True


def test_another_attempt_or_other_parts_are_not_acknowledged_for_a_recorded_update(setup: Setup) -> None:
    setup.send(setup.header())
    assert setup.commit() is True
    assert setup.commit() is False  # the same again, after a lost answer
    with pytest.raises(UpdateError, match="an update of attempt 1 of t-0001-0000 is recorded") as caught:
        setup.commit(attempt=2)
    assert caught.value.reason == "duplicate"
    other = setup.kit.result(setup.task, {0: DATA[::-1]})
    with pytest.raises(UpdateError, match="recorded"):
        asyncio.run(setup.uploads.commit(other))
    assert setup.store.update(setup.task.task_id).parts[0].digest == setup.kit.sha256(DATA)


def test_a_part_under_many_digests_takes_the_room_of_one(setup: Setup) -> None:
    for number in range(20):
        data = bytes([number]) * 1000
        with pytest.raises(ProtocolError, match="the stream ended at 500"):
            setup.send(setup.header(data), data, end=500)
    folder = setup.store.files.spool(setup.task.task_id, 1)
    assert [path.stat().st_size for path in folder.iterdir()] == [500]


@pytest.mark.parametrize("order", [range(1, 8), range(7, 0, -1), (4, 1, 7, 2, 6, 3, 5)])
def test_only_two_attempts_of_a_task_have_a_spool_in_whatever_order_they_come(
    setup: Setup, order: Sequence[int]
) -> None:
    setup.store.record_task(setup.kit.task(attempt=7))
    sent: list[int] = []
    for attempt in order:
        setup.send(setup.header(attempt=attempt))
        newest = max((each for each in sent), default=attempt)
        sent = [attempt, newest] if sent else [attempt]
        spools = {path.name for path in (setup.store.directory / "spool").iterdir()}
        assert spools == {f"t-0001-0000-{each}" for each in sent}


def test_a_whole_part_counts_beside_one_of_another_digest(setup: Setup) -> None:
    size = setup.uploads.limit_bytes * 2 // 3
    setup.send(setup.header(bytes(size)), bytes(size))
    for uploads in (setup.uploads, setup.new_uploads()):
        setup.uploads = uploads
        with pytest.raises(UpdateError, match=f"parts of {2 * size} bytes together") as caught:
            setup.send(setup.header(b"1" * size), b"1" * size)
        assert caught.value.reason == "size"


def test_parts_that_come_beside_one_that_is_being_sealed_count(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large part begins while a small one of the same number is made durable."""
    large = bytes(setup.uploads.limit_bytes * 2 // 3)
    seal, check = uploads_module._seal, Uploads._check_header
    sealing, checked = threading.Event(), threading.Event()

    def slow(*args: Any) -> None:
        sealing.set()
        assert checked.wait(20)
        seal(*args)

    async def noted(uploads: Uploads, header: PartHeader) -> None:
        await check(uploads, header)
        if header.size_bytes == len(large):
            checked.set()

    async def both() -> None:
        small = asyncio.ensure_future(setup.receive(setup.header(b"x"), b"x"))
        assert await asyncio.to_thread(sealing.wait, 20)
        with pytest.raises(ProtocolError, match="the stream ended at 500"):
            await setup.receive(setup.header(large), large, end=500)
        await small

    monkeypatch.setattr(uploads_module, "_seal", slow)
    monkeypatch.setattr(Uploads, "_check_header", noted)
    asyncio.run(both())
    with pytest.raises(UpdateError, match=f"parts of {2 * len(large) + 1} bytes together"):
        setup.send(setup.header(large, part=1), large, end=500)


def test_a_whole_part_that_is_sent_again_counts_once(setup: Setup) -> None:
    size = setup.uploads.limit_bytes * 3 // 5
    for _ in range(3):
        setup.send(setup.header(bytes(size)), bytes(size))
    assert setup.send(setup.header(DATA, part=1)) != []


def test_other_attempts_change_nothing_of_what_is_recorded(setup: Setup) -> None:
    setup.store.record_task(setup.kit.task(attempt=3))
    setup.send(setup.header())
    assert setup.commit() is True
    for attempt in (2, 3):
        with pytest.raises(UpdateError) as caught:
            setup.send(setup.header(DATA[::-1], attempt=attempt), DATA[::-1])
        assert caught.value.reason == "late"
    [stored] = setup.store.updates_of(1)
    assert [path.read_bytes() for path in setup.uploads.paths(stored)] == [DATA]


def test_without_room_nothing_is_written_and_the_same_part_is_welcome_later(setup: Setup) -> None:
    setup.room = len(DATA) - 1
    with pytest.raises(UnavailableError, match="full"):
        setup.send(setup.header())
    assert not setup.store.files.spool(setup.task.task_id, 1).exists()
    setup.room = len(DATA)
    assert setup.send(setup.header())[0] == 0
