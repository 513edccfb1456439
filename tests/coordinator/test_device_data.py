"""What devices with many classes say of their data: taken by digest, in pieces, within a bound of all together."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from fedepth_wire.convert import from_message, to_message
from fedepth_wire.report_messages import DATA_FIELDS, INLINE_BYTES, put_into, report_message
from fedepth_wire.v1 import federation_pb2 as pb

from coordinator import device_data
from coordinator.device_data import DeviceData, check_inline
from fedepth.errors import ProtocolError
from fedepth.task import DeviceReport


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def send(
    held: DeviceData,
    data: bytes,
    end: int | None = None,
    digest: str = "",
    begin: int | None = None,
    device: str = "a",
) -> list[int]:
    """Sends from where it is told to, a hundred bytes at a time; returns what it is told."""
    told: list[int] = []

    async def acknowledge(held_bytes: int) -> None:
        told.append(held_bytes)

    async def chunks() -> AsyncIterator[pb.Chunk]:
        for offset in range(told[0] if begin is None else begin, len(data) if end is None else end, 100):
            yield pb.Chunk(offset=offset, data=data[offset : offset + 100])

    asyncio.run(held.receive(device, digest or sha256(data), len(data), chunks(), acknowledge))
    return told


def test_a_file_goes_on_where_it_was_cut(kit: Any) -> None:
    held, data = DeviceData(), bytes(range(250)) * 2
    with pytest.raises(ProtocolError, match="the stream ended at 200 of 500 bytes"):
        send(held, data, 200)
    assert held.find("a", sha256(data)) is None
    assert send(held, data) == [200, 300, 400]
    assert held.find("a", sha256(data)) == data
    assert send(held, data) == []


def test_a_file_of_another_digest_is_dropped() -> None:
    held = DeviceData()
    for _ in range(2):
        with pytest.raises(ProtocolError, match="has the sha256"):
            send(held, b"x" * 300, digest="0" * 64)
    assert held.find("a", "0" * 64) is None


def test_a_gap_and_too_much_are_refused() -> None:
    held = DeviceData()
    with pytest.raises(ProtocolError, match="bytes 100 to 200 came, 0 of 300 are here"):
        send(held, b"x" * 300, begin=100)
    with pytest.raises(ProtocolError, match="at most 4194304 are taken"):
        send(held, bytes((4 << 20) + 1))


def test_all_together_are_bounded_and_what_was_used_last_stays() -> None:
    held = DeviceData(most_bytes=1000)
    files = {name: name.encode() * 300 for name in "abcd"}
    for name in "abc":
        send(held, files[name], device=name)
    assert held.find("a", sha256(files["a"])) is not None
    send(held, files["d"], device="d")
    assert [held.find(name, sha256(files[name])) is not None for name in "abcd"] == [True, False, True, True]


def test_one_device_pushes_out_its_own_files_only() -> None:
    held = DeviceData(most_bytes=2000)
    honest = b"h" * 400
    send(held, honest, device="honest")
    for number in range(40):
        data = bytes([number]) * 400
        send(held, data, device="hostile")
        with pytest.raises(ProtocolError, match="ended"):
            send(held, bytes([100 + number]) * 400, 200, device="hostile")
        assert held.find("hostile", sha256(data)) == data
    assert held.find("honest", sha256(honest)) == honest
    assert held.find("hostile", sha256(honest)) is None  # what others have sent is no business of its
    assert sum(each.size_bytes for each in held._held.values()) == 400 + 400 + 200


def test_of_two_files_at_once_the_older_stream_ends() -> None:
    held = DeviceData()
    first, second = b"1" * 300, b"2" * 300

    async def acknowledge(held_bytes: int) -> None:
        return

    async def chunks() -> AsyncIterator[pb.Chunk]:
        yield pb.Chunk(offset=0, data=first[:100])
        await held.receive("a", sha256(second), 300, whole(second), acknowledge)
        yield pb.Chunk(offset=100, data=first[100:])

    async def whole(data: bytes) -> AsyncIterator[pb.Chunk]:
        yield pb.Chunk(offset=0, data=data)

    with pytest.raises(ProtocolError, match="in a newer stream"):
        asyncio.run(held.receive("a", sha256(first), 300, chunks(), acknowledge))
    assert held.find("a", sha256(second)) == second


def test_what_is_announced_and_never_sent_is_bounded_as_well() -> None:
    held = DeviceData(most_devices=10)
    for number in range(50):
        with pytest.raises(ProtocolError, match="the stream ended at 0 of 4 bytes"):
            send(held, b"data", 0, digest=sha256(bytes([number])), device=f"device-{number}")
    assert len(held._held) == 10
    send(held, b"data", device="honest")
    assert held.find("honest", sha256(b"data")) == b"data"


def test_a_large_report_travels_by_digest_and_a_small_one_whole(kit: Any) -> None:
    small = kit.report("a")
    message, data = report_message(small)
    assert data == b"" and from_message(message, DeviceReport) == small
    large = replace(small, class_counts=(7,) * 10_000, class_names=tuple(f"class {n}" for n in range(10_000)))
    message, data = report_message(large)
    assert len(data) > INLINE_BYTES and message.ByteSize() < 500 and message.data_digest == sha256(data)
    message.class_counts.append(3)  # both: the file counts
    put_into(message, data)
    assert from_message(message, DeviceReport) == replace(large)
    with pytest.raises(ProtocolError, match="cannot be read"):
        put_into(message, b"\xff\xff")


def named(kit: Any, device: str, count: int, **changes: Any) -> tuple[pb.DeviceReport, bytes]:
    """A report whose folders only the job's classes tell apart from a split, as it travels."""
    names = tuple(f"{top}/{n}" for n in range(count) for top in ("cat", "dog"))
    report = replace(kit.report(device), folder_names=names, folder_counts=(2,) * len(names), **changes)
    return report_message(report)


