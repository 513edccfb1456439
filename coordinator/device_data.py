"""What devices with many classes say of their data (fedepth_wire.report_messages), by digest.

It is in memory only, and bounded: what is forgotten, by a restart too, is asked for again.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterable, Awaitable, Callable

from fedepth_wire.bounds import CHUNK_BYTES
from fedepth_wire.report_messages import MOST_DATA_BYTES
from fedepth_wire.v1.federation_pb2 import Chunk

from fedepth.errors import ProtocolError

MOST_BYTES = 64 << 20  # of all devices together
ENTRY_BYTES = 1 << 10  # that each counts for in addition, so that empty ones are bounded as well


class DeviceData:
    """Files in memory: whole ones, and those that are still coming. What was used last stays longest."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._whole: OrderedDict[str, bytes] = OrderedDict()
        self._growing: OrderedDict[str, bytearray] = OrderedDict()

    def find(self, digest: str) -> bytes | None:
        """The file with this digest, if it is here."""
        found = self._whole.get(digest)
        if found is not None:
            self._whole.move_to_end(digest)
        return found

    async def receive(
        self,
        digest: str,
        size_bytes: int,
        chunks: AsyncIterable[Chunk],
        acknowledge: Callable[[int], Awaitable[None]],
    ) -> None:
        """Takes a file, from where an earlier stream has ended.

        Args:
            chunks: what the device sends, once it was told where to begin.
            acknowledge: tells it how much is here, first of all and after every chunk but the last.

        Raises:
            ProtocolError: the stream cannot be used.
        """
        if not 0 < size_bytes <= MOST_DATA_BYTES:
            raise ProtocolError(f"{size_bytes} bytes about a device's data; at most {MOST_DATA_BYTES} are taken")
        if self.find(digest) is not None:
            return
        growing = self._growing.setdefault(digest, bytearray())
        self._growing.move_to_end(digest)
        self._forget()
        if len(growing) < size_bytes:
            await acknowledge(len(growing))
            async for chunk in chunks:
                end = chunk.offset + len(chunk.data)
                if chunk.offset != len(growing) or not 0 < len(chunk.data) <= CHUNK_BYTES or end > size_bytes:
                    raise ProtocolError(f"bytes {chunk.offset} to {end} came, {len(growing)} of {size_bytes} are here")
                growing += chunk.data
                self._growing[digest] = growing
                self._growing.move_to_end(digest)
                self._forget()
                if end == size_bytes:
                    break
                await acknowledge(end)
        if len(growing) != size_bytes:
            raise ProtocolError(f"the stream ended at {len(growing)} of {size_bytes} bytes about a device's data")
        self._growing.pop(digest, None)
        if (got := hashlib.sha256(growing).hexdigest()) != digest:
            raise ProtocolError(f"what a device says of its data has the sha256 {got[:12]}…, not {digest[:12]}…")
        self._whole[digest] = bytes(growing)
        self._forget()

    def _forget(self) -> None:
        """Keeps within the bound: those that are still coming go first."""
        held = (self._growing, self._whole)
        total = sum(ENTRY_BYTES + len(data) for files in held for data in files.values())
        for files in held:
            while total > self._most_bytes and files:
                total -= ENTRY_BYTES + len(files.popitem(last=False)[1])
