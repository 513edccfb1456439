"""Trimmed mean and median, by numbers worked out by hand; their memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedepth.aggregation.aggregate import Aggregated, aggregate
from fedepth.aggregation.coordinates import SHORTEST_ROW_BYTES, STACK_BYTES, stacks
from fedepth.aggregation.rules import Median, Rule, TrimmedMean
from fedepth.aggregation.updates import ClientUpdate
from fedepth.weights import SLICE_BYTES, load_numpy, open_weights, save, write_tensors
from tests.aggregation.update_files import client, f4


def combine(folder: Path, rule: Rule, *columns: tuple[float, ...]) -> tuple[list[float], Aggregated]:
    """One tensor "a" of one update per entry of `columns`."""
    save(folder / "base", {"a": f4(*(0.0 for _ in columns[0]))})
    updates = [client(folder, f"c{index}", 1 + index, {"a": f4(*values)}) for index, values in enumerate(columns)]
    told = aggregate(folder / "base", updates, folder / "out", rule)
    result: list[float] = load_numpy(folder / "out")["a"].tolist()
    return result, told


def test_trimming_cuts_the_share_off_each_end_of_every_coordinate(tmp_path: Path) -> None:
    columns = [(1.0, 50.0), (2.0, 40.0), (9.0, 30.0), (1e6, -1e6), (3.0, 20.0)]
    result, told = combine(tmp_path, TrimmedMean(0.2), *columns)
    assert result == [np.float32(14 / 3), 30.0]  # (2 + 3 + 9) / 3, (20 + 30 + 40) / 3
    assert told.notes == ()


@pytest.mark.parametrize(
    ("trim", "holders", "cut"), [(0.1, 9, 0), (0.1, 10, 1), (0.29, 100, 29), (0.49, 3, 1), (0.4, 5, 2), (0.3, 1, 0)]
)
def test_what_is_cut_at_each_end(trim: float, holders: int, cut: int) -> None:
    assert TrimmedMean(trim).cut(holders) == cut


def test_too_few_to_trim_get_the_plain_mean_and_it_is_told(tmp_path: Path) -> None:
    result, told = combine(tmp_path, TrimmedMean(0.2), (1.0,), (2.0,), (4.0,), (9.0,))
    assert result == [4.0]  # unweighted
    assert told.notes == (
        "1 tensors, such as a, were trained by 4 devices or fewer, too few to cut off 0.2 of them at each end: "
        "they got the plain mean",
    )


def test_the_median_of_an_odd_number_is_the_middle_and_of_an_even_one_lies_between_two(tmp_path: Path) -> None:
    assert combine(tmp_path, Median(), (5.0, 1.0), (1e9, 2.0), (-3.0, 8.0))[0] == [5.0, 2.0]
    assert combine(tmp_path, Median(), (5.0, 1.0), (1e9, 2.0), (-3.0, 8.0), (6.0, 4.0))[0] == [5.5, 3.0]


def test_the_median_of_two_is_their_mean_and_it_is_told(tmp_path: Path) -> None:
    result, told = combine(tmp_path, Median(), (1.0,), (4.0,))
    assert result == [2.5]
    assert told.notes == ("1 tensors, such as a, were trained by 1 or 2 devices, whose median is their mean",)


@pytest.mark.parametrize("rule", [TrimmedMean(0.34), Median()])
def test_a_tensor_is_combined_over_its_holders_and_integers_are_rounded(tmp_path: Path, rule: Rule) -> None:
    save(tmp_path / "base", {"a": f4(0), "b": f4(7), "n": np.array(0), "nobody": f4(-1)})
    updates = [
        client(tmp_path, "x", 1, {"a": f4(1), "n": np.array(10)}),
        client(tmp_path, "y", 5, {"a": f4(2), "b": f4(3), "n": np.array(-4)}),
        client(tmp_path, "z", 9, {"a": f4(300), "b": f4(4)}),
    ]
    aggregate(tmp_path / "base", updates, tmp_path / "out", rule)
    result = {name: tensor.tolist() for name, tensor in load_numpy(tmp_path / "out").items()}
    assert result == {"a": [2.0], "b": [3.5], "n": 3, "nobody": [-1.0]}


values = st.lists(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=3, max_size=3), min_size=1, max_size=7)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(rows=values, trim=st.floats(0.01, 0.49), kind=st.sampled_from(["trimmed", "median"]))
def test_the_result_lies_within_the_range_of_the_values(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[float]], trim: float, kind: str
) -> None:
    rule = TrimmedMean(trim) if kind == "trimmed" else Median()
    result, _ = combine(tmp_path_factory.getbasetemp(), rule, *(tuple(row) for row in rows))
    for value, column in zip(result, zip(*rows, strict=True), strict=True):
        assert min(column) <= value <= max(column)


def test_a_minority_cannot_move_the_median_beyond_the_honest_ones(tmp_path: Path) -> None:
    honest = [(1.0,), (1.5,), (2.0,)]
    for poison in (1e30, -1e30):
        (value,), _ = combine(tmp_path, Median(), *honest, (poison,), (poison,))
        assert 1.0 <= value <= 2.0


@pytest.mark.parametrize("count", [1, 3, 50, 3000])
def test_rows_get_shorter_with_the_number_of_updates(tmp_path: Path, count: int) -> None:
    length = SLICE_BYTES // 8 + 5 if count <= 3 else 9000
    save(tmp_path / "one", {"a": np.arange(length, dtype=np.float32)})
    reader = open_weights(tmp_path / "one")
    # A tenth of the limit, so that the test is fast.
    found = [stack.shape for stack in stacks([reader] * count, "a", STACK_BYTES // 10)]
    assert sum(length for _, length in found) == length
    row_bytes = max(length for _, length in found) * 8
    assert count * row_bytes <= STACK_BYTES // 10 or row_bytes == SHORTEST_ROW_BYTES


def test_no_row_is_longer_than_a_slice(tmp_path: Path) -> None:
    save(tmp_path / "one", {"a": np.zeros(SLICE_BYTES // 4, np.float32)})
    shapes = [stack.shape for stack in stacks([open_weights(tmp_path / "one")], "a")]
    assert shapes == [(1, SLICE_BYTES // 8)] * 2


@pytest.mark.parametrize("rule", [TrimmedMean(0.2), Median()])
def test_memory_is_one_stack_whatever_the_model_and_the_number_of_updates(tmp_path: Path, rule: Rule) -> None:
    count = (1 << 18) - 4  # 1 MiB each; as float64, all of them are 80 MiB, and the last stack is shorter
    for name in ("base", *(f"c{index}" for index in range(40))):
        write_tensors(tmp_path / name, {"a": ("F32", (count,))}, lambda _: (np.ones(count // 4, np.float32),) * 4)
    updates = [ClientUpdate((tmp_path / f"c{index}",), 1) for index in range(40)]
    tracemalloc.start()
    try:
        aggregate(tmp_path / "base", updates, tmp_path / "out", rule)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert STACK_BYTES <= peak < STACK_BYTES + 4 * SLICE_BYTES
