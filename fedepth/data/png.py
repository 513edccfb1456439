"""What Pillow leaves open of PNG files: chunks that are spoilt, colours of cICP, rows that are missing.

PNG specification (third edition, https://www.w3.org/TR/png-3/). Standard library only.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from itertools import takewhile
from typing import BinaryIO, NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_EXIF_AS_TEXT = b"Raw profile type "  # ImageMagick's way, which Pillow understands
_PIECE_BYTES = 1 << 20
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Of the seven passes of an interlaced image: first column and row, and steps (section 8.1).
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


class Chunk(NamedTuple):
    """A chunk's name, and where its data lies."""

    name: bytes
    start: int
    length: int


def chunks(file: BinaryIO) -> Iterator[Chunk]:
    """The chunks of a PNG, up to the first that is not whole."""
    size, place = os.fstat(file.fileno()).st_size, len(SIGNATURE)
    while len(head := os.pread(file.fileno(), 8, place)) == 8:
        length, name = struct.unpack(">I4s", head)
        if place + 12 + length > size:
            return
        yield Chunk(name, place + 8, length)
        place += 12 + length


def without_spoilt(file: BinaryIO) -> BytesIO | None:
    """A PNG without what no viewer needs and Pillow may stumble over: ancillary chunks with a wrong checksum (a viewer
    ignores them, section 13.2) and text. None if there is no such thing.
    """
    kept, spoilt, end = [SIGNATURE], False, len(SIGNATURE)
    for name, start, length in chunks(file):
        whole = os.pread(file.fileno(), length + 12, start - 8)
        end = start + length + 4
        is_ancillary = bool(name[0] & 0x20)
        is_text = name in _TEXT and not whole[8:].startswith(_EXIF_AS_TEXT)
        if is_ancillary and (is_text or zlib.crc32(whole[4:-4]) != int.from_bytes(whole[-4:], "big")):
            spoilt = True
        else:
            kept.append(whole)
    file.seek(end)
    return BytesIO(b"".join((*kept, file.read()))) if spoilt else None


def coding(file: BinaryIO) -> tuple[int, int, int, int] | None:
    """The four numbers of a cICP chunk (section 11.3.2.6): primaries, transfer, matrix, full range."""
    for name, start, length in takewhile(lambda chunk: chunk.name != b"IDAT", chunks(file)):
        if name == b"cICP" and length == 4:
            primaries, transfer, matrix, full = os.pread(file.fileno(), 4, start)
            return primaries, transfer, matrix, full
    return None


def objection(file: BinaryIO) -> str:
    """What bars a PNG from being read, by its chunks; empty if nothing does."""
    names = [name for name, _, _ in takewhile(lambda chunk: chunk.name != b"IDAT", chunks(file))]
    if b"CgBI" in names:
        return "as Apple packs it for apps (CgBI)"
    if os.pread(file.fileno(), 1, 25) == b"\3" and b"PLTE" not in names:
        return "without its palette"
    return ""


def bits_of(file: BinaryIO) -> int:
    """Of a sample, as IHDR has it (section 11.2.1)."""
    return os.pread(file.fileno(), 1, 24)[0]


def is_interlaced(file: BinaryIO) -> bool:
    """Whether its pixels come in seven passes."""
    return os.pread(file.fileno(), 1, 28) == b"\1"


def missing_bytes(file: BinaryIO) -> int:
    """How many bytes of pixels a PNG has less than its size needs. All of it is decompressed, a piece at a time."""
    width, height, bits, colour_type = struct.unpack(">IIBB", os.pread(file.fileno(), 10, 16))
    passes = _PASSES if is_interlaced(file) else ((0, 0, 1, 1),)
    needed = 0
    for left, top, across, down in passes:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            needed += rows * (1 + -(-columns * bits * _CHANNELS.get(colour_type, 1) // 8))
    stream = zlib.decompressobj()
    for name, start, length in chunks(file):
        for place in range(start, start + length if name == b"IDAT" else start, _PIECE_BYTES):
            data = os.pread(file.fileno(), min(_PIECE_BYTES, start + length - place), place)
            while data and needed > 0 and not stream.eof:
                needed -= len(stream.decompress(data, _PIECE_BYTES))
                data = stream.unconsumed_tail
    return max(0, needed)
