"""What devices with many classes say of their data (fedepth_wire.report_messages), by digest.

It is in memory only, and bounded, for each device as well, so that none can push out what others have sent. What is
forgotten, by a restart too, is asked for again.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterable, Awaitable, Callable
from dataclasses import dataclass, field

from fedepth_wire.bounds import CHUNK_BYTES
from fedepth_wire.report_messages import MOST_DATA_BYTES
from fedepth_wire.v1.federation_pb2 import Chunk

from fedepth.errors import ProtocolError

MOST_BYTES = 64 << 20  # of all devices together
MOST_DEVICES = 20_000


@dataclass
class _Held:
    """What is here of one device: one whole file at most, and one that is still coming."""

    digest: str = ""
    whole: bytes = b""
    growing_digest: str = ""
    growing: bytearray = field(default_factory=bytearray)

    @property
    def size_bytes(self) -> int:
        return len(self.whole) + len(self.growing)


class DeviceData:
    """Files in memory: of every device its last one. What was used last stays longest."""

    def __init__(self, most_bytes: int = MOST_BYTES, most_devices: int = MOST_DEVICES) -> None:
        self._most_bytes, self._most_devices = most_bytes, most_devices
        self._held: OrderedDict[str, _Held] = OrderedDict()

    def find(self, device_id: str, digest: str) -> bytes | None:
        """The file with this digest, if this device has sent it and it is still here."""
        held = self._held.get(device_id)
        if held is None or held.digest != digest:
            return None
        self._held.move_to_end(device_id)
        return held.whole

    async def receive(
        self,
        device_id: str,
        digest: str,
        size_bytes: int,
        chunks: AsyncIterable[Chunk],
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
        held.digest, held.whole = digest, bytes(growing)
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
