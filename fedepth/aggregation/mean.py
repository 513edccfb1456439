"""The weighted mean of a tensor, streamed from files: a few slices of 4 MiB, however many updates there are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedepth.aggregation.updates import read_change, spans
from fedepth.weights import Array, Reader


@dataclass(frozen=True)
class Term:
    """What one update gives to the mean of a tensor.

    Attributes:
        scale: what its change is multiplied by before it is averaged; 1 for the update as it is.
    """

    reader: Reader
    weight: float
    scale: float = 1.0


def weighted_mean(old: Reader, name: str, terms: Sequence[Term]) -> Iterator[Array]:
    """The mean of a tensor, as float64 in flat slices; summed in the order of `terms`, at least one."""
    total = math.fsum(term.weight for term in terms)
    for first, length in spans(old, name):
        mean = np.zeros(length, np.float64)
        product = np.empty(length, np.float64)
        for term in terms:
            # `out` alone would not do: numpy multiplies float32 by a Python float in float32, then widens.
            np.multiply(_values(old, name, term, first, length), term.weight, out=product, dtype=np.float64)
            mean += product
        mean /= total
        yield mean


def _values(old: Reader, name: str, term: Term, first: int, length: int) -> Array:
    if term.scale == 1:
        return term.reader.read_flat(name, first, length)
    values = read_change(old, term.reader, name, first, length)
    values *= term.scale
    values += old.read_flat(name, first, length)
    return values
