"""safetensors files from the network: whatever stands in the header, reading ends in tensors or in a StateError."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedepth.errors import StateError
from fedepth.weights import open_weights, save
from tests.fuzz.damage import NUMBERS, changed, damaged, documents, fuzzing

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "I64", "shape": [], "data_offsets": [24, 32]},
    "c": {"dtype": "U8", "shape": [0, 4], "data_offsets": [32, 32]},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "weights.safetensors"


def read(path: Path, data: bytes) -> bool:
    """Whether the file is one; every tensor of it is then read."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        reader = open_weights(path)
        for name in reader.names:
            dtype, shape = reader.info(name)
            assert reader.read(name).shape == shape
            assert sum(piece.size for piece in reader.slices(name)) == np.prod(shape, dtype=object)
            assert dtype
        return True
    except StateError as error:
        assert len(str(error)) < 500 + len(str(path))
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < (2 << 20) + 100 * len(data)


def file_of(header: Any, body: int = 32, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(body)


def test_the_file_that_is_damaged_below_is_one(path: Path) -> None:
    assert read(path, file_of(HEADER))


@fuzzing(300)
@given(changed(HEADER), st.sampled_from([32, 0, 8]))
def test_changed_headers(path: Path, header: Any, body: int) -> None:
    read(path, file_of(header, body))


@fuzzing(200)
@given(damaged(file_of(HEADER)))
def test_damaged_files(path: Path, data: bytes) -> None:
    read(path, data)


@fuzzing(100)
@given(st.binary(max_size=60))
def test_any_bytes(path: Path, data: bytes) -> None:
    read(path, data)


@fuzzing(100)
@given(st.lists(st.sampled_from([0, 1, 24, 32, *NUMBERS]), min_size=2, max_size=6), st.integers(0, 2**64 - 1))
def test_any_offsets_and_lengths(path: Path, numbers: list[int], length: int) -> None:
    pairs = [[begin, end] for begin, end in itertools.pairwise(numbers)]
    header = {
        f"t{place}": {"dtype": "U8", "shape": [max(0, end - begin)], "data_offsets": [begin, end]}
        for place, (begin, end) in enumerate(pairs)
    }
    read(path, file_of(header))
    read(path, file_of(HEADER, length=length))


@fuzzing(60)
@given(documents)
def test_any_document(path: Path, document: Any) -> None:
    read(path, file_of(document))
    read(path, file_of({"a": document}))


ENTRY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"[" * 200_000, id="deep lists"),
        pytest.param(b'{"a":' * 100_000, id="deep objects"),
        pytest.param(b'{"a":{"dtype":"U8","shape":' + b"[" * 50_000 + b"]" * 50_000 + b"}}", id="a deep shape"),
        pytest.param(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}', id="digits"),
        pytest.param(b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", id="a name twice"),
        pytest.param(b'{"a":{"dtype":"U8","shape":[0],"shape":[1],"data_offsets":[0,0]}}', id="a key twice"),
        pytest.param(b'{"a":{"dtype":"U8","shape":[' + b"0," * 40 + b'0],"data_offsets":[0,0]}}', id="dimensions"),
        pytest.param(b'{"a":{"dtype":"U8","shape":[' + b"0," * 99_999 + b'0],"data_offsets":[0,0]}}', id="shape"),
        pytest.param(b'{"\xff":' + ENTRY + b"}", id="no text"),
        pytest.param(b'{"a":{"dtype":"' + b"F" * 100_000 + b'","shape":[],"data_offsets":[0,0]}}', id="a long type"),
        pytest.param(b'{"' + b"n" * 100_000 + b'":3}', id="a long name"),
        pytest.param(b'{"a":{"dtype":"U8","shape":[1e400],"data_offsets":[0,0]}}', id="infinite"),
        pytest.param(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}', id="NaN"),
        pytest.param(b'{"a":{"dtype":"U8","shape":[true],"data_offsets":[false,true]}}', id="booleans"),
    ],
)
def test_headers_that_no_writer_makes(path: Path, header: bytes) -> None:
    assert not read(path, file_of(header, 0))


def test_a_header_longer_than_the_bound_is_not_read(tmp_path: Path) -> None:
    save(tmp_path / "w", {"a": np.ones(3, np.float32)})
    with pytest.raises(StateError, match="at most 10 are read"):
        open_weights(tmp_path / "w", 10)
