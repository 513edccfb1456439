"""Files that are sent in pieces and grow by them: any cut, any resumption, and what is refused."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from fedepth_wire import chunks as chunks_module
from fedepth_wire.bounds import CHUNK_BYTES
from fedepth_wire.chunks import PartialFile, Source, append
from fedepth_wire.times import SYNC_S
from fedepth_wire.v1.federation_pb2 import Chunk
from hypothesis import given, settings
from hypothesis import strategies as st

from fedepth.errors import ProtocolError


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sent(source: Path | bytes, ranges: Sequence[tuple[int, int]], size: int) -> list[Chunk]:
    """All of these ranges, in pieces of `size`."""
    pieces = Source(source, 1 << 40, "").pieces(ranges)
    found = []
    left = sum(end - begin for begin, end in ranges)
    while left:
        found.append(pieces.next(size))
        left -= len(found[-1].data)
    pieces.close()
    return found


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    data=st.binary(min_size=1, max_size=200),
    size=st.integers(1, 250),
    cuts=st.lists(st.tuples(st.integers(0, 10), st.booleans()), max_size=5),
)
def test_a_file_arrives_whole_in_any_pieces_with_any_cuts(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, size: int, cuts: list[tuple[int, bool]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    source, path, final = folder / "source", folder / "target.partial", folder / "target"
    source.write_bytes(data)
    path.unlink(missing_ok=True)
    growing = PartialFile(path, len(data), sha256(data))
    received = 0
    for pieces, restarted in [*cuts, (1000, False)]:
        if restarted:
            growing = PartialFile(path, len(data), sha256(data))
        begin = growing.resume()
        for chunk in sent(source, [(begin, len(data))], size)[:pieces] if begin < len(data) else []:
            received += growing.append(chunk.offset, chunk.data) - chunk.offset
    growing.seal(final)
    assert received == len(data)  # no byte twice
    assert final.read_bytes() == data and not path.exists()


def test_ranges_are_cut_into_pieces_with_their_offsets_and_none_spans_two(tmp_path: Path) -> None:
    data = bytes(range(100))
    (tmp_path / "source").write_bytes(data)
    for source in (tmp_path / "source", data):
        found = [(chunk.offset, chunk.data) for chunk in sent(source, [(3, 20), (90, 100), (0, 2)], 10)]
        assert found == [(3, data[3:13]), (13, data[13:20]), (90, data[90:]), (0, data[:2])]


def test_a_file_that_has_become_shorter_is_told(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"abc")
    pieces = Source(tmp_path / "source", 5, "").pieces([(0, 5)])
    assert pieces.next(10).data == b"abc"
    with pytest.raises(ProtocolError, match=r"source ends at 3; its bytes up to 5 are wanted"):
        pieces.next(10)
    pieces.close()


def test_what_is_sent_is_looked_at_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_bytes(b"abc")
    Source(path, 3, sha256(b"abc")).verify()
    with pytest.raises(ProtocolError, match=f"{path} is damaged: its sha256 is {sha256(b'abc')[:12]}…"):
        Source(path, 3, sha256(b"abd")).verify()


@pytest.mark.parametrize("restarted", [False, True])
def test_a_file_with_another_digest_is_deleted(tmp_path: Path, restarted: bool) -> None:
    path = tmp_path / "target.partial"
    growing = PartialFile(path, 5, sha256(b"right"))
    growing.append(0, b"other")
    if restarted:
        growing = PartialFile(path, 5, sha256(b"right"))
        assert growing.resume() == 5
    with pytest.raises(ProtocolError, match="sha256"):
        growing.seal(tmp_path / "target")
    assert list(tmp_path.iterdir()) == []
    assert growing.resume() == 0
    growing.append(0, b"right")
    growing.seal(tmp_path / "target")


def test_a_file_that_is_not_whole_gets_no_name(tmp_path: Path) -> None:
    growing = PartialFile(tmp_path / "target.partial", 5, sha256(b"right"))
    growing.append(0, b"rig")
    with pytest.raises(ProtocolError, match="target: the stream ended at 3 of 5 bytes"):
        growing.seal(tmp_path / "target")
    assert (tmp_path / "target.partial").read_bytes() == b"rig"


def test_what_another_has_written_meanwhile_is_hashed_anew(tmp_path: Path) -> None:
    path = tmp_path / "target.partial"
    growing = PartialFile(path, 5, sha256(b"right"))
    growing.append(0, b"xx")
    path.write_bytes(b"rig")
    assert growing.resume() == 3
    growing.append(3, b"ht")
    growing.seal(tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"right"


def overwritten(path: Path, data: bytes) -> None:
    """Puts other bytes of the same length into a file, which then looks as old as before: cp -p, rsync -t."""
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # the kernel's clock ticks every few milliseconds
        path.write_bytes(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("held", [3, 5])
def test_what_another_has_changed_meanwhile_is_found(tmp_path: Path, held: int, streams: int) -> None:
    path = tmp_path / "target.partial"
    growing = PartialFile(path, 5, sha256(b"right"))
    growing.append(0, b"right"[:held])
    overwritten(path, b"wrong"[:held])
    if streams == 2:
        assert growing.resume() == held
    if held < 5:
        growing.append(held, b"right"[held:])
    with pytest.raises(ProtocolError, match="send it again"):
        growing.seal(tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_more_than_the_whole_counts_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "target.partial"
    path.write_bytes(b"too long")
    assert PartialFile(path, 5, sha256(b"right")).resume() == 0
    assert not path.exists()


def test_a_whole_file_is_read_again_only_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = tmp_path / "target.partial", []
    monkeypatch.setattr(chunks_module, "file_digest", lambda path: read.append(path) or sha256(b"right"))
    growing = PartialFile(path, 5, sha256(b"right"))
    growing.append(0, b"rig")
    growing.resume()
    growing.append(3, b"ht")
    growing.seal(tmp_path / "target")
    assert read == []
    path.write_bytes(b"rig")
    growing = PartialFile(path, 5, sha256(b"right"))
    growing.resume()
    growing.append(3, b"ht")
    growing.seal(tmp_path / "target")
    assert read == [path]


def test_it_is_durable_when_it_is_whole_and_now_and_then_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(Path(f"/proc/self/fd/{descriptor}").readlink()))
    now = 0.0
    path = tmp_path / "target.partial"
    growing = PartialFile(path, 5, sha256(b"right"), lambda: now)
    growing.append(0, b"r")
    assert synced == []
    now += SYNC_S
    growing.append(1, b"i")
    growing.append(2, b"g")
    assert synced == [path]
    growing.append(3, b"ht")
    growing.seal(tmp_path / "target")
    assert synced == [path, path, tmp_path]


@pytest.mark.parametrize(
    ("seconds", "restarted", "durable"), [(SYNC_S - 1, False, False), (SYNC_S + 1, False, True), (1.0, True, True)]
)
def test_what_came_soon_and_can_come_again_need_not_be_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, restarted: bool, durable: bool
) -> None:
    """A power cut costs SYNC_S of a transfer, not the hours that it takes over a slow link."""
    now, path = 0.0, tmp_path / "t.partial"
    growing = PartialFile(path, 4, sha256(b"abcd"), clock=lambda: now)
    growing.append(0, b"ab")
    if restarted:
        growing = PartialFile(path, 4, sha256(b"abcd"), clock=lambda: now)
        growing.resume()
    growing.append(2, b"cd")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    now = seconds
    growing.seal(tmp_path / "t", can_come_again=True)
    assert (tmp_path / "t").read_bytes() == b"abcd"
    assert bool(synced) == durable


@pytest.mark.parametrize(
    ("offset", "data", "total", "message"),
    [
        pytest.param(2, b"x", 10, "offset 2, expected 3", id="repeated"),
        pytest.param(4, b"x", 10, "offset 4, expected 3", id="gap"),
        pytest.param(-1, b"x", 10, "offset -1", id="negative offset"),
        pytest.param(3, b"", 10, "chunk of 0 bytes", id="empty"),
        pytest.param(3, bytes(CHUNK_BYTES + 1), 4 << 20, "chunk of 1048577 bytes", id="oversize"),
        pytest.param(3, b"xyz", 5, "ends at 6, the file has 5 bytes", id="too long"),
    ],
)
def test_a_wrong_chunk_is_refused_and_nothing_is_written(
    tmp_path: Path, offset: int, data: bytes, total: int, message: str
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"abc")
    with pytest.raises(ProtocolError, match=message):
        append(target, offset, data, 3, total)
    assert target.read_bytes() == b"abc"


def test_a_chunk_of_the_largest_size_that_fills_the_file_is_accepted(tmp_path: Path) -> None:
    target = tmp_path / "target"
    assert append(target, 0, bytes(CHUNK_BYTES), 0, CHUNK_BYTES) == CHUNK_BYTES
    assert target.stat().st_size == CHUNK_BYTES


@pytest.mark.parametrize("held", [b"ab", b"abcd"])
def test_a_file_that_does_not_end_at_the_offset_is_not_appended_to(tmp_path: Path, held: bytes) -> None:
    target = tmp_path / "target"
    target.write_bytes(held)
    with pytest.raises(ProtocolError, match=f"holds {len(held)} bytes, expected 3"):
        append(target, 3, b"x", 3, 10)
    assert target.read_bytes() == held
