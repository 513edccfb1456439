"""Which bytes of a weights file are which: what a device needs to fetch only the tensors that it lacks.

The segments of a file are its header and its tensors, in their order. Two segments with the same length and digest hold
the same bytes, whatever their names and wherever they lie. No numpy: idle agents load this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from fedepth.errors import ProtocolError, StateError
from fedepth.files import NOT_JSON, PIECE_BYTES, open_regular

DIGEST_CHARACTERS = 32  # of a sha256 in hex: what is put together is compared with the digest of the whole file
MOST_INDEX_BYTES = 4 << 20
MOST_HEADER_BYTES = 16 << 20
SMALL = 20  # an index is worth fetching where the weights are so many times as large

Segment = tuple[int, str]  # length in bytes, and the first digits of its sha256


class TensorIndex(msgspec.Struct, frozen=True):
    """The segments of a weights file, in their order."""

    segments: tuple[Segment, ...]

    @property
    def size_bytes(self) -> int:
        return sum(length for length, _ in self.segments)


class _Entry(msgspec.Struct):
    data_offsets: tuple[int, int]


def index_of(path: Path) -> TensorIndex:
    """The segments of a safetensors file, all of which is read.

    Raises:
        StateError: it is none.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > MOST_HEADER_BYTES:
            raise StateError(f"{path} has no header of tensors that could be read")
        text = file.read(length)
        try:
            fields = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
            fields.pop("__metadata__", None)
            spans = sorted(msgspec.json.decode(entry, type=_Entry).data_offsets for entry in fields.values())
        except NOT_JSON as error:
            raise StateError(f"{path} has no header of tensors that could be read: {error}") from None
        segments = [(8 + length, _short(hashlib.sha256(head + text)))]
        expected = 0
        for begin, end in spans:
            if begin != expected or end < begin:
                raise StateError(f"{path}: a tensor lies at {begin} to {end}, expected is one at {expected}")
            expected, left, digest = end, end - begin, hashlib.sha256()
            while left and (data := file.read(min(left, PIECE_BYTES))):
                digest.update(data)
                left -= len(data)
            if left:
                raise StateError(f"{path} ends within a tensor")
            if end > begin:
                segments.append((end - begin, _short(digest)))
    return TensorIndex(tuple(segments))


def encode_index(index: TensorIndex) -> bytes:
    """As JSON."""
    return msgspec.json.encode(index)


def decode_index(data: bytes, size_bytes: int) -> TensorIndex:
    """What `encode_index` gave, for a file of this size.

    Raises:
        ProtocolError: it is another one's, or none.
    """
    try:
        index = msgspec.json.decode(data, type=TensorIndex)
    except NOT_JSON as error:
        raise ProtocolError(f"an index of tensors cannot be read: {error}") from None
    if index.size_bytes != size_bytes or any(length <= 0 for length, _ in index.segments):
        raise ProtocolError(f"an index of {index.size_bytes} bytes came with weights of {size_bytes}")
    return index


def spans_of(index: TensorIndex) -> list[tuple[Segment, int]]:
    """Every segment, and where it begins."""
    spans, begin = [], 0
    for segment in index.segments:
        spans.append((segment, begin))
        begin += segment[0]
    return spans


def missing_ranges(index: TensorIndex, held_bytes: int, known: Iterable[Segment]) -> list[tuple[int, int]]:
    """The ranges of a file that are not among `known` segments, from `held_bytes` on. Neighbours are one range."""
    known = set(known)
    ranges: list[tuple[int, int]] = []
    for segment, begin in spans_of(index):
        end = begin + segment[0]
        if segment in known or end <= held_bytes:
            continue
        begin = max(begin, held_bytes)
        if ranges and ranges[-1][1] == begin:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((begin, end))
    return ranges


def known_segments(indexes: Sequence[tuple[Path, TensorIndex]]) -> dict[Segment, tuple[Path, int]]:
    """Where segments of these files lie: which file, and where in it."""
    return {segment: (path, begin) for path, index in indexes for segment, begin in spans_of(index)}


def _short(digest: hashlib._Hash) -> str:
    return digest.hexdigest()[:DIGEST_CHARACTERS]
