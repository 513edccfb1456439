"""IDX files on a device, gzipped or not, with any damage."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedepth.data.idx import IdxFile
from fedepth.data.scan import scan
from fedepth.errors import DataError
from tests.fuzz.damage import damaged, fuzzing

IMAGES = struct.pack(">HBBIII", 0, 8, 3, 3, 2, 2) + bytes(range(12))
LABELS = struct.pack(">HBBI", 0, 8, 1, 3) + bytes([0, 1, 0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def read(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    tracemalloc.start()
    try:
        file = IdxFile(path, 3)
        items = file.read_items(range(min(len(file), 100)))
        assert len(items) == min(len(file), 100) * file.item_bytes
        for _ in file.pieces():
            pass
    except DataError as error:
        assert len(str(error)) < 500 + len(str(path))
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20


@fuzzing(200)
@given(damaged(IMAGES))
def test_damaged_files(folder: Path, data: bytes) -> None:
    read(folder / "images-idx3-ubyte", data)


@fuzzing(200)
@given(damaged(gzip.compress(IMAGES, mtime=0)) | damaged(IMAGES).map(lambda data: gzip.compress(data, mtime=0)))
def test_damaged_gzipped_files(folder: Path, data: bytes) -> None:
    read(folder / "images-idx3-ubyte.gz", data)


@fuzzing(100)
@given(st.lists(st.sampled_from([0, 1, 2, 2**16, 2**31 - 1, 2**31, 2**32 - 1]), min_size=3, max_size=3))
def test_headers_that_claim_anything(folder: Path, extents: list[int]) -> None:
    header = struct.pack(">HBBIII", 0, 8, 3, *extents)
    read(folder / "images-idx3-ubyte", header)
    read(folder / "images-idx3-ubyte.gz", gzip.compress(header + bytes(1 << 16), mtime=0))


@fuzzing(100)
@given(damaged(LABELS), damaged(IMAGES), st.booleans())
def test_a_scan_of_damaged_files(folder: Path, labels: bytes, images: bytes, classes: bool) -> None:
    (folder / "train-labels-idx1-ubyte").write_bytes(labels)
    (folder / "train-images-idx3-ubyte").write_bytes(images)
    try:
        summary = scan(folder, ("a", "b") if classes else None)
        assert sum(summary.class_counts) == summary.sample_count
    except DataError as error:
        assert len(str(error)) < 1000 + len(str(folder))
