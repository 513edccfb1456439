"""Rules that look at all holders of a coordinate at once: trimmed mean and median, from stacks of slices.

A stack has one row per update and 16 MiB at most: the more updates, the shorter the rows. Below 4 KiB a row it would be
mostly opening files, so that more than 4,096 updates take more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from fedepth.aggregation.updates import tensor_spans
from fedepth.encoding import DecodedPart
from fedepth.weights import SLICE_BYTES, Array

STACK_BYTES = 16 << 20
SHORTEST_ROW_BYTES = 4 << 10


def stacks(parts: Sequence[DecodedPart], name: str, limit_bytes: int = STACK_BYTES) -> Iterator[Array]:
    """A tensor of all `parts` in float64 slices, shape (updates, elements). Each is overwritten by the next."""
    row_bytes = min(max(limit_bytes // len(parts), SHORTEST_ROW_BYTES), SLICE_BYTES)
    elements = min(row_bytes // 8, math.prod(parts[0].info(name)[1]))
    whole: Array = np.empty((len(parts), elements), np.float64)
    for first, length in tensor_spans(parts[0], name, row_bytes // 8):
        stack = whole[:, :length]  # the last may be shorter
        for row, part in zip(stack, parts, strict=True):
            row[:] = part.read_flat(name, first, length)
        yield stack


def trimmed_mean(parts: Sequence[DecodedPart], name: str, cut: int) -> Iterator[Array]:
    """Per coordinate, the mean without the `cut` smallest and the `cut` largest values, in flat slices."""
    kept = len(parts) - 2 * cut
    for stack in stacks(parts, name):
        stack.sort(axis=0)
        mean = stack[cut : cut + kept].sum(axis=0)
        mean /= kept
        # Rounding must not lead out of the range of what was averaged.
        yield np.clip(mean, stack[cut], stack[cut + kept - 1], out=mean)


def median(parts: Sequence[DecodedPart], name: str) -> Iterator[Array]:
    """Per coordinate, the value in the middle, or the mean of the two in the middle: all but these are trimmed."""
    return trimmed_mean(parts, name, (len(parts) - 1) // 2)