def test_what_a_device_says_of_its_data_is_read_once_for_each_digest_and_job(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []

    def put(message: pb.DeviceReport, content: bytes) -> None:
        reads.append(len(content))
        put_into(message, content)

    monkeypatch.setattr(device_data, "put_into", put)
    held = DeviceData()
    (message, data), (other, other_data) = named(kit, "a", 1000), named(kit, "a", 1001)
    assert asyncio.run(held.report(message, ["cat", "dog"])) is None
    send(held, data)

    def asked(message: pb.DeviceReport, classes: list[str]) -> DeviceReport:
        copy = pb.DeviceReport()
        copy.CopyFrom(message)
        report = asyncio.run(held.report(copy, classes))
        assert report is not None
        return report

    first = asked(message, ["cat", "dog"])
    assert (first.class_names, first.class_counts, first.sample_count) == (("cat", "dog"), (2000, 2000), 4000)
    assert asked(message, ["cat", "dog"]) == first and len(reads) == 1
    message.hostname = "moved"  # what is not of the data is what the message says
    assert asked(message, ["cat", "dog"]) == replace(first, hostname="moved") and len(reads) == 1
    assert asked(message, ["cat"]).sample_count == 4000 and len(reads) == 2  # another job
    send(held, other_data)
    assert asked(other, ["cat"]).sample_count == 4004 and len(reads) == 3


def test_what_a_message_may_hold_by_itself_is_what_agents_put_there(kit: Any) -> None:
    report = replace(kit.report("a"), folder_names=("a",) * 5000, folder_counts=(1,) * 5000)
    with pytest.raises(ProtocolError, match=r"has 1000\d names and counts; more than 8192 go by digest"):
        check_inline(to_message(report, pb.DeviceReport))
    small = to_message(replace(report, folder_names=("a",), folder_counts=(1,)), pb.DeviceReport)
    check_inline(small)
    small.data_digest = "0" * 64
    with pytest.raises(
        ProtocolError, match=r"has \d+ names and counts beside a digest of them; more than 0 go by digest"
    ):
        check_inline(small)


def test_what_is_kept_as_it_was_read_is_bounded(kit: Any) -> None:
    held = DeviceData(most_names=5000)
    for device in ("a", "b", "c"):
        message, data = named(kit, device, 1000)
        send(held, data, device=device)
        assert asyncio.run(held.report(message, ["cat", "dog"])) is not None
    assert [bool(each.names) for each in held._held.values()] == [False, True, True]  # 2,002 each; the oldest is gone


def test_calls_that_are_ended_begin_no_second_reading(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread goes on when its call is ended: sixty calls were fifty-five threads."""
    opened = threading.Event()
    reads: list[str] = []

    def slow(message: pb.DeviceReport, content: bytes) -> None:
        reads.append(message.device_id)
        assert opened.wait(20)
        put_into(message, content)

    monkeypatch.setattr(device_data, "put_into", slow)
    held = DeviceData()
    (message, data), (others, others_data) = named(kit, "a", 1000), named(kit, "b", 1000)
    send(held, data)
    send(held, others_data, device="b")

    async def scene() -> list[DeviceReport | None]:
        ended = [asyncio.ensure_future(held.report(message, ["cat", "dog"])) for _ in range(20)]
        other = asyncio.ensure_future(held.report(others, ["cat", "dog"]))
        while not reads:
            await asyncio.sleep(0.001)
        for call in ended:
            call.cancel()
        await asyncio.gather(*ended, return_exceptions=True)
        last = asyncio.ensure_future(held.report(message, ["cat", "dog"]))
        await asyncio.sleep(0)
        assert reads == ["a"]  # one at a time, of all devices
        opened.set()
        return [await last, await other]

    assert all(asyncio.run(scene()))
    assert reads == ["a", "b"]


def test_a_file_that_cannot_be_read_is_read_once(kit: Any) -> None:
    held = DeviceData()
    content = b"\xff" * 300
    send(held, content)
    message = to_message(kit.report("a"), pb.DeviceReport)
    for name in DATA_FIELDS:
        message.ClearField(name)
    message.data_digest = sha256(content)
    with pytest.raises(ProtocolError, match="cannot be read"):
        asyncio.run(held.report(message, ["cat"]))
    assert asyncio.run(held.report(message, ["cat"])) is None  # it is asked for again


def test_a_report_of_many_names_leaves_the_event_loop_free(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are answered while it is read, for which a lock stands here that only the loop can open."""
    opened = threading.Event()

    def slow(message: pb.DeviceReport, content: bytes) -> None:
        assert opened.wait(20)
        put_into(message, content)

    monkeypatch.setattr(device_data, "put_into", slow)
    held = DeviceData()
    message, data = named(kit, "a", 1000)
    send(held, data)

    async def scene() -> DeviceReport | None:
        reading = asyncio.ensure_future(held.report(message, ["cat", "dog"]))
        await asyncio.sleep(0)
        opened.set()
        return await reading

    assert asyncio.run(scene()) is not None
