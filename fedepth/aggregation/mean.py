"""The weighted mean of partial updates, per parameter, streamed from files to a file.

A parameter's new value is the mean over the clients that trained it, weighted by their numbers of samples;
one that nobody trained keeps its value. Where all clients train everything, this is FedAvg (McMahan et al.,
arXiv 1602.05629); with partial updates it is the aggregation of depth-wise training (arXiv 2303.04887).

Memory is a few slices of 4 MiB, whatever the size of the model and the number of clients. Sums run in float64
over the clients in the order of their files' paths, so that the result is the same bit for bit, in whatever
order they came.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedepth.errors import StateError
from fedepth.weights import SLICE_BYTES, Array, Reader, open_weights, write_tensors


@dataclass(frozen=True)
class ClientUpdate:
    """One client's checked update.

    Attributes:
        parts: its safetensors files; a tensor lies in at most one of them.
        weight: its weight in the mean, such as its number of samples; above 0.
    """

    parts: tuple[Path, ...]
    weight: float


def average(base: Path, updates: Sequence[ClientUpdate], output: Path) -> str:
    """Writes the mean of `updates` over `base` to `output`, and returns the sha256 (hex) of that file.

    Integer tensors get the rounded mean, computed in float64: exact up to 2^53. `output` may be `base`; it is
    replaced at the end, atomically and durably. Without updates it has the values of `base`.

    Raises:
        StateError: an update does not fit `base` or another file is damaged (`check_update` finds both
            before), a weight is not above 0, or the same file is given twice. `output` is as it was.
    """
    ordered = sorted(updates, key=lambda update: sorted(map(str, update.parts)))
    _check(ordered)
    with open_weights(base) as old:
        holders: dict[str, list[tuple[float, Reader]]] = {name: [] for name in old.names}
        for update in ordered:
            for name, reader in _tensors(update, old).items():
                holders[name].append((update.weight, reader))
        infos = {name: old.info(name) for name in old.names}
        return write_tensors(output, infos, lambda name: _mean(old, name, holders[name]))


def _check(updates: Sequence[ClientUpdate]) -> None:
    seen: set[Path] = set()
    for update in updates:
        if not (math.isfinite(update.weight) and update.weight > 0):
            raise StateError(f"the update {_name(update)} has the weight {update.weight}; it must be above 0")
        for path in update.parts:
            if path in seen:
                raise StateError(f"{path} is given twice; it would count twice")
            seen.add(path)


def _tensors(update: ClientUpdate, old: Reader) -> dict[str, Reader]:
    """The reader that holds each tensor of an update."""
    found: dict[str, Reader] = {}
    known = set(old.names)
    for path in update.parts:
        reader = open_weights(path)
        for name in reader.names:
            if name not in known:
                raise StateError(f"{path} holds a tensor {name[:80]!r} that {old.path} does not have")
            if name in found:
                raise StateError(f"{path} and {found[name].path} both hold the tensor {name}")
            if reader.info(name) != old.info(name):
                raise StateError(f"{path} holds {name} as {reader.info(name)}, {old.path} as {old.info(name)}")
            found[name] = reader
    return found


def _mean(old: Reader, name: str, holders: Sequence[tuple[float, Reader]]) -> Iterator[Array]:
    """The new value of a tensor, in flat slices."""
    if not holders:
        yield from old.slices(name)
        return
    dtype, shape = old.info(name)
    total = math.fsum(weight for weight, _ in holders)
    count = math.prod(shape)
    step = SLICE_BYTES // 8
    for first in range(0, count, step):
        length = min(step, count - first)
        mean = np.zeros(length, np.float64)
        term = np.empty(length, np.float64)
        for weight, reader in holders:
            piece = reader.read_flat(name, first, length)
            # `out` alone would not do: numpy multiplies float32 by a Python float in float32, then widens.
            np.multiply(piece, weight, out=term, dtype=np.float64)
            mean += term
        mean /= total
        # Rounding here: a cast to an integer type would cut off instead.
        yield (mean if dtype.startswith("F") else np.rint(mean)).astype(piece.dtype)


def _name(update: ClientUpdate) -> str:
    return str(update.parts[0]) if update.parts else "without parts"
