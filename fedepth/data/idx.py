"""IDX files, the format of MNIST (http://yann.lecun.com/exdb/mnist/), read by ranges. No numpy.

Two zero bytes, the element type (8: unsigned byte; labels may also be other integers), the number of dimensions,
each extent as 4 bytes big-endian, then the elements, big-endian, in row-major order.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import tempfile
import weakref
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from fedepth.errors import DataError
from fedepth.files import replacing

if TYPE_CHECKING:
    from typing_extensions import Buffer

_UNSIGNED_BYTE = 8
# Integers, by their type in the file: numpy's name, and the bytes of one.
_INTEGERS = {_UNSIGNED_BYTE: (">u1", 1), 9: (">i1", 1), 11: (">i2", 2), 12: (">i4", 4)}
_STRUCT_FORMATS = {">u1": ">B", ">i1": ">b", ">i2": ">h", ">i4": ">i"}
_KINDS = {
    _UNSIGNED_BYTE: "unsigned bytes",
    9: "signed bytes",
    11: "16-bit integers",
    12: "32-bit integers",
    13: "32-bit floats",
    14: "64-bit floats",
}
_GZIPPED = b"\x1f\x8b"
_COLOURS = (1, 3)
_DIMENSIONS_LIMIT = 4
_EXTENT_LIMIT = 1 << 31
_GZIP_RATIO = 1032  # deflate cannot do better (zlib's technical notes), so that a larger claim is false
_PIECE_BYTES = 1 << 20


def write_idx(path: Path, array: Buffer) -> None:
    """Writes a C-contiguous array of unsigned bytes as an IDX file; gzipped if the name ends with ".gz".

    Raises:
        ValueError: the array is not of unsigned bytes, or not contiguous, or has more than 4 dimensions.
    """
    view = memoryview(array)
    if view.format != "B" or not view.c_contiguous or not 1 <= view.ndim <= _DIMENSIONS_LIMIT:
        raise ValueError(f"an IDX file takes contiguous unsigned bytes, got {view.format!r} of {view.shape}")
    write_idx_items(path, view.shape or (), (view,))


def write_idx_items(path: Path, shape: Sequence[int], pieces: Iterable[Buffer]) -> None:
    """The same from pieces of unsigned bytes that make up an array of `shape`; one of them is held at a time.

    Raises:
        ValueError: they are more or fewer bytes than that; `path` is as it was.
    """
    left = math.prod(shape)
    header = struct.pack(f">HBB{len(shape)}I", 0, _UNSIGNED_BYTE, len(shape), *shape)
    with ExitStack() as files:
        file: Any = files.enter_context(replacing(path))
        if path.suffix == ".gz":
            # Without a name and a time stamp, so that equal data gives equal files.
            file = files.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0))
        file.write(header)
        for piece in pieces:
            file.write(piece)
            left -= memoryview(piece).nbytes
        if left:
            raise ValueError(f"items of shape {tuple(shape)} came with {-left:+d} bytes; nothing is written")


class IdxFile:
    """An IDX file of unsigned bytes, or one of integers; gzipped if its content is, whatever its name.

    Items are read where they are asked for. A gzipped file cannot be read so: the first read of items decompresses
    it into a nameless file, which is gone when this object is.

    Attributes:
        shape: (items, …).
        item_bytes: bytes per item.
        dtype: of its elements, as numpy names it: ">u1" for bytes.
    """

    def __init__(
        self, path: Path, dimensions: int | None, scratch: Path | None = None, *, any_integers: bool = False
    ) -> None:
        """Reads the header.

        Args:
            dimensions: that it has to have; None for any number of them.
            scratch: an existing folder for the decompressed file, on a disk; without one, the system's folder for
                temporary files, which may lie in memory.
            any_integers: signed ones, and of up to 4 bytes, are welcome too.

        Raises:
            DataError: the file is not an IDX file of unsigned bytes (or integers) in `dimensions` dimensions, or too
                short or too long for what its header says (a gzipped file: only if no compression could explain it).
        """
        self.path = path
        with open(path, "rb") as file:
            self._zipped = file.read(2) == _GZIPPED
        self._scratch = scratch
        self._plain: BinaryIO | None = None
        size = path.stat().st_size
        kind, self.shape = self._parse(dimensions, _INTEGERS if any_integers else (_UNSIGNED_BYTE,))
        self._start = 4 + 4 * len(self.shape)
        self.dtype, width = _INTEGERS[kind]
        self.item_bytes = width * math.prod(self.shape[1:])
        self._size = self._start + width * math.prod(self.shape)
        if self._size > size * _GZIP_RATIO if self._zipped else self._size != size:
            raise DataError(
                f"{path} is damaged: its header says {self.shape}, {self._size} bytes in all, it has {size}"
            )

    def __len__(self) -> int:
        return self.shape[0]

    def read_items(self, indices: Iterable[int]) -> bytes:
        """The items at `indices`, one after the other.

        Raises:
            IndexError: there is no such item.
            DataError: the file is damaged, or has shrunk since it was opened.
        """
        return b"".join(self._items(indices))

    def _items(self, indices: Iterable[int]) -> Iterator[bytes]:
        with ExitStack() as opened:
            file = self._decompressed() if self._zipped else opened.enter_context(open(self.path, "rb"))
            for index in indices:
                if not 0 <= index < self.shape[0]:
                    raise IndexError(f"item {index} of {self.shape[0]} in {self.path}")
                item = os.pread(file.fileno(), self.item_bytes, self._start + index * self.item_bytes)
                if len(item) != self.item_bytes:
                    raise DataError(f"{self.path} ends within item {index}; was it changed? Start again")
                yield item

    def pieces(self) -> Iterator[bytes]:
        """All items in pieces of at most 1 MiB, in order, in little memory even for a gzipped file.

        Raises:
            DataError: the file is damaged.
        """
        left = self._size - self._start
        try:
            with gzip.open(self.path) if self._zipped else open(self.path, "rb") as file:
                file.read(self._start)
                while left and (data := file.read(min(left, _PIECE_BYTES))):
                    left -= len(data)
                    yield data
                surplus = bool(file.read(1))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{self.path} is damaged: {error}") from None
        if left or surplus:
            raise DataError(
                f"{self.path} is damaged: its header says {self.shape}, it has "
                + ("more bytes than that" if surplus else f"{left} bytes less")
            )

    def values(self) -> Iterator[int]:
        """All elements, as integers, in order and in little memory.

        Raises:
            DataError: the file is damaged.
        """
        for piece in self.pieces():  # of whole elements: 1 MiB is a multiple of every width
            for (value,) in struct.iter_unpack(_STRUCT_FORMATS[self.dtype], piece):
                yield value

    def _decompressed(self) -> BinaryIO:
        if self._plain is None:
            plain = cast(BinaryIO, tempfile.TemporaryFile(dir=self._scratch))  # noqa: SIM115 - it is kept open
            weakref.finalize(self, plain.close)
            try:
                plain.write(bytes(self._start))
                for piece in self.pieces():
                    plain.write(piece)
                plain.flush()
            except BaseException:
                plain.close()
                raise
            self._plain = plain
        return self._plain

    def _read_start(self) -> bytes:
        try:
            with gzip.open(self.path) if self._zipped else open(self.path, "rb") as file:
                return file.read(4 + 4 * _DIMENSIONS_LIMIT)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{self.path} is damaged: {error}") from None

    def _parse(self, expected: int | None, kinds: Collection[int]) -> tuple[int, tuple[int, ...]]:
        """The element type and the shape."""
        start = self._read_start()
        kind, dimensions = (start[2], start[3]) if len(start) >= 4 else (0, 0)
        if start[:2] != bytes(2) or kind not in _KINDS or not 1 <= dimensions <= _DIMENSIONS_LIMIT:
            raise DataError(
                f"{self.path} is damaged or of another kind: it begins with {start[:4].hex(' ') or 'nothing'}, an IDX "
                f"file of unsigned bytes in 1 to {_DIMENSIONS_LIMIT} dimensions with 00 00 08 and their number"
            )
        if kind not in kinds:
            wanted = (
                "labels are integers of 1, 2 or 4 bytes" if len(kinds) > 1 else "items are unsigned bytes, 0 to 255"
            )
            raise DataError(f"{self.path} holds {_KINDS[kind]}, and {wanted}; write it again as these")
        if expected is not None and dimensions != expected:
            wanted = ": one number for each image" if expected == 1 else ""
            raise DataError(f"{self.path} has {dimensions} dimensions, and {expected} are expected{wanted}")
        if len(start) < 4 + 4 * dimensions:
            raise DataError(f"{self.path} is damaged: it ends within its header, after {len(start)} bytes")
        shape = struct.unpack_from(f">{dimensions}I", start, 4)
        if min(shape[1:], default=1) < 1 or max(shape) >= _EXTENT_LIMIT:
            raise DataError(f"{self.path} is damaged: its header says {shape}")
        return kind, shape


def place_of_colours(images: IdxFile) -> int | None:
    """Which dimension of a file of images holds red, green and blue, or the only gray; None where each is (H, W).

    Raises:
        DataError: these are no images, or nobody can say which dimension it is.
    """
    shape = images.shape
    if len(shape) == 3:
        return None
    places = [place for place in (1, 3) if len(shape) == 4 and shape[place] in _COLOURS]
    if len(places) == 1:
        return places[0]
    why = (
        f"both {shape[1]} and {shape[3]} may be the number of colours"
        if places
        else "images are of shape (height, width), (height, width, colours) or (colours, height, width), with 1 or 3 "
        "colours"
    )
    raise DataError(f"{images.path} holds items of shape {shape[1:]}, which cannot be read as images: {why}")
