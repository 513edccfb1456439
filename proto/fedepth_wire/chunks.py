"""Files ↔ streams of chunks: pieces with offsets, bounded before they are written, checked by the whole's sha256."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from fedepth.errors import ProtocolError
from fedepth.files import Signature, delete, file_digest, is_own_file, open_regular, signature, sync_folder
from fedepth_wire.bounds import CHUNK_BYTES
from fedepth_wire.times import SYNC_S
from fedepth_wire.v1.federation_pb2 import Chunk


@dataclass(frozen=True)
class Source:
    """A file that can be fetched: where it lies, or all of it. Its methods are for a thread."""

    content: Path | bytes
    size_bytes: int
    digest: str

    def pieces(self, ranges: Sequence[tuple[int, int]]) -> Pieces:
        """Ranges of it, as chunks: see `Pieces`.

        Raises:
            OSError: it cannot be opened.
        """
        name, file = (
            ("a file in memory", BytesIO(self.content))
            if isinstance(self.content, bytes)
            else (str(self.content), open_regular(self.content))
        )
        return Pieces(name, file, ranges)

    def verify(self) -> None:
        """Reads all of it.

        Raises:
            ProtocolError: it is another file.
            OSError: it cannot be read.
        """
        if isinstance(self.content, Path) and (got := file_digest(self.content)) != self.digest:
            raise ProtocolError(f"{self.content} is damaged: its sha256 is {got[:12]}…, expected {self.digest[:12]}…")


class Pieces:
    """Ranges of a file, cut into chunks one after the other. Its methods are for a thread; close it in the end."""

    def __init__(self, name: str, file: BinaryIO, ranges: Sequence[tuple[int, int]]) -> None:
        """`ranges`: begin and end of each, in the order in which they are sent; `name`: of the file, for people."""
        self._name, self._file = name, file
        self._ranges = list(reversed(ranges))

    def next(self, most_bytes: int) -> Chunk:
        """Up to so many bytes more, at least one, and none of the next range.

        Raises:
            ProtocolError: the file ends before a range does.
            OSError: it cannot be read.
            IndexError: there was the end of the last range.
        """
        begin, end = self._ranges.pop()
        self._file.seek(begin)
        data = self._file.read(min(most_bytes, end - begin))
        if not data:
            raise ProtocolError(f"{self._name} ends at {begin}; its bytes up to {end} are wanted")
        if begin + len(data) < end:
            self._ranges.append((begin + len(data), end))
        return Chunk(offset=begin, data=data)

    def close(self) -> None:
        self._file.close()


class PartialFile:
    """A file that grows by what arrives of it. What is there survives a restart, and a cut costs nothing of it.

    It is hashed as it grows. Kept over several streams, no byte is read again; after a restart, or if somebody else has
    written to it, the file is read once when it is whole. All methods are for a thread.

    Attributes:
        held_bytes: how much is there.
    """

    def __init__(self, path: Path, size_bytes: int, digest: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`digest`: sha256 (hex) of the whole file, which has `size_bytes`."""
        self.path, self.size_bytes, self.digest = path, size_bytes, digest
        self.held_bytes = 0
        self._clock = clock
        self._begun = self._synced = clock()
        self._hash: hashlib._Hash | None = hashlib.sha256()  # of what is there; None if that was not seen here
        self._signature: Signature | None = None  # of the file as it was left here

    def resume(self) -> int:
        """Looks how much of it is there. More than the whole is none of it, and deleted; so is what is no file."""
        held = self.path.stat().st_size if is_own_file(self.path) else 0
        if held > self.size_bytes or not is_own_file(self.path):
            delete(self.path)
            held = 0
        if held == 0:
            self._hash, self._signature = hashlib.sha256(), None
        elif held != self.held_bytes:
            self._hash = None
        self.held_bytes = held
        return held

    def append(self, offset: int, data: bytes) -> int:
        """Adds what comes next, and returns how much is there then.

        Raises:
            ProtocolError: it comes not next, or is too much. Nothing is written then.
            OSError: it cannot be written.
        """
        if self.held_bytes and not self._is_as_left():
            self._hash = None
        end = append(self.path, offset, data, self.held_bytes, self.size_bytes, self._sync_due())
        if self._hash is not None:
            self._hash.update(data)
        self.held_bytes = end
        self._signature = self._current()
        return end

    def seal(self, final: Path, *, can_come_again: bool = False) -> None:
        """Gives the whole file its name, durably. Not so one that can come again, if it has come within SYNC_S: that
        much a power cut may cost, and whoever uses it looks at its digest.

        Raises:
            ProtocolError: it is not whole; or another one, and deleted, so that the next try begins anew.
            OSError: it cannot be read or renamed.
        """
        if self.held_bytes != self.size_bytes:
            raise ProtocolError(f"{final.name}: the stream ended at {self.held_bytes} of {self.size_bytes} bytes")
        known = self._hash if self._is_as_left() else None
        got = file_digest(self.path) if known is None else known.hexdigest()
        if got != self.digest:
            self.path.unlink()
            raise ProtocolError(f"{final.name}: sha256 is {got[:12]}…, expected {self.digest[:12]}…; send it again")
        durable = not can_come_again or known is None or self._clock() >= self._begun + SYNC_S
        if durable:
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())
        self.path.replace(final)
        if durable:
            sync_folder(final.parent)

    def _is_as_left(self) -> bool:
        """Whether nobody else has written to it since."""
        return self._current() == self._signature

    def _current(self) -> Signature | None:
        try:
            return signature(self.path.stat())
        except FileNotFoundError:
            return None

    def _sync_due(self) -> bool:
        now = self._clock()
        if now < self._synced + SYNC_S:
            return False
        self._synced = now
        return True


def append(path: Path, offset: int, data: bytes, expected_offset: int, total_bytes: int, sync: bool = False) -> int:
    """Appends data to `path` and returns the new length.

    Raises:
        ProtocolError: wrong offset, too much data, or more than `total_bytes` in all. Nothing is written then.
        OSError: it cannot be written.
    """
    if offset != expected_offset:
        raise ProtocolError(f"chunk at offset {offset}, expected {expected_offset}")
    if not 0 < len(data) <= CHUNK_BYTES:
        raise ProtocolError(f"chunk of {len(data)} bytes, allowed are 1 to {CHUNK_BYTES}")
    end = expected_offset + len(data)
    if end > total_bytes:
        raise ProtocolError(f"chunk ends at {end}, the file has {total_bytes} bytes")
    with open(path, "ab", opener=_open_at_once) as file:
        if file.tell() != expected_offset:
            raise ProtocolError(f"{path.name} holds {file.tell()} bytes, expected {expected_offset}")
        file.write(data)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    return end


def _open_at_once(path: str, flags: int) -> int:
    """A FIFO in the place of the file fails then, instead of waiting for a reader."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)
