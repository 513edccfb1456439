"""Rows of a table as numbers, and these as the features that a model takes. numpy.

A row is kept as one float64 for each column: a number as it is, NaN where it is missing; of a column with categories
the place of the value in its list, or the length of the list for a value that is missing or not in it. The features are
made of it when it is used, in this order:

    (x − mean) / std of every numeric column, 0 where x is missing, which is the mean
    1 for every numeric column whose x is missing, else 0
    for every column with categories a 1 in one of its slots: one for each value, and one for all others
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedepth.data.damage import RowError
from fedepth.data.labels import as_whole, normalised
from fedepth.data.records import as_text
from fedepth.job_sections import MOST_FLOAT
from fedepth.printable import quoted
from fedepth.task import TableSpec

# What stands for a number that is not there, whatever its case.
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})
MOST_NUMBER = MOST_FLOAT  # a difference or a quotient of two is finite in float32
_VALUE_SHOWN = 40
_COMMA = re.compile(r"[-+]?\d+,\d+")
_GROUPED = re.compile(r"[-+]?\d{1,3}([,. '\u00a0\u202f]\d{3})+([.,]\d+)?")


def number_of(value: Any) -> float:
    """A value of a numeric column: NaN where it is missing.

    Raises:
        RowError: it is something else.
    """
    if isinstance(value, str):
        text = value.strip()
        if text.casefold() in MISSING:
            return math.nan
        try:
            number = float(text)
        except ValueError:
            raise RowError(_not_a_number(text)) from None
        if "_" in text:
            raise RowError(_not_a_number(text))
    elif value is None:
        return math.nan
    else:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise RowError(_not_a_number(as_text(value))) from None
        if math.isnan(number):
            return number
    if not abs(number) <= MOST_NUMBER:
        raise RowError(f"is {quoted(as_text(value), _VALUE_SHOWN)}; numbers go up to {MOST_NUMBER:g}")
    return number


def row_encoder(spec: TableSpec) -> Callable[[Sequence[Any]], list[float]]:
    """From the values of a row, in the order of `spec.columns`, to the numbers that are kept of it.

    The function raises RowError, which names the column.
    """
    numeric = spec.numeric
    places = [(_places(each.values), len(each.values)) for each in spec.categorical]

    def encode(values: Sequence[Any]) -> list[float]:
        row = []
        for column, value in zip(numeric, values, strict=False):
            try:
                row.append(number_of(value))
            except RowError as error:
                raise RowError(f"column {quoted(column)} {error}") from None
        for (known, others), value in zip(places, values[len(numeric) :], strict=True):
            text = normalised(as_text(value).strip())
            row.append(known.get(text, known.get(as_whole(text), others)))
        return row

    return encode


def _places(values: Sequence[str]) -> Mapping[str, int]:
    """The place of each value; of a whole number also where another program writes it with a point."""
    exact = {normalised(value): place for place, value in enumerate(values)}
    return {**{as_whole(value): place for value, place in exact.items()}, **exact}


def features(rows: npt.NDArray[np.float64], spec: TableSpec) -> npt.NDArray[np.float32]:
    """(n, columns) rows as (n, features); see the module."""
    count = len(spec.numeric)
    found = np.zeros((len(rows), spec.features), np.float32)
    numbers = rows[:, :count]
    missing = np.isnan(numbers)
    scaled = (numbers - np.asarray(spec.mean)) / np.asarray(spec.std)
    found[:, :count] = np.where(missing, 0.0, scaled)
    found[:, count : 2 * count] = missing
    slots = rows[:, count:].astype(np.int64) + first_slots(spec)
    found[np.arange(len(rows))[:, None], 2 * count + slots] = 1
    return found


def first_slots(spec: TableSpec) -> npt.NDArray[np.int64]:
    """Where the slots of every column with categories begin, among those of all of them."""
    sizes = [each.slots for each in spec.categorical]
    return np.cumsum([0, *sizes[:-1]], dtype=np.int64)[: len(sizes)]


def _not_a_number(text: str) -> str:
    shown = quoted(text, _VALUE_SHOWN)
    if _COMMA.fullmatch(text):
        return f"is {shown}, which is not a number: write decimals with a point"
    if _GROUPED.fullmatch(text):
        return f"is {shown}, which is not a number: write it without marks between thousands, decimals with a point"
    return f"is {shown}, which is not a number"
