"""IDX files: round trips, ranges, and damage."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from fedepth.data import idx
from fedepth.data.idx import IdxFile, write_idx, write_idx_items
from fedepth.errors import DataError

IMAGES = np.arange(60, dtype=np.uint8).reshape(5, 3, 4)


def header(*extents: int, kind: int = 8) -> bytes:
    return struct.pack(f">HBB{len(extents)}I", 0, kind, len(extents), *extents)


@pytest.mark.parametrize("name", ["images-ubyte", "images-ubyte.gz"])
def test_what_is_written_is_read_in_any_order(tmp_path: Path, name: str) -> None:
    write_idx(tmp_path / name, IMAGES)
    file = IdxFile(tmp_path / name, 3)
    assert (len(file), file.shape, file.item_bytes) == (5, (5, 3, 4), 12)
    assert file.read_items([4, 0, 4]) == IMAGES[[4, 0, 4]].tobytes()
    assert file.read_items([]) == b""
    assert b"".join(file.pieces()) == IMAGES.tobytes()


def test_the_bytes_of_a_written_file_are_those_of_the_format(tmp_path: Path) -> None:
    write_idx(tmp_path / "labels", np.array([7, 2], np.uint8))
    assert (tmp_path / "labels").read_bytes() == bytes.fromhex("00000801 00000002 0702")


def test_a_gzipped_file_is_the_same_at_every_writing(tmp_path: Path) -> None:
    write_idx(tmp_path / "a.gz", IMAGES)
    write_idx(tmp_path / "b.gz", IMAGES)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    assert (tmp_path / "a.gz").read_bytes()[4:8] == bytes(4)  # the time stamp


def test_items_of_a_plain_file_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "images"
    write_idx(path, IMAGES)
    file = IdxFile(path, 3)
    write_idx(path, IMAGES + np.uint8(100))
    assert file.read_items([1]) == (IMAGES[1] + np.uint8(100)).tobytes()


def test_a_gzipped_file_is_decompressed_once(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    write_idx(path, IMAGES)
    file = IdxFile(path, 3, scratch=tmp_path)
    first = file.read_items([1])
    path.unlink()
    assert file.read_items([1]) == first
    assert list(tmp_path.iterdir()) == []  # the decompressed file has no name


def test_a_gzipped_file_is_decompressed_where_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    write_idx(path, IMAGES)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        IdxFile(path, 3, scratch=tmp_path / "nowhere").read_items([1])


def test_pieces_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idx, "_PIECE_BYTES", 7)
    write_idx(tmp_path / "images", IMAGES)
    pieces = list(IdxFile(tmp_path / "images", 3).pieces())
    assert max(map(len, pieces)) == 7
    assert b"".join(pieces) == IMAGES.tobytes()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(header(5, 3, 4)[:10], id="header cut off"),
        pytest.param(header(5, 3, 4, kind=7) + bytes(60), id="no type of element"),
        pytest.param(b"\x89PNG" + bytes(72), id="another format"),
        pytest.param(header(5, 3, 4) + bytes(59), id="data cut off"),
        pytest.param(header(5, 3, 4) + bytes(61), id="data too long"),
        pytest.param(header(5, 0, 4), id="images without pixels"),
        pytest.param(header(1 << 31, 1, 1) + bytes(60), id="too many"),
    ],
)
def test_a_damaged_plain_file_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "images").write_bytes(content)
    with pytest.raises(DataError, match="images is damaged"):
        IdxFile(tmp_path / "images", 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(5, 3, 4, kind=13) + bytes(240), "images holds 32-bit floats, and items are unsigned bytes, 0 to 255"),
        (header(60) + bytes(60), "images has 1 dimensions, and 3 are expected"),
    ],
)
def test_a_file_of_another_kind_is_told_as_that(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "images").write_bytes(content)
    with pytest.raises(DataError, match=message):
        IdxFile(tmp_path / "images", 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"no gzip at all", "damaged", id="no gzip"),
        pytest.param(gzip.compress(header(5, 3, 4) + bytes(60))[:12], "damaged", id="cut off"),
        pytest.param(gzip.compress(header(1 << 30, 28, 28)), "bytes in all", id="claims that no compression explains"),
    ],
)
def test_a_damaged_gzipped_header_is_a_data_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "images.gz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        IdxFile(tmp_path / "images.gz", 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(gzip.compress(header(5, 3, 4) + bytes(59)), "1 bytes less", id="too short"),
        pytest.param(gzip.compress(header(5, 3, 4) + bytes(61)), "more bytes than that", id="too long"),
        pytest.param(gzip.compress(header(5, 3, 4) + bytes(60))[:-8] + bytes(8), "damaged", id="wrong checksum"),
    ],
)
def test_damage_behind_a_gzipped_header_is_found_when_it_is_read(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "images.gz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        IdxFile(tmp_path / "images.gz", 3).read_items([0])


def test_a_file_that_shrank_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "images"
    write_idx(path, IMAGES)
    file = IdxFile(path, 3)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="ends within item 4"):
        file.read_items([4])


@pytest.mark.parametrize("index", [-1, 5])
def test_an_item_that_does_not_exist_is_an_index_error(tmp_path: Path, index: int) -> None:
    write_idx(tmp_path / "images", IMAGES)
    with pytest.raises(IndexError, match=f"item {index} of 5"):
        IdxFile(tmp_path / "images", 3).read_items([index])


@pytest.mark.parametrize("array", [IMAGES.astype(np.int16), IMAGES[:, :, ::2], np.zeros((1,) * 5, np.uint8)])
def test_only_contiguous_unsigned_bytes_are_written(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="unsigned bytes"):
        write_idx(tmp_path / "images", array)


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_items_are_written_one_by_one_and_have_to_fill_the_shape(tmp_path: Path, name: str) -> None:
    path, whole = tmp_path / name, tmp_path / f"whole-{name}"
    write_idx(whole, IMAGES)
    write_idx_items(path, IMAGES.shape, (image.tobytes() for image in IMAGES))
    before = path.read_bytes()
    assert before == whole.read_bytes()
    for items, missing in ((IMAGES[:-1], -IMAGES[0].size), ((*IMAGES, IMAGES[0]), IMAGES[0].size)):
        with pytest.raises(ValueError, match=rf"came with \{missing:+d} bytes"):
            write_idx_items(path, IMAGES.shape, (image.tobytes() for image in items))
    assert path.read_bytes() == before
