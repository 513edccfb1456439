"""The index of a weights file: which of its bytes are in other files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedepth.errors import ProtocolError, StateError
from fedepth.tensor_index import (
    TensorIndex,
    decode_index,
    encode_index,
    index_of,
    known_segments,
    missing_ranges,
    spans_of,
)
from fedepth.weights import save


def weights(path: Path, **values: float) -> Path:
    save(path, {name: np.full((7, 11), value, np.float32) for name, value in values.items()})
    return path


def test_a_file_is_its_segments(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    save(path, {"a": np.zeros((3, 4), np.float32), "b": np.ones(5, np.float32), "empty": np.zeros(0, np.float32)})
    index = index_of(path)
    header, first, second = index.segments
    assert (first[0], second[0], index.size_bytes) == (48, 20, path.stat().st_size)
    assert decode_index(encode_index(index), path.stat().st_size) == index
    assert spans_of(index) == [(header, 0), (first, header[0]), (second, header[0] + 48)]


def test_equal_tensors_are_known_whatever_they_are_called(tmp_path: Path) -> None:
    old = index_of(weights(tmp_path / "old", a=1, b=2, c=3))
    new = index_of(weights(tmp_path / "new", a=1, b=5, c=6, d=2))
    known = known_segments([(tmp_path / "old", old)])
    begins = [begin for _, begin in spans_of(new)]
    assert missing_ranges(new, 0, known) == [(0, begins[1]), (begins[2], begins[4])]  # header; b and c, which touch
    assert missing_ranges(new, begins[2] + 5, known) == [(begins[2] + 5, begins[4])]
    assert missing_ranges(new, begins[4], known) == []
    path, place = known[new.segments[4]]
    assert path.read_bytes()[place:][: 7 * 11 * 4] == np.full((7, 11), 2, np.float32).tobytes()


segments = st.lists(st.tuples(st.integers(1, 20), st.sampled_from("abcd")), min_size=1, max_size=12)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(segments, st.sets(st.sampled_from("abcd")), st.integers(0, 250))
def test_ranges_and_known_segments_are_all_of_the_rest(
    wanted: list[tuple[int, str]], held: set[str], begin: int
) -> None:
    index = TensorIndex(tuple(wanted))
    known = {segment for segment in index.segments if segment[1] in held}
    rest: set[int] = set()
    for first, last in missing_ranges(index, begin, known):
        assert first < last and not rest & set(range(first, last))
        rest |= set(range(first, last))
    for segment, place in spans_of(index):
        own = set(range(max(place, begin), place + segment[0]))
        assert own.isdisjoint(rest) if segment in known else own <= rest


@pytest.mark.parametrize("data", [b"", b"\xff" * 20, b"\2\0\0\0\0\0\0\0[]", b"\2\0\0\0\0\0\0\0{}x"[:9]])
def test_what_is_no_weights_file_has_no_index(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(StateError, match="file has no header of tensors"):
        index_of(tmp_path / "file")


def test_a_file_that_is_cut_or_has_holes_has_no_index(tmp_path: Path) -> None:
    path = weights(tmp_path / "file", a=1)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(StateError, match="file ends within a tensor"):
        index_of(path)
    path.write_bytes(data.replace(b"[0,308]", b"[8,308]"))
    with pytest.raises(StateError, match="a tensor lies at 8 to 308, expected is one at 0"):
        index_of(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"{", "cannot be read"),
        (b'{"segments":[[-5,"a"],[15,"b"]]}', "an index of 10 bytes came with weights of 10"),
        (b'{"segments":[[9,"a"]]}', "an index of 9 bytes came with weights of 10"),
    ],
)
def test_an_index_that_cannot_be_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        decode_index(data, 10)
