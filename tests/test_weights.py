"""Weights files: against the safetensors library both ways, and what damage does."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedepth import files
from fedepth.errors import StateError
from fedepth.files import file_digest, replacing, write_atomically
from fedepth.weights import load_numpy, open_weights, save, write_tensors

# Without a deadline: an fsync takes as long as it takes.
steady = settings(derandomize=True, deadline=None, max_examples=50)
DTYPES = ["?", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8"]
tensor_dicts = st.dictionaries(
    st.text(max_size=12),
    st.sampled_from(DTYPES).flatmap(lambda d: npst.arrays(d, npst.array_shapes(min_dims=0, min_side=0, max_side=4))),
    max_size=5,
).filter(lambda tensors: "__metadata__" not in tensors)


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Equal to the bit, NaN included."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and left[name].tobytes() == right[name].tobytes()
        for name in left
    )


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: tuple[Any, ...] = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@steady
@given(tensors=tensor_dicts)
def test_what_is_saved_is_what_the_safetensors_library_reads(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "saved.safetensors"
    digest = save(path, tensors)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest() == file_digest(path)
    assert same(safetensors.numpy.load(path.read_bytes()), tensors)
    assert same(load_numpy(path), tensors)


@steady
@given(tensors=tensor_dicts)
def test_what_the_safetensors_library_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "foreign.safetensors"
    path.write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    assert same(load_numpy(path), tensors)


def test_the_order_of_the_tensors_does_not_change_the_file(tmp_path: Path) -> None:
    tensors = {"b": np.arange(3, dtype="f4"), "a": np.array(5), "c": np.ones((2, 2), "f4")}
    first = save(tmp_path / "1", tensors)
    second = save(tmp_path / "2", dict(reversed(tensors.items())))
    assert first == second
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    path = tmp_path / "w"
    save(path, {"a": np.ones(3, "f4"), "b": np.array(7), "c": np.ones(1, "u1"), "d": np.ones(1, "f2")})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert length % 8 == 0
    assert {name: item["data_offsets"][0] for name, item in header.items()} == {
        "b": 0,
        "a": 8,
        "d": 20,
        "c": 22,
    }


def test_a_transposed_tensor_is_saved_in_row_major_order(tmp_path: Path) -> None:
    tensor = np.arange(6, dtype="f4").reshape(2, 3).T
    save(tmp_path / "w", {"t": tensor})
    assert load_numpy(tmp_path / "w")["t"].tolist() == tensor.tolist()


def test_a_big_endian_tensor_keeps_its_values(tmp_path: Path) -> None:
    save(tmp_path / "w", {"t": np.array([1.0, 2.0], ">f4")})
    assert load_numpy(tmp_path / "w")["t"].tolist() == [1.0, 2.0]


def test_a_reader_tells_names_types_and_shapes_and_reads_writable_arrays(tmp_path: Path) -> None:
    path = tmp_path / "w"
    save(path, {"b": np.ones((2, 3), "f4"), "a": np.array(5)})
    reader = open_weights(path)
    assert reader.names == ("a", "b")
    assert reader.info("b") == ("F32", (2, 3))
    assert reader.info("a") == ("I64", ())
    array = reader.read("b")
    array[0, 0] = 9
    assert reader.read("b")[0, 0] == 1
    with pytest.raises(StateError, match="no tensor c"):
        reader.read("c")


def test_slices_are_bounded_and_complete(tmp_path: Path) -> None:
    save(tmp_path / "w", {"t": np.arange(10, dtype="f4").reshape(2, 5)})
    pieces = list(open_weights(tmp_path / "w").slices("t", limit_bytes=12))
    assert [piece.size for piece in pieces] == [3, 3, 3, 1]
    assert np.concatenate(pieces).tolist() == list(range(10))


def test_a_flat_read_outside_the_tensor_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "w", {"t": np.arange(4, dtype="f4"), "u": np.arange(4, dtype="f4")})
    reader = open_weights(tmp_path / "w")
    assert reader.read_flat("t", 1, 3).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="elements 2 to 5"):
        reader.read_flat("t", 2, 3)


def test_readers_cost_no_file_descriptors_and_a_with_block_holds_one(tmp_path: Path) -> None:
    save(tmp_path / "w", {"t": np.ones(4, "f4")})
    before = open_descriptors()
    readers = [open_weights(tmp_path / "w") for _ in range(5)]
    assert sum(reader.read("t").sum() for reader in readers) == 20
    assert open_descriptors() == before
    with readers[0] as reader:
        (tmp_path / "w").unlink()
        assert reader.read("t").sum() == 4
    assert open_descriptors() == before
    with pytest.raises(StateError, match="gone"):
        readers[1].read("t")


def test_a_file_that_changed_size_since_it_was_opened_is_noticed(tmp_path: Path) -> None:
    save(tmp_path / "w", {"t": np.ones(4, "f4")})
    reader = open_weights(tmp_path / "w")
    with open(tmp_path / "w", "ab") as file:
        file.write(b"x")
    with pytest.raises(StateError, match="something else writes"):
        reader.read("t")


def test_a_missing_file_is_a_state_error(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no weights file"):
        open_weights(tmp_path / "absent")


@pytest.mark.parametrize(
    ("header", "data"),
    [
        pytest.param(b"{", b"", id="no JSON"),
        pytest.param(b"[" * 100_000, b"", id="deep nesting"),
        pytest.param(b"\xff\xfe{}", b"", id="no UTF-8"),
        pytest.param([], b"", id="no object"),
        pytest.param({"t": 3}, b"", id="entry is no object"),
        pytest.param({"t": {"dtype": "F32", "shape": [2]}}, bytes(8), id="no offsets"),
        pytest.param({"t": entry(dtype="BF16", end=4)}, bytes(4), id="unknown type"),
        pytest.param({"t": entry(shape=(-2,))}, bytes(8), id="negative extent"),
        pytest.param({"t": entry(shape=(2.0,))}, bytes(8), id="fractional extent"),
        pytest.param({"t": entry(shape=(True, 2))}, bytes(8), id="boolean extent"),
        pytest.param({"t": entry(begin=0.0)}, bytes(8), id="fractional offset"),
        pytest.param({"t": entry(shape=(3,))}, bytes(8), id="shape and offsets differ"),
        pytest.param({"t": entry(shape=(0, 1 << 62), end=0)}, b"", id="impossible empty shape"),
        pytest.param({"t": entry(shape=(1,) * 33, end=4)}, bytes(4), id="too many dimensions"),
        pytest.param({"t": entry(begin=4, end=12)}, bytes(12), id="hole at the start"),
        pytest.param({"t": entry(), "u": entry(begin=4, end=12)}, bytes(12), id="overlap"),
        pytest.param({"t": entry(begin=-8, end=0)}, bytes(8), id="negative offset"),
        pytest.param({"t": entry()}, bytes(7), id="data cut off"),
        pytest.param({"t": entry()}, bytes(9), id="data behind the last tensor"),
        pytest.param(
            b'{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            bytes(1),
            id="name twice",
        ),
    ],
)
def test_a_damaged_header_is_a_state_error(tmp_path: Path, header: object, data: bytes) -> None:
    path = raw_file(tmp_path / "w", header, data)
    with pytest.raises(StateError, match="w"):
        open_weights(path)


@pytest.mark.parametrize("content", [b"", b"\x01\x00\x00", (9).to_bytes(8, "little") + b"{}"])
def test_a_file_too_short_for_its_header_is_a_state_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(StateError, match="cannot hold a header"):
        open_weights(tmp_path / "w")


def test_a_header_over_its_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "w"
    with open(path, "wb") as file:  # sparse
        file.write(((16 << 20) + 1).to_bytes(8, "little"))
        file.truncate((16 << 20) + 100)
    with pytest.raises(StateError, match="at most 16777216"):
        open_weights(path)
    save(path, {"t": np.ones(1, "f4")})
    with pytest.raises(StateError, match="at most 10 "):
        open_weights(path, header_limit=10)


@steady
@given(cut=st.integers(min_value=0, max_value=140))
def test_any_truncation_is_noticed(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.getbasetemp() / "whole"
    save(path, {"a": np.ones((2, 3), "f4"), "b": np.array(1)})
    data = path.read_bytes()
    assert len(data) > 140
    path.write_bytes(data[:cut])
    with pytest.raises(StateError):
        open_weights(path)


def test_a_type_without_a_name_in_the_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="tensor t has type complex64"):
        save(tmp_path / "w", {"t": np.ones(1, "c8")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [3, 5])
def test_pieces_of_the_wrong_length_leave_the_old_file(tmp_path: Path, count: int) -> None:
    path = tmp_path / "w"
    save(path, {"t": np.ones(4, "f4")})
    with pytest.raises(StateError, match="tensor t"):
        write_tensors(path, {"t": ("F32", (4,))}, lambda name: [np.zeros(count, "f4")])
    assert load_numpy(path)["t"].tolist() == [1, 1, 1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["w"]


def test_pieces_are_asked_for_one_at_a_time(tmp_path: Path) -> None:
    alive: list[str] = []

    def pieces(name: str) -> Iterator[Any]:
        for part in ("1", "2"):
            alive.append(name + part)
            yield np.full(2, float(part), "f4")

    write_tensors(tmp_path / "w", {"b": ("F32", (4,)), "a": ("F32", (2, 2))}, pieces)
    assert alive == ["a1", "a2", "b1", "b2"]
    assert load_numpy(tmp_path / "w")["a"].tolist() == [[1, 1], [2, 2]]


def test_an_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [file.name for file in tmp_path.iterdir()] == ["f"]


def test_a_failed_replacement_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["f"]


def test_a_write_to_a_read_only_disk_names_the_file_that_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a disk refuses to delete as well, even what is not there."""

    def refused(path: Any, *_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        patch.setattr(Path, "unlink", refused)
        with pytest.raises(OSError, match="Read-only") as caught:
            write_atomically(tmp_path / "f", b"new")
    assert caught.value.filename == str(tmp_path / "f")


def test_a_file_is_made_durable_before_it_is_renamed_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        steps.append(f"fsync {'folder' if target.is_dir() else target.stat().st_size}")
        real_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        steps.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write_atomically(tmp_path / "f", b"12345")
    assert steps == ["fsync 5", "rename", "fsync folder"]


def test_the_digest_of_a_file_longer_than_one_piece(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    assert len(data) > files.PIECE_BYTES
    (tmp_path / "f").write_bytes(data)
    assert file_digest(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_every_type_of_the_layout_that_numpy_knows_can_be_stored(tmp_path: Path) -> None:
    from fedepth.layout import ITEM_BYTES

    for dtype in ITEM_BYTES.keys() - {"BF16"}:
        write_tensors(tmp_path / "w", {"t": (dtype, (3,))}, lambda name: [np.zeros(3)])
        assert open_weights(tmp_path / "w").read("t").itemsize == ITEM_BYTES[dtype]
