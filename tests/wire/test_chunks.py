"""Chunk streams: any cut, any resumption, and what is refused."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
from fedepth_wire.chunks import CHUNK_BYTES, append_chunk, checked_chunks, file_chunks, receive_file
from fedepth_wire.v1.federation_pb2 import Chunk
from hypothesis import given, settings
from hypothesis import strategies as st

from fedepth.errors import ProtocolError


async def stream(chunks: Iterable[Chunk]) -> AsyncIterator[Chunk]:
    for chunk in chunks:
        yield chunk


def receive(path: Path, chunks: Iterable[Chunk], offset: int, data: bytes) -> int:
    digest = hashlib.sha256(data).hexdigest()
    return asyncio.run(receive_file(path, stream(chunks), offset, len(data), digest))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.binary(min_size=1, max_size=200), size=st.integers(1, 250), cut=st.integers(0, 200))
def test_a_file_arrives_whole_from_any_offset_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, size: int, cut: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    held = min(cut, len(data))
    (folder / "source").write_bytes(data)
    (folder / "target").write_bytes(data[:held])
    received = receive(folder / "target", file_chunks(folder / "source", held, size), held, data)
    assert received == len(data) - held
    assert (folder / "target").read_bytes() == data


def test_a_file_is_cut_into_pieces_of_one_mebibyte_with_their_offsets(tmp_path: Path) -> None:
    data = os.urandom(2 * CHUNK_BYTES + 5)
    (tmp_path / "source").write_bytes(data)
    chunks = list(file_chunks(tmp_path / "source", 3))
    assert [(chunk.offset, len(chunk.data)) for chunk in chunks] == [
        (3, 1 << 20),
        (3 + (1 << 20), 1 << 20),
        (3 + (2 << 20), 2),
    ]
    assert b"".join(chunk.data for chunk in chunks) == data[3:]


def test_a_stream_that_breaks_off_keeps_what_came_and_can_resume(tmp_path: Path) -> None:
    data = bytes(range(100))
    (tmp_path / "source").write_bytes(data)
    chunks = list(file_chunks(tmp_path / "source", 0, 30))
    with pytest.raises(ProtocolError, match="ended at 60 of 100"):
        receive(tmp_path / "target", chunks[:2], 0, data)
    assert (tmp_path / "target").read_bytes() == data[:60]
    assert receive(tmp_path / "target", chunks[2:], 60, data) == 40
    assert (tmp_path / "target").read_bytes() == data


def test_a_file_with_another_digest_is_deleted(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="sha256"):
        receive(tmp_path / "target", [Chunk(offset=0, data=b"other")], 0, b"right")
    assert not (tmp_path / "target").exists()


def test_a_received_file_is_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(Path(f"/proc/self/fd/{descriptor}").readlink()))
    receive(tmp_path / "target", [Chunk(offset=0, data=b"data")], 0, b"data")
    assert tmp_path / "target" in synced


@pytest.mark.parametrize(
    ("chunk", "total", "message"),
    [
        pytest.param(Chunk(offset=2, data=b"x"), 10, "offset 2, expected 3", id="repeated"),
        pytest.param(Chunk(offset=4, data=b"x"), 10, "offset 4, expected 3", id="gap"),
        pytest.param(Chunk(offset=-1, data=b"x"), 10, "offset -1", id="negative offset"),
        pytest.param(Chunk(offset=3, data=b""), 10, "chunk of 0 bytes", id="empty"),
        pytest.param(Chunk(offset=3, data=bytes(CHUNK_BYTES + 1)), 4 << 20, "chunk of 1048577 bytes", id="oversize"),
        pytest.param(Chunk(offset=3, data=b"xyz"), 5, "ends at 6, the file has 5 bytes", id="too long"),
    ],
)
def test_a_wrong_chunk_is_refused_and_nothing_is_written(
    tmp_path: Path, chunk: Chunk, total: int, message: str
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"abc")
    with pytest.raises(ProtocolError, match=message):
        append_chunk(target, chunk, 3, total)
    assert target.read_bytes() == b"abc"


def test_a_chunk_of_the_largest_size_that_fills_the_file_is_accepted(tmp_path: Path) -> None:
    target = tmp_path / "target"
    assert append_chunk(target, Chunk(offset=0, data=bytes(CHUNK_BYTES)), 0, CHUNK_BYTES) == CHUNK_BYTES
    assert target.stat().st_size == CHUNK_BYTES


@pytest.mark.parametrize("held", [b"ab", b"abcd"])
def test_a_file_that_does_not_end_at_the_offset_is_not_appended_to(tmp_path: Path, held: bytes) -> None:
    target = tmp_path / "target"
    target.write_bytes(held)
    with pytest.raises(ProtocolError, match=f"holds {len(held)} bytes, expected 3"):
        append_chunk(target, Chunk(offset=3, data=b"x"), 3, 10)
    assert target.read_bytes() == held


def test_a_refused_chunk_in_a_stream_keeps_those_before(tmp_path: Path) -> None:
    chunks = [Chunk(offset=0, data=b"abc"), Chunk(offset=2, data=b"cde")]
    with pytest.raises(ProtocolError, match="offset 2, expected 3"):
        receive(tmp_path / "target", chunks, 0, b"abcde")
    assert (tmp_path / "target").read_bytes() == b"abc"


@pytest.mark.parametrize("offset", [0, 5, CHUNK_BYTES, 2 * CHUNK_BYTES, 2 * CHUNK_BYTES + 9])
@pytest.mark.parametrize("flipped", [None, 3, CHUNK_BYTES + 3, 2 * CHUNK_BYTES + 3])
def test_the_end_of_a_file_is_sent_only_if_all_of_it_is_right(tmp_path: Path, offset: int, flipped: int | None) -> None:
    path, data = tmp_path / "file", bytearray(os.urandom(2 * CHUNK_BYTES + 9))
    digest, got = hashlib.sha256(data).hexdigest(), bytearray()
    if flipped is not None:
        data[flipped] ^= 1
    path.write_bytes(data)

    async def send() -> None:
        async for chunk in checked_chunks(path, offset, digest):
            got.extend(chunk.data)

    if flipped is None:
        asyncio.run(send())
        assert got == data[offset:]
        return
    with pytest.raises(ProtocolError, match=f"{path} is damaged"):
        asyncio.run(send())
    assert offset + len(got) < len(data) or offset == len(data)
