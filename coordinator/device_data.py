"""What devices with many classes say of their data (fedepth_wire.report_messages), by digest.

It is in memory only, and bounded, for each device as well, so that none can push out what others have sent. What is
forgotten, by a restart too, is asked for again. To read 65,536 names takes half a second of a processor, and a device
asks for work again and again: that is done in a thread, one for all devices, and once for as long as the device says
the same.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from fedepth_wire.bounds import CHUNK_BYTES
from fedepth_wire.convert import from_message
from fedepth_wire.report_messages import DATA_FIELDS, INLINE_BYTES, MOST_DATA_BYTES, put_into
from fedepth_wire.v1 import federation_pb2 as pb

from coordinator.admission import counted_for
from fedepth.errors import ProtocolError
from fedepth.task import DeviceReport

MOST_BYTES = 64 << 20  # of all devices together
MOST_DEVICES = 20_000
MOST_NAMES = 500_000  # that are kept as they were read, some 100 bytes each; others are read again


@dataclass(frozen=True)
class _Read:
    """A report of these classes, with what the file with this digest says."""

    digest: str
    classes: Sequence[str]
    report: DeviceReport


@dataclass
class _Held:
    """What is here of one device: one whole file at most, and one that is still coming."""

    digest: str = ""
    whole: bytes = b""
    growing_digest: str = ""
    growing: bytearray = field(default_factory=bytearray)
    read: _Read | None = None

    @property
    def names(self) -> int:
        """So many are kept as they were read."""
        return 0 if self.read is None else len(self.read.report.class_names) + len(self.read.report.folder_names)

    @property
    def size_bytes(self) -> int:
        return len(self.whole) + len(self.growing)


def check_inline(message: pb.DeviceReport) -> None:
    """What a report may say by itself of its device's data, before any of it is looked at: names and counts take a byte
    each and more, and reading them takes the loop's time. The rest goes by digest.

    Raises:
        ProtocolError: it says more.
    """
    counted = sum(len(getattr(message, name)) for name in DATA_FIELDS)
    most = 0 if message.data_digest else INLINE_BYTES
    if counted > most:
        beside = " beside a digest of them" if message.data_digest else ""
        raise ProtocolError(f"a report has {counted} names and counts{beside}; more than {most} go by digest")


class DeviceData:
    """Files in memory: of every device its last one. What was used last stays longest."""

    def __init__(
        self, most_bytes: int = MOST_BYTES, most_devices: int = MOST_DEVICES, most_names: int = MOST_NAMES
    ) -> None:
        self._most_bytes, self._most_devices, self._most_names = most_bytes, most_devices, most_names
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._reading: dict[str, asyncio.Task[_Read]] = {}  # by device
        self._one_at_a_time = asyncio.Lock()

    def find(self, device_id: str, digest: str) -> bytes | None:
        """The file with this digest, if this device has sent it and it is still here."""
        held = self._held.get(device_id)
        if held is None or held.digest != digest:
            return None
        self._held.move_to_end(device_id)
        return held.whole

    async def report(self, message: pb.DeviceReport, classes: Sequence[str]) -> DeviceReport | None:
        """The report in a message, with what it says by digest; None if that has to be asked for.

        Args:
            message: that has been checked (`check_inline`, `fedepth_wire.bounds`).
            classes: of the job, by which samples are counted where names of folders left open what they are.

        Raises:
            ProtocolError: it cannot be read.
        """
        if not message.data_digest:
            return _converted(message, None, classes)
        known = await self._read(message, classes)
        return None if known is None else _with_data(from_message(message, DeviceReport), known.report)

    async def _read(self, message: pb.DeviceReport, classes: Sequence[str]) -> _Read | None:
        """What the file that a report names says. It is read once, and to its end, whoever still waits: a call that is
        ended does not end its thread, and the next call would begin another."""
        device_id, digest = message.device_id, message.data_digest
        while (content := self.find(device_id, digest)) is not None:
            held = self._held[device_id]
            found = held.read
            if found is None or (found.digest, found.classes) != (digest, classes):
                if device_id not in self._reading:
                    copy = pb.DeviceReport()
                    copy.CopyFrom(message)
                    reading = asyncio.create_task(self._read_alone(held, copy, content, classes))
                    reading.add_done_callback(partial(self._end_reading, device_id))
                    self._reading[device_id] = reading
                found = await asyncio.shield(self._reading[device_id])
            if (found.digest, found.classes) == (digest, classes):
                return found
        return None

    async def _read_alone(self, held: _Held, message: pb.DeviceReport, content: bytes, classes: Sequence[str]) -> _Read:
        try:
            async with self._one_at_a_time:  # of all devices: each takes half a second of a processor
                report = await asyncio.to_thread(_converted, message, content, classes)
        except ProtocolError:
            if held.whole is content:  # nobody has to read it a second time
                held.digest, held.whole = "", b""
            raise
        found = held.read = _Read(message.data_digest, classes, report)
        self._forget_read()
        return found

    def _end_reading(self, device_id: str, reading: asyncio.Task[_Read]) -> None:
        del self._reading[device_id]
        if not reading.cancelled():
            reading.exception()  # is told to whoever still waits

    async def receive(
        self,
        device_id: str,
        digest: str,
        size_bytes: int,
        chunks: AsyncIterable[pb.Chunk],
        acknowledge: Callable[[int], Awaitable[None]],
    ) -> None:
        """Takes a file, from where an earlier stream has ended. A device that begins another one lets go of it.

        Args:
            chunks: what the device sends, once it was told where to begin.
            acknowledge: tells it how much is here, first of all and after every chunk but the last.

        Raises:
            ProtocolError: the stream cannot be used.
        """
        if not 0 < size_bytes <= MOST_DATA_BYTES:
            raise ProtocolError(f"{size_bytes} bytes about a device's data; at most {MOST_DATA_BYTES} are taken")
        if self.find(device_id, digest) is not None:
            return
        growing = self._begin(device_id, digest)
        self._forget()
        if len(growing) < size_bytes:
            await acknowledge(len(growing))
            async for chunk in chunks:
                end = chunk.offset + len(chunk.data)
                if chunk.offset != len(growing) or not 0 < len(chunk.data) <= CHUNK_BYTES or end > size_bytes:
                    raise ProtocolError(f"bytes {chunk.offset} to {end} came, {len(growing)} of {size_bytes} are here")
                if self._begin(device_id, digest) is not growing:
                    raise ProtocolError(
                        "what the device says of its data is being sent in a newer stream, or forgotten"
                    )
                growing += chunk.data
                self._forget()
                if end == size_bytes:
                    break
                await acknowledge(end)
        if len(growing) != size_bytes:
            raise ProtocolError(f"the stream ended at {len(growing)} of {size_bytes} bytes about a device's data")
        got = hashlib.sha256(growing).hexdigest()
        held = self._held.setdefault(device_id, _Held())
        if held.growing is growing:
            held.growing_digest, held.growing = "", bytearray()
        if got != digest:
            raise ProtocolError(f"what a device says of its data has the sha256 {got[:12]}…, not {digest[:12]}…")
        held.digest, held.whole, held.read = digest, bytes(growing), None
        self._forget()

    def _begin(self, device_id: str, digest: str) -> bytearray:
        """What is here of a file that a device sends."""
        held = self._held.setdefault(device_id, _Held())
        self._held.move_to_end(device_id)
        if held.growing_digest != digest:
            held.growing_digest, held.growing = digest, bytearray()
        return held.growing

    def _forget(self) -> None:
        """Keeps within the bound."""
        total = sum(held.size_bytes for held in self._held.values())
        while total > self._most_bytes or len(self._held) > self._most_devices:
            total -= self._held.popitem(last=False)[1].size_bytes

    def _forget_read(self) -> None:
        """Keeps within the bound of what is kept as it was read."""
        total = sum(held.names for held in self._held.values())
        for held in self._held.values():
            if total <= self._most_names:
                return
            total -= held.names
            held.read = None


def _converted(message: pb.DeviceReport, content: bytes | None, classes: Sequence[str]) -> DeviceReport:
    if content is not None:
        put_into(message, content)
    report = from_message(message, DeviceReport)
    return counted_for(report, classes)


def _with_data(report: DeviceReport, read: DeviceReport) -> DeviceReport:
    """A report with the data that an earlier one named by the same digest."""
    return replace(
        report,
        class_counts=read.class_counts,
        class_names=read.class_names,
        folder_names=read.folder_names,
        folder_counts=read.folder_counts,
        sample_count=read.sample_count if read.folder_names else report.sample_count,
    )
