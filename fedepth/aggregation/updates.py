"""Updates as files: what they hold, whether they are still what was accepted, and their change, slice by slice."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedepth.encoding import DecodedPart, spans
from fedepth.errors import DamagedUpdateError, StateError
from fedepth.files import file_digest
from fedepth.weights import SLICE_BYTES, Array, Reader

_ELEMENTS = SLICE_BYTES // 8
_HASHED_AT_ONCE = 4


@dataclass(frozen=True)
class ClientUpdate:
    """One client's checked update.

    Attributes:
        parts: its safetensors files; a tensor lies in at most one of them.
        weight: its weight in a weighted mean, such as its number of samples; above 0.
        digests: the sha256 (hex) that each part was accepted with, in the order of `parts`; empty: not checked again.
        steps: optimizer steps of each of its stages: what its change is measured by.
    """

    parts: tuple[Path, ...]
    weight: float
    digests: tuple[str, ...] = ()
    steps: int = 1

    @property
    def name(self) -> str:
        return str(self.parts[0]) if self.parts else "without parts"


@dataclass(frozen=True)
class OpenUpdate:
    """An update whose headers have been read.

    Attributes:
        index: its place among the updates that were given.
        tensors: name → the part that holds that tensor, and decodes it.
    """

    index: int
    update: ClientUpdate
    tensors: Mapping[str, DecodedPart]


def check_digests(base: Path, base_digest: str | None, updates: Sequence[ClientUpdate]) -> None:
    """Reads every file whose digest is known, and compares.

    Raises:
        DamagedUpdateError: parts of updates are damaged or gone; names all of them.
        StateError: `base` is damaged.
    """
    if base_digest is not None and (what := _damage(base, base_digest)):
        raise StateError(f"{base} {what}; restore it from a backup")
    parts = [each for update in updates for each in zip(update.parts, update.digests, strict=bool(update.digests))]
    # Side by side: hashing holds no lock of Python's.
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as threads:
        wrong = threads.map(lambda part: _damage(*part), parts)
        damaged = {path: what for (path, _), what in zip(parts, wrong, strict=True) if what}
    if damaged:
        listed = "; ".join(f"{path} {what}" for path, what in damaged.items())
        raise DamagedUpdateError(
            f"{len(damaged)} parts of updates are not what was accepted: {listed}. Nothing was averaged; leave these "
            "updates out, and check the disk",
            paths=tuple(damaged),
        )


def open_updates(old: Reader, updates: Sequence[ClientUpdate]) -> list[OpenUpdate]:
    """The updates in the order of their files' paths, so that sums are the same to the last bit in whatever order they
    came.

    Raises:
        StateError: an update does not fit `old`, a weight is not above 0, or a file is given twice.
    """
    numbered = sorted(enumerate(updates), key=lambda item: sorted(map(str, item[1].parts)))
    seen: set[Path] = set()
    for _, update in numbered:
        if not (math.isfinite(update.weight) and update.weight > 0):
            raise StateError(f"the update {update.name} has the weight {update.weight}; it must be above 0")
        if update.steps < 1:
            raise StateError(f"the update {update.name} has {update.steps} steps; it must have at least 1")
        for path in update.parts:
            if path in seen:
                raise StateError(f"{path} is given twice; it would count twice")
            seen.add(path)
    return [OpenUpdate(index, update, held_tensors(old, update.parts)) for index, update in numbered]


def held_tensors(old: Reader, parts: Sequence[Path]) -> dict[str, DecodedPart]:
    """The part that holds each tensor of an update.

    Raises:
        StateError: a part is missing or damaged, or its tensors are not among those of `old`, once each.
    """
    found: dict[str, DecodedPart] = {}
    for path in parts:
        part = DecodedPart(old, path)
        for name in part.names:
            if name in found:
                raise StateError(f"{path} and {found[name].path} both hold the tensor {name}")
            found[name] = part
    return found


def is_floating(reader: Reader, name: str) -> bool:
    return reader.info(name)[0].startswith("F")


def tensor_spans(reader: Reader | DecodedPart, name: str, elements: int = _ELEMENTS) -> Iterator[tuple[int, int]]:
    """First element and length of each slice of a tensor."""
    return spans(math.prod(reader.info(name)[1]), elements)


def squared_change(tensors: Mapping[str, DecodedPart], names: Sequence[str]) -> float:
    """The sum of squares of an update's change over the named tensors, in float64. Infinite where it overflows."""
    sums = []
    with np.errstate(over="ignore", invalid="ignore"):
        for name in names:
            for first, length in tensor_spans(tensors[name], name):
                sums.append(sum_of_squares(tensors[name].change(name, first, length)))
    total = sum(sums)
    return total if math.isfinite(total) else math.inf


def sum_of_squares(values: Array) -> float:
    """Of a flat float64 array. Not `values @ values`: the threads of BLAS spin for a while when they have no work any
    more, which took a twelfth of the processors while updates came."""
    return float(np.einsum("i,i->", values, values))


def _damage(path: Path, digest: str) -> str:
    """What is wrong with a file that should have this digest; empty if nothing is."""
    try:
        actual = file_digest(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EIO):
            raise
        return f"cannot be read ({error.strerror})"
    return "" if actual == digest else f"has sha256 {actual[:12]}…, recorded was {digest[:12]}…"
