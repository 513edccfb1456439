"""Chunks in any order, of any size: a file grows by what fits, or not at all."""

from __future__ import annotations

from pathlib import Path

from fedepth_wire.chunks import append
from hypothesis import given
from hypothesis import strategies as st

from fedepth.errors import ProtocolError
from tests.fuzz.damage import fuzzing

DATA = bytes(range(64))
numbers = st.integers(-2, 66) | st.sampled_from([2**63 - 1, -(2**63)])


@fuzzing(200)
@given(st.lists(st.tuples(numbers, st.binary(max_size=40)), max_size=8), st.integers(0, 64), st.booleans())
def test_any_sequence_of_chunks(
    tmp_path_factory: object, chunks: list[tuple[int, bytes]], total: int, honest: bool
) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "partial"  # type: ignore[attr-defined]
    path.write_bytes(b"")
    held = 0
    for offset, data in chunks:
        before = path.read_bytes()
        assert len(before) == held
        if honest:
            offset, data = held, DATA[held : held + len(data)]
        try:
            held = append(path, offset, data, held, total)
        except ProtocolError as error:
            assert path.read_bytes() == before
            assert len(str(error)) < 300
        else:
            assert path.read_bytes() == before + data
            assert held <= total
    if honest:
        assert path.read_bytes() == DATA[:held]
