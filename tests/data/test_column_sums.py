"""Means and standard deviations of columns from the sums of several devices."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedepth.data.column_sums import ColumnSums, RunningSums, Statistics, statistics_of
from fedepth.data.row_files import asked_of
from fedepth.data.rows import check_rows
from fedepth.errors import DataError
from fedepth.task import Category, InputType, ModelSpec, TableSpec

TABLE = TableSpec("class", ("a", "b"), (), (), (Category("kind", ("x", "y")),))
SPEC = ModelSpec("table-mlp", ("no", "yes"), (7,), (), (), InputType.FLOAT, 0, None, TABLE)


def sums_of(rows: list[tuple[float, ...]], columns: int = 1) -> ColumnSums:
    running = RunningSums(columns)
    for row in rows:
        running.add(row)
    return running.total("asked")


def test_two_devices_by_hand() -> None:
    """1, 3 and 8 have the mean 4 and the squares 9 + 1 + 16 = 26; a missing number counts nowhere."""
    first, second = sums_of([(1.0,), (math.nan,), (3.0,)]), sums_of([(8.0,)])
    assert first == ColumnSums("asked", (2,), (2.0,), (2.0,))
    assert second == ColumnSums("asked", (1,), (8.0,), (0.0,))
    assert statistics_of([first, second], ["a"]) == Statistics((4.0,), (math.sqrt(26 / 3),), 2)


def test_equal_numbers_have_the_deviation_one() -> None:
    assert statistics_of([sums_of([(5.0,)]), sums_of([(5.0,), (5.0,)])], ["a"]) == Statistics((5.0,), (1.0,), 2)


@given(
    value=st.integers(-10_000, 10_000).map(lambda number: number / 1000) | st.floats(-1e15, 1e15),
    rows=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
)
def test_a_constant_has_the_deviation_one_however_its_rows_are_spread_over_devices(
    value: float, rows: list[int]
) -> None:
    found = statistics_of([sums_of([(value,)] * count) for count in rows], ["a"])
    assert (found.mean, found.std) == ((value,), (1.0,))


def test_numbers_that_differ_by_rounding_alone_are_equal() -> None:
    """0.1 and 0.30000000000000004 / 3, of a column that somebody has computed."""
    found = statistics_of([sums_of([(0.1,), (0.1,)]), sums_of([((0.1 + 0.1 + 0.1) / 3,)])], ["a"])
    assert found.std == (1.0,)
    small = statistics_of([sums_of([(1e-25,)]), sums_of([(3e-25,)])], ["a"])
    assert small.std == (1.0,)  # float32 cannot be computed with 1e-25


def test_a_column_without_any_number_is_named() -> None:
    with pytest.raises(DataError, match="no device has a number in the column 'a'"):
        statistics_of([sums_of([(math.nan,)]), sums_of([])], ["a"])


@given(
    devices=st.lists(st.lists(st.floats(-1e3, 1e3) | st.just(math.nan), max_size=20), min_size=1, max_size=6),
    shift=st.sampled_from([0.0, 1e9, -1e12]),
)
def test_any_split_over_devices_gives_what_all_rows_have(devices: list[list[float]], shift: float) -> None:
    """Also far from 0, where sums of squares would have lost every digit."""
    shifted = [[value + shift for value in rows] for rows in devices]
    numbers = np.array([value for rows in shifted for value in rows if not math.isnan(value)])
    sums = [sums_of([(value,) for value in rows]) for rows in shifted]
    if not len(numbers):
        with pytest.raises(DataError):
            statistics_of(sums, ["a"])
        return
    found = statistics_of(sums, ["a"])
    # Of the numbers as float64 holds them; numpy's own variance goes through the mean as well.
    spread = float(np.std(numbers))
    assert found.mean[0] == pytest.approx(float(np.mean(numbers)), rel=1e-12, abs=1e-9)
    if spread > 1e-2:
        assert found.std[0] == pytest.approx(spread, rel=1e-3)


def test_the_check_of_rows_adds_up_the_rows_that_are_taken(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("class,a,b,kind\nyes,1,10,x\nno,3,,y\nmaybe,100,5,x\nno,much,5,x\nno,2,20,z\n")
    found = check_rows(tmp_path, tmp_path / "record", SPEC)
    assert (found.count, found.damaged) == (3, 2)
    assert found.sums is not None
    assert found.sums.asked == asked_of(SPEC)
    assert found.sums.counts == (3, 2)
    assert found.sums.means == pytest.approx((2.0, 15.0))
    assert found.sums.squares == pytest.approx((2.0, 50.0))
    assert check_rows(tmp_path, tmp_path / "other").sums is None
