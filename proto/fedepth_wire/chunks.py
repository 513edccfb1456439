"""Files ↔ chunk streams: 1 MiB pieces with offsets, bounded before they are written, checked by sha256."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from pathlib import Path

from fedepth.errors import ProtocolError
from fedepth.files import file_digest, make_durable, open_regular
from fedepth_wire.bounds import CHUNK_BYTES
from fedepth_wire.v1.federation_pb2 import Chunk


def file_chunks(path: Path, offset: int = 0, size: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """The file from `offset` on, as chunks of `size` bytes."""
    with open_regular(path) as file:
        file.seek(offset)
        while data := file.read(size):
            yield Chunk(offset=offset, data=data)
            offset += len(data)


async def checked_chunks(path: Path, offset: int, digest: str) -> AsyncIterator[Chunk]:
    """As `file_chunks`, but the last chunk comes only if the whole file has this sha256 (hex).

    What lies before `offset` is hashed too: the sender must learn that its disk has changed a file, also from receivers
    that resume. Files are read in a thread.

    Raises:
        ProtocolError: the file is another one.
    """
    hashed = await asyncio.to_thread(_hashed, path, offset)
    last: Chunk | None = None
    chunks = file_chunks(path, offset)

    def read() -> Chunk | None:
        chunk = next(chunks, None)
        if chunk is not None:
            hashed.update(chunk.data)
        return chunk

    while (chunk := await asyncio.to_thread(read)) is not None:
        if last is not None:
            yield last
        last = chunk
    got = hashed.hexdigest()
    if got != digest:
        raise ProtocolError(f"{path} is damaged: its sha256 is {got[:12]}…, expected {digest[:12]}…")
    if last is not None:
        yield last


def append_chunk(path: Path, chunk: Chunk, expected_offset: int, total_bytes: int) -> int:
    """Appends a chunk to `path` and returns the new length.

    Raises:
        ProtocolError: wrong offset, too much data, or more than `total_bytes` in all. Nothing is written then.
    """
    if chunk.offset != expected_offset:
        raise ProtocolError(f"chunk at offset {chunk.offset}, expected {expected_offset}")
    if not 0 < len(chunk.data) <= CHUNK_BYTES:
        raise ProtocolError(f"chunk of {len(chunk.data)} bytes, allowed are 1 to {CHUNK_BYTES}")
    end = expected_offset + len(chunk.data)
    if end > total_bytes:
        raise ProtocolError(f"chunk ends at {end}, the file has {total_bytes} bytes")
    with open(path, "ab", opener=_open_at_once) as file:
        if file.tell() != expected_offset:
            raise ProtocolError(f"{path.name} holds {file.tell()} bytes, expected {expected_offset}")
        file.write(chunk.data)
    return end


async def receive_file(path: Path, chunks: AsyncIterable[Chunk], offset: int, total_bytes: int, digest: str) -> int:
    """Appends a chunk stream to `path`, makes it durable, and compares the digest of the whole file.

    Returns the number of bytes received. A file that came whole but has another digest is deleted, so that the next
    try starts anew; a stream that ends early leaves what came, so that the next try resumes.

    Raises:
        ProtocolError: see `append_chunk`; or the stream ended early; or the digest differs.
    """
    if total_bytes <= 0:
        raise ProtocolError(f"{path.name}: a file of {total_bytes} bytes was announced")
    start = offset
    async for chunk in chunks:
        offset = append_chunk(path, chunk, offset, total_bytes)
    if offset != total_bytes:
        raise ProtocolError(f"{path.name}: the stream ended at {offset} of {total_bytes} bytes")
    got = file_digest(path)
    if got != digest:
        path.unlink()
        raise ProtocolError(f"{path.name}: sha256 is {got[:12]}…, expected {digest[:12]}…")
    make_durable(path)
    return offset - start


def _open_at_once(path: str, flags: int) -> int:
    """A FIFO in the place of the file fails then, instead of waiting for a reader."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def _hashed(path: Path, size: int) -> hashlib._Hash:
    """The sha256 of the first `size` bytes, to be continued."""
    hashed = hashlib.sha256()
    with open_regular(path) as file:
        while size > 0 and (data := file.read(min(size, CHUNK_BYTES))):
            hashed.update(data)
            size -= len(data)
    return hashed
