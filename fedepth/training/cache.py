"""The cached inputs of a stage: computed once, read once per epoch, in RAM or in a file.

The file is read and written with plain calls. A memory map would do as well for speed, but its pages count as resident
and would hide what training needs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from fedepth.task import CachePlace


class Cache(Protocol):
    """`count` samples of one shape and dtype."""

    def write(self, start: int, batch: torch.Tensor) -> None:
        """Stores `batch` (n, *shape) at positions start..start+n-1."""

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        """The samples at `indices` (n,), as a new tensor (n, *shape)."""

    def close(self) -> None:
        """Gives memory and file back."""


def open_cache(
    place: CachePlace, path: Path, count: int, shape: Sequence[int], dtype: torch.dtype
) -> RamCache | DiskCache:
    """An empty cache of `count` samples; `path` is used on disk only."""
    if place is CachePlace.RAM:
        return RamCache(count, shape, dtype)
    return DiskCache(path, shape, dtype)


class RamCache:
    def __init__(self, count: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._data: torch.Tensor | None = torch.empty((count, *shape), dtype=dtype)

    def write(self, start: int, batch: torch.Tensor) -> None:
        assert self._data is not None
        self._data[start : start + len(batch)] = batch

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        assert self._data is not None
        return self._data[indices]

    def close(self) -> None:
        self._data = None


class DiskCache:
    def __init__(self, path: Path, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._path = path
        self._shape = tuple(shape)
        self._dtype = dtype
        self._row_bytes = torch.empty(self._shape, dtype=dtype, device="meta").nbytes
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)

    def write(self, start: int, batch: torch.Tensor) -> None:
        data = batch.to(self._dtype).contiguous().numpy().data.cast("B")
        offset = start * self._row_bytes
        while data:
            written = os.pwrite(self._file, data, offset)
            data = data[written:]
            offset += written

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        batch = torch.empty((len(indices), *self._shape), dtype=self._dtype)
        rows = batch.numpy().data.cast("B")
        for row, index in enumerate(indices.tolist()):
            target = rows[row * self._row_bytes : (row + 1) * self._row_bytes]
            got = os.preadv(self._file, [target], index * self._row_bytes)
            if got != self._row_bytes:
                raise OSError(f"{self._path}: {got} of {self._row_bytes} bytes at row {index}")
        return batch

    def close(self) -> None:
        os.close(self._file)
        self._path.unlink()
