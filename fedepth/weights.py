"""Weights on disk: safetensors files, written as a stream and read tensor by tensor. numpy, no torch.

The format (https://huggingface.co/docs/safetensors, "Format"): 8 bytes little-endian length of the header,
the header as JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}}, then the tensors' bytes,
row-major and little-endian, without holes. It is parsed here by plain reads at offsets: safe_open for torch
reserves 330 MiB of address space, which a memory limit on the trainer refuses, and the pages of a memory
map count as the process's own.

Tensors lie in the file by falling size of their elements, then by name. So every tensor is aligned, and equal
weights give equal files and digests.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fedepth.errors import StateError
from fedepth.files import WrongFileError, open_regular, replacing
from fedepth.layout import DTYPES

Array = npt.NDArray[Any]

HEADER_LIMIT_BYTES = 16 << 20
SLICE_BYTES = 512 << 10  # with what is made of it, it stays in a processor's cache: twice as fast as 4 MiB
_DIMENSIONS_LIMIT = 32  # of numpy 1
_METADATA = "__metadata__"
_DTYPES = {name: np.dtype(code) for name, code in DTYPES.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def save(path: Path, tensors: Mapping[str, Array]) -> str:
    """Writes a safetensors file atomically and durably, and returns its sha256 (hex).

    The same tensors give the same bytes, in whatever order they come.

    Raises:
        StateError: a tensor's type has no name in the format.
    """
    for name, tensor in tensors.items():
        if tensor.dtype.newbyteorder("<") not in _NAMES:
            raise StateError(f"tensor {name} has type {tensor.dtype}; weights can be of {', '.join(_DTYPES)}")
    infos = {name: (_NAMES[tensor.dtype.newbyteorder("<")], tensor.shape) for name, tensor in tensors.items()}
    return write_tensors(path, infos, lambda name: (tensors[name],))


def write_tensors(
    path: Path,
    infos: Mapping[str, tuple[str, tuple[int, ...]]],
    pieces: Callable[[str], Iterable[Array]],
) -> str:
    """Writes a safetensors file from pieces, atomically and durably, and returns its sha256 (hex).

    Args:
        path: what to write.
        infos: name → (type, shape), as `Reader.info` gives it.
        pieces: called once for each name in the order of the file; the elements of that tensor in row-major
            order, in one or more arrays. Only one piece is held at a time.

    Raises:
        StateError: the pieces of a tensor do not have its number of elements. `path` is as it was.
    """
    names = sorted(infos, key=lambda name: (-_DTYPES[infos[name][0]].itemsize, name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        dtype, shape = infos[name]
        begin, end = end, end + math.prod(shape) * _DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with replacing(path) as file:
        for data in _file_pieces(text, names, infos, pieces):
            file.write(data)
            digest.update(data)
    return digest.hexdigest()


def load_numpy(path: Path) -> dict[str, Array]:
    """All tensors of a file, as arrays of their own.

    Raises:
        StateError: the file is missing or damaged.
    """
    with open_weights(path) as reader:
        return {name: reader.read(name) for name in reader.names}


def open_weights(path: Path, header_limit: int = HEADER_LIMIT_BYTES) -> Reader:
    """Reads the header of a safetensors file and checks it against the file's size.

    Raises:
        StateError: the file is missing or damaged, or its header has more than `header_limit` bytes.
    """
    return Reader(path, header_limit)


class Reader:
    """A safetensors file, read tensor by tensor with plain reads.

    Every read opens the file anew, so that hundreds of readers cost no file descriptors. Within
    `with reader:` the file stays open.
    """

    def __init__(self, path: Path, header_limit: int = HEADER_LIMIT_BYTES) -> None:
        self.path = path
        self._held: BufferedReader | None = None
        try:
            with open_regular(path) as file:
                self._size = os.fstat(file.fileno()).st_size
                header = _read_header(path, file, self._size, header_limit)
        except FileNotFoundError:
            raise StateError(f"there is no weights file {path}") from None
        except WrongFileError as error:
            raise StateError(f"{path} {error.strerror}") from None
        start = self._size - max((end for _, _, _, end in header.values()), default=0)
        self._tensors = {
            name: (dtype, shape, start + begin) for name, (dtype, shape, begin, _) in sorted(header.items())
        }

    def __enter__(self) -> Reader:
        self._held = open_regular(self.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, sorted."""
        return tuple(self._tensors)

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Type ("F32", "I64", …) and shape of a tensor.

        Raises:
            StateError: there is no such tensor.
        """
        dtype, shape, _ = self._find(name)
        return dtype, shape

    def read(self, name: str) -> Array:
        """One tensor as a fresh, writable array.

        Raises:
            StateError: there is no such tensor, or the file has changed since it was opened.
        """
        _, shape, _ = self._find(name)
        return self.read_flat(name, 0, math.prod(shape)).reshape(shape)

    def read_flat(self, name: str, first: int, count: int) -> Array:
        """`count` elements of a tensor from the element `first` on, in row-major order; shape (count,).

        Raises:
            StateError: see `read`.
            ValueError: the tensor has fewer elements.
        """
        dtype_name, shape, start = self._find(name)
        if not 0 <= first <= first + count <= math.prod(shape):
            raise ValueError(f"elements {first} to {first + count} of {name}, which has the shape {shape}")
        dtype = _DTYPES[dtype_name]
        array: Array = np.empty(count, dtype)
        with self._file() as file:
            file.seek(start + first * dtype.itemsize)
            got = file.readinto(array.view(np.uint8).data)
            size = os.fstat(file.fileno()).st_size
        if got != array.nbytes or size != self._size:
            raise StateError(
                f"{self.path} has {size} bytes, {self._size} when it was opened: something else writes to it"
            )
        return array

    def slices(self, name: str, limit_bytes: int = SLICE_BYTES) -> Iterator[Array]:
        """A tensor in flat pieces of at most `limit_bytes`, so that its size does not matter.

        Raises:
            StateError: see `read`.
        """
        dtype, shape, _ = self._find(name)
        count = math.prod(shape)
        step = max(1, limit_bytes // _DTYPES[dtype].itemsize)
        for first in range(0, count, step):
            yield self.read_flat(name, first, min(step, count - first))

    def _find(self, name: str) -> tuple[str, tuple[int, ...], int]:
        try:
            return self._tensors[name]
        except KeyError:
            raise StateError(f"{self.path} holds no tensor {name}") from None

    @contextmanager
    def _file(self) -> Iterator[BufferedReader]:
        if self._held is not None:
            yield self._held
            return
        try:
            file = open_regular(self.path)
        except FileNotFoundError:
            raise StateError(f"weights file {self.path} is gone since it was opened") from None
        with file:
            yield file


def _file_pieces(
    header: bytes,
    names: Iterable[str],
    infos: Mapping[str, tuple[str, tuple[int, ...]]],
    pieces: Callable[[str], Iterable[Array]],
) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for name in names:
        dtype, shape = infos[name]
        left = math.prod(shape)
        for piece in pieces(name):
            left -= piece.size
            if piece.size:
                yield np.ascontiguousarray(piece, _DTYPES[dtype]).reshape(-1).view(np.uint8).data
        if left:
            raise StateError(f"tensor {name} of shape {shape} came with {-left:+d} elements; nothing is written")


def _read_header(path: Path, file: BinaryIO, size: int, limit: int) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """name → (type, shape, begin, end), the offsets counted from the end of the header."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise StateError(f"{path} is damaged: {size} bytes cannot hold a header of {length}")
    if length > limit:
        raise StateError(f"{path} is damaged: a header of {length} bytes, at most {limit} are read")
    try:
        fields = json.loads(file.read(length), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise StateError(f"{path} is damaged: its header is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise StateError(f"{path} is damaged: its header is not a JSON object")
    fields.pop(_METADATA, None)
    tensors = {name: _entry(path, name, entry) for name, entry in fields.items()}
    expected = 0
    for name, (_, _, begin, end) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if begin != expected:
            raise StateError(f"{path} is damaged: tensor {name[:80]!r} begins at {begin}, expected {expected}")
        expected = end
    if 8 + length + expected != size:
        raise StateError(f"{path} is damaged: its tensors end at {8 + length + expected}, the file at {size}")
    return tensors


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if all(
            type(extent) is int and extent >= 0 for extent in shape
        ):
            pass
        case _:
            raise StateError(f"{path} is damaged: the entry of tensor {name[:80]!r} cannot be read")
    if dtype not in _DTYPES:
        raise StateError(
            f"{path}: tensor {name[:80]!r} is of type {dtype[:20]!r}; weights can be of {', '.join(_DTYPES)}"
        )
    # An extent of 0 must not hide others that no array can have.
    if len(shape) > _DIMENSIONS_LIMIT or math.prod(max(extent, 1) for extent in shape) >= 1 << 59:
        raise StateError(f"{path} is damaged: tensor {name[:80]!r} has the shape {str(shape)[:80]}")
    if not 0 <= begin <= end < 1 << 63:
        raise StateError(f"{path} is damaged: tensor {name[:80]!r} lies at {str(begin)[:20]} to {str(end)[:20]}")
    if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise StateError(f"{path} is damaged: tensor {name[:80]!r} of {dtype} {shape} lies at {begin} to {end}")
    return dtype, tuple(shape), begin, end


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name occurs twice")
    return fields
