"""The weighted mean of a tensor, streamed from files: a few slices of 512 KiB, however many updates there are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedepth.aggregation.updates import tensor_spans
from fedepth.encoding import DecodedPart
from fedepth.weights import Array, Reader


@dataclass(frozen=True)
class Term:
    """What one update gives to the mean of a tensor.

    Attributes:
        scale: what its change is multiplied by before it is averaged; 1 for the update as it is.
    """

    part: DecodedPart
    weight: float
    scale: float = 1.0


def weighted_mean(old: Reader, name: str, terms: Sequence[Term]) -> Iterator[Array]:
    """The mean of a tensor, as float64 in flat slices; summed in the order of `terms`, at least one."""
    total = math.fsum(term.weight for term in terms)
    for first, length in tensor_spans(old, name):
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
        return term.part.read_flat(name, first, length)
    values = term.part.change(name, first, length)
    values *= term.scale
    values += old.read_flat(name, first, length)
    return values
