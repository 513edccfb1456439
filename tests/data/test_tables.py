"""Rows of a table as numbers and as features: exact numbers, and the same in numpy and in torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedepth.data.columns import Column
from fedepth.data.damage import RowError
from fedepth.data.tables import features, number_of, row_encoder
from fedepth.models.table_input import table_features
from fedepth.task import Category, TableSpec

SPEC = TableSpec(
    "label",
    ("age", "height"),
    (40.0, 170.0),
    (10.0, 8.0),
    (Category("colour", ("red", "green")), Category("size", ("1", "2", "3"))),
)


def test_a_row_is_kept_as_numbers() -> None:
    encode = row_encoder(SPEC)
    assert encode(["35", " 174 ", "green", "3"]) == [35.0, 174.0, 1, 2]
    assert encode([35, 174.0, " red", 2.0]) == [35.0, 174.0, 0, 1]
    row = encode(["", "NA", "blue", ""])
    assert math.isnan(row[0]) and math.isnan(row[1])
    assert row[2:] == [2, 3]


def test_a_category_that_is_a_whole_number_counts_with_and_without_a_point() -> None:
    spec = TableSpec("l", categorical=(Category("c", ("1", "2.0", "02", "3", "3.0")),))
    texts = ["1", "1.0", "1.00", 1.0, "2", "2.0", "02", "002", "3", "3.0", "1.5", "1."]
    assert [row_encoder(spec)([text])[0] for text in texts] == [0, 0, 0, 0, 1, 1, 2, 5, 3, 4, 5, 5]


def test_features_are_the_columns_normalised_indicators_and_slots() -> None:
    rows = np.array([[35.0, 174.0, 1, 2], [np.nan, 170.0, 2, 3], [40.0, np.nan, 0, 0]])
    expected = [
        [-0.5, 0.5, 0, 0, 0, 1, 0, 0, 0, 1, 0],
        [0.0, 0.0, 1, 0, 0, 0, 1, 0, 0, 0, 1],
        [0.0, 0.0, 0, 1, 1, 0, 0, 1, 0, 0, 0],
    ]
    found = features(rows, SPEC)
    assert found.dtype == np.float32
    assert found.tolist() == expected
    assert SPEC.features == 11
    assert table_features(torch.from_numpy(rows), SPEC).tolist() == expected


@pytest.mark.parametrize(
    "spec", [SPEC, TableSpec("l", ("a",), (1.0,), (3.0,)), TableSpec("l", categorical=(Category("c", ("x",)),))]
)
def test_torch_makes_the_same_features_to_the_bit(spec: TableSpec) -> None:
    rng = np.random.default_rng(3)
    numbers = rng.standard_normal((50, len(spec.numeric))) * 1e6
    numbers[rng.random(numbers.shape) < 0.2] = np.nan
    slots = [rng.integers(0, each.slots, 50) for each in spec.categorical]
    rows = np.column_stack([numbers, *slots])
    found = table_features(torch.from_numpy(rows), spec).numpy()
    assert found.tobytes() == features(rows, spec).tobytes()
    assert features(rows[:0], spec).shape == (0, spec.features)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("1.5", 1.5), (" -2e3 ", -2000.0), ("+7", 7.0), ("0x", None), (True, 1.0), (3, 3.0), (1e18, 1e18), ("1E9", 1e9),
    ],
)  # fmt: skip
def test_numbers_are_read_as_python_writes_them(value: object, number: float | None) -> None:
    if number is None:
        with pytest.raises(RowError, match="is not a number"):
            number_of(value)
    else:
        assert number_of(value) == number


@pytest.mark.parametrize("value", ["", " ", "NA", "n/a", "NaN", "null", "None", "?", None, math.nan])
def test_what_stands_for_a_missing_number(value: object) -> None:
    assert math.isnan(number_of(value))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("1,5", "'1,5', which is not a number: write decimals with a point"),
        ("1.234,5", "without marks between thousands"),
        ("1,234.5", "without marks between thousands"),
        ("1 234 567", "without marks between thousands"),
        ("1_000", "'1_000', which is not a number"),
        ("12 kg", "'12 kg', which is not a number"),
        ("inf", "numbers go up to 1e+18"),
        ("1e300", "numbers go up to 1e+18"),
        (10**400, "which is not a number"),
        ("\x1b[2J", r"'\x1b[2J', which is not a number"),
        ("9" * 500, "numbers go up to 1e+18"),
    ],
)
def test_what_is_no_number_is_said(value: object, words: str) -> None:
    with pytest.raises(RowError) as caught:
        number_of(value)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 200


def test_the_column_of_a_bad_number_is_named() -> None:
    with pytest.raises(RowError, match="column 'height' is 'tall', which is not a number"):
        row_encoder(SPEC)(["1", "tall", "red", "1"])


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.integers(0, 3))
def test_mean_and_deviation_of_a_column(numbers: list[float], missing: int) -> None:
    column = Column("x")
    for value in [*numbers, *[None] * missing]:
        column.add(value)
    assert (column.numbers, column.missing) == (len(numbers), missing)
    assert math.isclose(column.mean, np.mean(numbers), rel_tol=1e-9, abs_tol=1e-9)
    expected = np.std(numbers)
    assert math.isclose(column.std, expected or 1.0, rel_tol=1e-6, abs_tol=1e-3) or len({*numbers}) == 1


def test_far_from_0_the_deviation_is_kept() -> None:
    column = Column("year in seconds")
    for value in (1.7e9, 1.7e9 + 1, 1.7e9 + 2):
        column.add(str(value))
    assert column.mean == 1.7e9 + 1
    assert math.isclose(column.std, math.sqrt(2 / 3))
