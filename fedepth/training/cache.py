"""The cached inputs of a stage: computed once, read once per epoch, in RAM or in a file.

Both places hold rows of bytes, one per sample. Pixels are kept as they are. Activations are kept as float32, or by the
job's choice as float16 (half the bytes) or uint8 (a quarter: 256 even steps between a sample's smallest and largest
value, which lead the row).

The file is read and written with plain calls. A memory map would do as well for speed, but its pages count as resident
and would hide what training needs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from fedepth.task import CachePlace, CacheType

_RANGE_BYTES = 8  # a row of uint8 begins with its smallest value and its step, both float32
_STEPS = 255


def encode(batch: torch.Tensor, kind: CacheType | None) -> torch.Tensor:
    """(n, *shape) as rows (n, bytes) of uint8; `kind` None takes pixels, which are bytes already."""
    rows = batch.flatten(1).contiguous()
    if kind is None or kind is CacheType.FLOAT32:
        return rows.view(torch.uint8)
    if kind is CacheType.FLOAT16:
        return rows.to(torch.float16).view(torch.uint8)
    low, high = rows.aminmax(dim=1, keepdim=True)
    step = ((high - low) / _STEPS).clamp_min_(torch.finfo(torch.float32).tiny)
    levels = rows.sub(low).div_(step).round_().to(torch.uint8)
    return torch.cat((low.view(torch.uint8), step.view(torch.uint8), levels), dim=1)


def decode(rows: torch.Tensor, kind: CacheType | None, shape: Sequence[int]) -> torch.Tensor:
    """What `encode` was given: uint8 pixels, or float32 activations as exactly as `kind` keeps them."""
    if kind is None:
        batch = rows
    elif kind is CacheType.FLOAT32:
        batch = rows.view(torch.float32)
    elif kind is CacheType.FLOAT16:
        batch = rows.view(torch.float16).float()
    else:
        low, step = (rows[:, at : at + 4].contiguous().view(torch.float32) for at in (0, 4))
        batch = rows[:, _RANGE_BYTES:].float().mul_(step).add_(low)
    return batch.view(len(rows), *shape)


def row_bytes(shape: Sequence[int], kind: CacheType | None) -> int:
    """Bytes of one cached sample."""
    values = torch.Size(shape).numel()
    return values if kind is None else kind.row_bytes(values)


class Cache(Protocol):
    """`count` samples of one shape."""

    def write(self, start: int, batch: torch.Tensor) -> None:
        """Stores `batch` (n, *shape) at positions start..start+n-1."""

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        """The samples at `indices` (n,), as a new tensor (n, *shape)."""

    def close(self) -> None:
        """Gives memory and file back; a second time does nothing."""


def open_cache(
    place: CachePlace, path: Path, count: int, shape: Sequence[int], kind: CacheType | None
) -> RamCache | DiskCache:
    """An empty cache of `count` samples; `path` is used on disk only."""
    if place is CachePlace.RAM:
        return RamCache(count, shape, kind)
    return DiskCache(path, shape, kind)


class RamCache:
    def __init__(self, count: int, shape: Sequence[int], kind: CacheType | None) -> None:
        self._shape, self._kind = tuple(shape), kind
        # Filled, so that all of it is resident from the start on, and a stage does not grow while it runs.
        self._rows: torch.Tensor | None = torch.full((count, row_bytes(shape, kind)), 0, dtype=torch.uint8)

    def write(self, start: int, batch: torch.Tensor) -> None:
        assert self._rows is not None
        self._rows[start : start + len(batch)] = encode(batch, self._kind)

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        assert self._rows is not None
        return decode(self._rows[indices], self._kind, self._shape)

    def close(self) -> None:
        self._rows = None


class DiskCache:
    def __init__(self, path: Path, shape: Sequence[int], kind: CacheType | None) -> None:
        self._path = path
        self._shape, self._kind = tuple(shape), kind
        self._row_bytes = row_bytes(shape, kind)
        self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)

    def write(self, start: int, batch: torch.Tensor) -> None:
        assert self._file is not None
        data = encode(batch, self._kind).numpy().data.cast("B")
        offset = start * self._row_bytes
        while data:
            written = os.pwrite(self._file, data, offset)
            data = data[written:]
            offset += written

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        assert self._file is not None
        rows = torch.empty((len(indices), self._row_bytes), dtype=torch.uint8)
        data = rows.numpy().data.cast("B")
        for row, index in enumerate(indices.tolist()):
            target = data[row * self._row_bytes : (row + 1) * self._row_bytes]
            got = os.preadv(self._file, [target], index * self._row_bytes)
            if got != self._row_bytes:
                raise OSError(f"{self._path}: {got} of {self._row_bytes} bytes at row {index}")
        return decode(rows, self._kind, self._shape)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._path.unlink()
            self._file = None
