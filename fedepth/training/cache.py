"""The cached inputs of a stage: computed once, read once per epoch, in RAM or in a file.

Both places hold rows of bytes, one per sample. Pixels are kept as they are. Activations are kept as float32, or by the
job's choice as float16 (half the bytes) or uint8 (a quarter: 256 even steps between a sample's smallest and largest
value, which lead the row).

The file is read and written with plain calls. A memory map would do as well for speed, but its pages count as resident
and would hide what training needs. One file serves all stages of a task: a stage's rows are written over those that
they are computed from, so that the disk holds, and a memory card wears by, no more than the largest cache.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from fedepth.errors import DiskError, StateError
from fedepth.plan import CachePlace, CacheType
from fedepth.sizes import format_size

_RANGE_BYTES = 8  # a row of uint8 begins with its smallest value and its step, both float32
_STEPS = 255
# For larger ones the kernel takes huge pages, which a virtual machine may have to get from its host first: a tenth of
# the speed (benchmarks/trainer_settings.py).
_PIECE_BYTES = 256 << 10


@dataclass(frozen=True)
class RowFormat:
    """How a sample becomes a row of bytes.

    Attributes:
        shape: of a sample, such as (channels, height, width).
        kind: None for data as they are stored: pixels, token ids, numbers.
        channels_last: maps are kept in the memory format of the model that makes and reads them. To copy them into
            another and back takes as long as to write them.
        stored: the type of data that are kept as they are stored.
    """

    shape: tuple[int, ...]
    kind: CacheType | None
    channels_last: bool = False
    stored: torch.dtype = torch.uint8

    @property
    def row_bytes(self) -> int:
        values = torch.Size(self.shape).numel()
        return values * self.stored.itemsize if self.kind is None else self.kind.row_bytes(values)

    def encode(self, batch: torch.Tensor) -> torch.Tensor:
        """(n, *shape) as rows (n, row_bytes) of uint8."""
        if self._permuted:
            batch = batch.permute(0, 2, 3, 1)
        rows = batch.flatten(1).contiguous()
        if self.kind is None or self.kind is CacheType.FLOAT32:
            return rows.view(torch.uint8)
        if self.kind is CacheType.FLOAT16:
            return rows.to(torch.float16).view(torch.uint8)
        low, high = rows.aminmax(dim=1, keepdim=True)
        step = ((high - low) / _STEPS).clamp_min_(torch.finfo(torch.float32).tiny)
        levels = rows.sub(low).div_(step).round_().to(torch.uint8)
        return torch.cat((low.view(torch.uint8), step.view(torch.uint8), levels), dim=1)

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """What `encode` was given: data as they are stored, or float32 activations as exactly as `kind` keeps them."""
        if self.kind is None:
            batch = rows.view(self.stored)
        elif self.kind is CacheType.FLOAT32:
            batch = rows.view(torch.float32)
        elif self.kind is CacheType.FLOAT16:
            batch = rows.view(torch.float16).float()
        else:
            low, step = (rows[:, at : at + 4].reshape(-1).view(torch.float32)[:, None] for at in (0, 4))
            batch = rows[:, _RANGE_BYTES:].float().mul_(step).add_(low)
        if not self._permuted:
            return batch.view(len(rows), *self.shape)
        channels, height, width = self.shape
        return batch.view(len(rows), height, width, channels).permute(0, 3, 1, 2)

    @property
    def _permuted(self) -> bool:
        return self.channels_last and len(self.shape) == 3


class Inputs(Protocol):
    """What a stage trains on: samples of one shape."""

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        """The samples at `indices` (n,), as a new tensor (n, *shape)."""


class Cache(Inputs, Protocol):
    """Samples that were computed before."""

    rows: RowFormat

    def write(self, start: int, batch: torch.Tensor) -> None:
        """Stores `batch` (n, *shape) at positions start..start+n-1."""

    def close(self) -> None:
        """Gives memory and file back; a second time does nothing."""


def open_cache(place: CachePlace, folder: Path, count: int, rows: RowFormat, source: Cache | None = None) -> Cache:
    """An empty cache of `count` samples, on disk in `folder`.

    On disk it takes over the file of `source`, which its rows are computed from: see `filling_order`.

    Raises:
        DiskError: the disk has no room for it.
    """
    if place is CachePlace.RAM:
        return RamCache(count, rows)
    return DiskCache(folder, count, rows, source if isinstance(source, DiskCache) else None)


def filling_order(count: int, batch: int, rows: RowFormat, source: Cache | None) -> Iterator[range]:
    """The positions 0..count-1 in batches, so that in a file shared with `source` no row is lost before it was read.

    Rows that are not larger than their source's lie before them, so they are written from the first to the last;
    larger ones lie behind, so from the last to the first.
    """
    starts = range(0, count, batch)
    grows = source is not None and rows.row_bytes > source.rows.row_bytes
    for start in reversed(starts) if grows else starts:
        yield range(start, min(start + batch, count))


class RamCache:
    def __init__(self, count: int, rows: RowFormat) -> None:
        self.rows = rows
        # Filled, so that all of it is resident from the start on, and a stage does not grow while it runs.
        self._values: torch.Tensor | None = torch.full((count, rows.row_bytes), 0, dtype=torch.uint8)

    def write(self, start: int, batch: torch.Tensor) -> None:
        assert self._values is not None
        self._values[start : start + len(batch)] = self.rows.encode(batch)

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        assert self._values is not None
        return self.rows.decode(self._values[indices])

    def close(self) -> None:
        self._values = None


class DiskCache:
    """Rows in a file without a name: however its process ends, its space is free again."""

    def __init__(self, folder: Path, count: int, rows: RowFormat, source: DiskCache | None) -> None:
        self.rows = rows
        self._folder = folder
        self._file: int | None = source.share() if source else _nameless_file(folder)
        wanted = count * rows.row_bytes - os.fstat(self._file).st_size
        disk = os.statvfs(folder)
        if wanted > disk.f_bavail * disk.f_frsize:
            self.close()
            raise DiskError(
                f"the cached inputs of {count} samples need another {format_size(wanted)} in {folder}, where only "
                f"{format_size(disk.f_bavail * disk.f_frsize)} is free; free some space there, or set cache_type to "
                "float16 or uint8 in the job file",
                needed_bytes=count * rows.row_bytes,
            )

    def share(self) -> int:
        """A descriptor of the file, for a cache that takes it over."""
        assert self._file is not None
        return os.dup(self._file)

    def write(self, start: int, batch: torch.Tensor) -> None:
        assert self._file is not None
        data = self.rows.encode(batch).numpy().data.cast("B")
        offset = start * self.rows.row_bytes
        while data:
            try:
                written = os.pwrite(self._file, data[:_PIECE_BYTES], offset)
            except OSError as error:
                raise DiskError(self._broken(f"cannot be written: {error.strerror}")) from error
            data = data[written:]
            offset += written

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        assert self._file is not None
        size = self.rows.row_bytes
        values = torch.empty((len(indices), size), dtype=torch.uint8)
        data = values.numpy().data.cast("B")
        for row, index in enumerate(indices.tolist()):
            try:
                got = os.preadv(self._file, [data[row * size : (row + 1) * size]], index * size)
            except OSError as error:
                raise DiskError(self._broken(f"cannot be read: {error.strerror}")) from error
            if got != size:
                raise StateError(self._broken(f"are damaged: {got} of {size} bytes at row {index}"))
        return self.rows.decode(values)

    def _broken(self, how: str) -> str:
        return f"the cached inputs in {self._folder} {how}; check that disk"

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _nameless_file(folder: Path) -> int:
    try:
        with tempfile.TemporaryFile(buffering=0, dir=folder) as file:
            return os.dup(file.fileno())
    except OSError as error:
        raise DiskError(
            f"no file for cached inputs can be made in {folder}: {error.strerror}; make it writable"
        ) from error
