"""The cached inputs of a stage: computed once, read once per epoch, in RAM or in a file.

Both places hold rows of bytes, one per sample. Pixels are kept as they are. Activations are kept as float32, or by the
job's choice as float16 (half the bytes) or uint8 (a quarter: 256 even steps between a sample's smallest and largest
value, which lead the row).

The file is read and written with plain calls. A memory map would do as well for speed, but its pages count as resident
and would hide what training needs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from fedepth.task import CachePlace, CacheType

_RANGE_BYTES = 8  # a row of uint8 begins with its smallest value and its step, both float32
_STEPS = 255


@dataclass(frozen=True)
class RowFormat:
    """How a sample becomes a row of bytes.

    Attributes:
        shape: of a sample, such as (channels, height, width).
        kind: None for pixels, which are bytes already.
        channels_last: maps are kept in the memory format of the model that makes and reads them. To copy them into
            another and back takes as long as to write them.
    """

    shape: tuple[int, ...]
    kind: CacheType | None
    channels_last: bool = False

    @property
    def row_bytes(self) -> int:
        values = torch.Size(self.shape).numel()
        return values if self.kind is None else self.kind.row_bytes(values)

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
        """What `encode` was given: uint8 pixels, or float32 activations as exactly as `kind` keeps them."""
        if self.kind is None:
            batch = rows
        elif self.kind is CacheType.FLOAT32:
            batch = rows.view(torch.float32)
        elif self.kind is CacheType.FLOAT16:
            batch = rows.view(torch.float16).float()
        else:
            low, step = (rows[:, at : at + 4].contiguous().view(torch.float32) for at in (0, 4))
            batch = rows[:, _RANGE_BYTES:].float().mul_(step).add_(low)
        if not self._permuted:
            return batch.view(len(rows), *self.shape)
        channels, height, width = self.shape
        return batch.view(len(rows), height, width, channels).permute(0, 3, 1, 2)

    @property
    def _permuted(self) -> bool:
        return self.channels_last and len(self.shape) == 3


class Cache(Protocol):
    """`count` samples of one shape."""

    def write(self, start: int, batch: torch.Tensor) -> None:
        """Stores `batch` (n, *shape) at positions start..start+n-1."""

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        """The samples at `indices` (n,), as a new tensor (n, *shape)."""

    def close(self) -> None:
        """Gives memory and file back; a second time does nothing."""


def open_cache(place: CachePlace, path: Path, count: int, rows: RowFormat) -> RamCache | DiskCache:
    """An empty cache of `count` samples; `path` is used on disk only."""
    return RamCache(count, rows) if place is CachePlace.RAM else DiskCache(path, rows)


class RamCache:
    def __init__(self, count: int, rows: RowFormat) -> None:
        self._format = rows
        # Filled, so that all of it is resident from the start on, and a stage does not grow while it runs.
        self._rows: torch.Tensor | None = torch.full((count, rows.row_bytes), 0, dtype=torch.uint8)

    def write(self, start: int, batch: torch.Tensor) -> None:
        assert self._rows is not None
        self._rows[start : start + len(batch)] = self._format.encode(batch)

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        assert self._rows is not None
        return self._format.decode(self._rows[indices])

    def close(self) -> None:
        self._rows = None


class DiskCache:
    def __init__(self, path: Path, rows: RowFormat) -> None:
        self._path = path
        self._format = rows
        self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)

    def write(self, start: int, batch: torch.Tensor) -> None:
        assert self._file is not None
        data = self._format.encode(batch).numpy().data.cast("B")
        offset = start * self._format.row_bytes
        while data:
            written = os.pwrite(self._file, data, offset)
            data = data[written:]
            offset += written

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        assert self._file is not None
        size = self._format.row_bytes
        rows = torch.empty((len(indices), size), dtype=torch.uint8)
        data = rows.numpy().data.cast("B")
        for row, index in enumerate(indices.tolist()):
            got = os.preadv(self._file, [data[row * size : (row + 1) * size]], index * size)
            if got != size:
                raise OSError(f"{self._path}: {got} of {size} bytes at row {index}")
        return self._format.decode(rows)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._path.unlink()
            self._file = None
