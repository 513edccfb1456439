"""Mean and standard deviation of a table's columns over all devices, from counts and sums that each makes of its own.

Sums of squares are of the differences from a device's own mean, and are put together as Chan, Golub and LeVeque do
(Updating formulae and a pairwise algorithm for computing sample variances, 1979, eq. 1.5): sums of plain squares lose
what numbers far from 0 differ by. Nothing else of the rows leaves a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedepth.errors import DataError

_ROUNDING = 1e-13  # of a mean: what differs by less is equal
_LEAST_STD = 1e-18  # that a job file may give: fedepth.job_sections.LEAST_FLOAT


@dataclass(frozen=True)
class ColumnSums:
    """Of the numeric columns of a table, in the order of its spec.

    Attributes:
        asked: a digest of the columns and classes that rows were gone through for (fedepth.data.row_files.asked_of).
        counts: rows with a number.
        means: of these; 0 where there are none.
        squares: sums of squared differences from the mean.
    """

    asked: str
    counts: tuple[int, ...]
    means: tuple[float, ...]
    squares: tuple[float, ...]


@dataclass(frozen=True)
class Statistics:
    """Of the numeric columns of a table, over all devices that were asked.

    Attributes:
        mean: of each column.
        std: standard deviations, in the sense of the whole population; 1 where all numbers are equal but for rounding.
        devices: how many were asked.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    devices: int


class RunningSums:
    """Adds up rows one by one."""

    def __init__(self, columns: int) -> None:
        self._counts = [0] * columns
        self._means = [0.0] * columns
        self._squares = [0.0] * columns

    def add(self, row: Sequence[float]) -> None:
        """Takes a row whose first values are those of the numeric columns, NaN where one is missing."""
        for place, value in enumerate(row[: len(self._counts)]):
            if math.isnan(value):
                continue
            self._counts[place] += 1
            before = value - self._means[place]
            self._means[place] += before / self._counts[place]
            self._squares[place] += before * (value - self._means[place])

    def total(self, asked: str) -> ColumnSums:
        """What has been added up."""
        return ColumnSums(asked, tuple(self._counts), tuple(self._means), tuple(self._squares))


def statistics_of(sums: Sequence[ColumnSums], columns: Sequence[str]) -> Statistics:
    """What all rows together have in the columns of these names.

    It depends on the order of `sums` in its last digits.

    Raises:
        DataError: nobody has a number in one of the columns.
    """
    means, deviations = [], []
    for place, column in enumerate(columns):
        count, mean, squares = 0, 0.0, 0.0
        for each in sums:
            more = each.counts[place]
            if not more:
                continue
            if not count:
                mean = each.means[place]  # to the last bit: equal numbers must not differ by how they were added up
            apart = each.means[place] - mean
            squares += each.squares[place] + apart * apart * count * more / (count + more)
            count += more
            mean += apart * more / count
        if not count:
            raise DataError(f"no device has a number in the column {column!r}; leave it out of [table] numeric")
        deviation = math.sqrt(max(0.0, squares / count))
        means.append(mean)
        deviations.append(deviation if deviation > max(_ROUNDING * abs(mean), _LEAST_STD) else 1.0)
    return Statistics(tuple(means), tuple(deviations), len(sums))
