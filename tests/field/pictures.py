"""Image files for tests, of four colours, one in each quarter: red and green above, blue and yellow below."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

WIDTH, HEIGHT = 24, 16
RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
COLOURS = (RED, GREEN, BLUE, YELLOW)
GRAYS = (0, 64, 128, 255)
AS_GRAY = tuple((value,) * 3 for value in GRAYS)
WHITE, BLACK = (255,) * 3, (0,) * 3
ORIENTATION = 0x0112
# What a viewer does to the stored pixels, undone.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
Build = Callable[[Path], Any]
Corners = tuple[tuple[int, ...], ...]


def quarters(values: Any, scale: int = 1, dtype: Any = np.uint8) -> npt.NDArray[Any]:
    """Four values or colours, as pixels (height, width[, channels])."""
    grid = np.array(values, dtype).reshape(2, 2, *np.shape(values)[1:])
    return grid.repeat(HEIGHT // 2 * scale, axis=0).repeat(WIDTH // 2 * scale, axis=1)


def photo(mode: str = "RGB", scale: int = 1) -> Image.Image:
    return Image.fromarray(quarters(COLOURS, scale)).convert(mode)


def gray(scale: int = 1) -> Image.Image:
    return Image.fromarray(quarters(GRAYS, scale))


def with_alpha(mode: str = "RGBA") -> Image.Image:
    """Red as it is; the others transparent, half transparent green last."""
    image = photo("RGBA")
    image.putalpha(Image.fromarray(quarters((255, 128, 0, 255))))
    return image.convert(mode)


def saved(image: Image.Image, **options: Any) -> Build:
    return lambda path: image.save(path, **options)


def turned(orientation: int, scale: int = 1, **options: Any) -> Build:
    """Stored as a camera does that was held in this way."""
    undo = STORED[orientation]
    image = photo(scale=scale)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return saved(image if undo is None else image.transpose(undo), exif=exif.tobytes(), **options)


def tiff(image: Image.Image, **tags: int) -> Build:
    """With further tags, by their numbers as t262=0."""
    return saved(image, tiffinfo={int(name[1:]): value for name, value in tags.items()})


def png(depth: int, colour_type: int, rows: list[bytes], *chunks: tuple[bytes, bytes]) -> Build:
    """A PNG of this depth and type with further chunks in front of its pixels; what Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    return lambda path: path.write_bytes(data)


def spoilt(build: Build, name: bytes, where: bytes = b"IDAT", data: bytes = b"a\0b") -> Build:
    """A PNG with a chunk whose checksum is wrong in front of another."""

    def write(path: Path) -> None:
        build(path)
        content = path.read_bytes()
        place = content.index(where) - 4
        path.write_bytes(content[:place] + struct.pack(">I", len(data)) + name + data + bytes(4) + content[place:])

    return write


def interlaced(values: Any, left_out: int = 0) -> Build:
    """A PNG of gray in seven passes, without so many of its last bytes of pixels."""
    pixels, rows = quarters(values), b""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    for left, top, across, down in passes:
        rows += b"".join(b"\0" + row.tobytes() for row in pixels[top::down, left::across])

    def write(path: Path) -> None:
        png(8, 0, [])(path)
        content = path.read_bytes()
        header = content[16:28] + b"\1"
        data = zlib.compress(rows[: len(rows) - left_out])
        parts = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
        chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
        path.write_bytes(content[:8] + b"".join(chunks))

    return write


def rgb_rows(values: Any = COLOURS) -> list[bytes]:
    """Rows of a PNG with 8 bits a sample."""
    return [row.tobytes() for row in quarters(values)]


def ends_early(build: Build, end: bytes) -> Build:
    """Half a file with a proper end."""

    def write(path: Path) -> None:
        build(path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] + end)

    return write


def tga32(alpha: int, attributes: int) -> Build:
    """A TGA of 32 bits with the same alpha everywhere."""
    pixels = np.dstack([quarters(COLOURS)[:, :, ::-1], np.full((HEIGHT, WIDTH), alpha, np.uint8)])
    head = struct.pack("<3B5x4H2B", 0, 0, 2, 0, 0, WIDTH, HEIGHT, 32, 0x20 | attributes)
    return lambda path: path.write_bytes(head + pixels.tobytes())


def bmp32(alpha: int, header: int = 108) -> Build:
    """A BMP of 32 bits whose header of this size has a mask for alpha, with the same alpha everywhere."""
    pixels = np.dstack([quarters(COLOURS)[:, :, ::-1], np.full((HEIGHT, WIDTH), alpha, np.uint8)])[::-1].tobytes()
    info = struct.pack("<IiiHHIIiiII", header, WIDTH, HEIGHT, 1, 32, 3, len(pixels), 2835, 2835, 0, 0)
    info = (info + struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)).ljust(header, b"\0")
    head = b"BM" + struct.pack("<IHHI", 14 + header + len(pixels), 0, 0, 14 + header)
    return lambda path: path.write_bytes(head + info + pixels)


def raw_tiff(strips: list[bytes], bits: int, samples: int, meaning: int, **tags: int) -> Build:
    """A TIFF of these strips, one for each plane; further tags by their numbers as t259=34892."""
    numbers = {256: WIDTH, 257: HEIGHT, 259: 1, 262: meaning, 277: samples, 278: HEIGHT}
    numbers |= {int(name[1:]): value for name, value in tags.items()}
    values = {tag: [value] for tag, value in numbers.items()}
    values[258] = [bits] * samples
    if 339 in values:
        values[339] *= samples
    values[273] = [8 + sum(map(len, strips[:place])) for place in range(len(strips))]
    values[279] = [len(strip) for strip in strips]
    data = b"".join(strips)
    start = 8 + len(data)
    entries, beyond = b"", b""
    for tag in sorted(values):
        packed = struct.pack(f"<{len(values[tag])}I", *values[tag])
        if len(packed) > 4:
            place = start + 2 + 12 * len(values) + 4 + len(beyond)
            beyond, packed = beyond + packed, struct.pack("<I", place)
        entries += struct.pack("<HHI", tag, 4, len(values[tag])) + packed
    whole = b"II*\0" + struct.pack("<I", start) + data + struct.pack("<H", len(values)) + entries + bytes(4) + beyond
    return lambda path: path.write_bytes(whole)


def rows16(values: Any) -> list[bytes]:
    """Rows of a PNG with 16 bits a sample."""
    return [row.tobytes() for row in quarters(values, dtype=">u2")]


def icc(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ") -> bytes:
    """A colour profile (ICC.1:2001-04, section 6)."""
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    head = struct.pack(">I4sI4s4s4s", start + len(data), b"none", 0x02400000, b"prtr", space, pcs)
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def swapped_primaries() -> bytes:
    """sRGB but for red and blue, which stand for each other."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")


def linear_gray() -> bytes:
    white = b"XYZ " + bytes(4) + struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
    return icc(b"GRAY", {b"wtpt": white, b"kTRC": b"curv" + bytes(4) + struct.pack(">I", 0)})


def two_inks() -> bytes:
    """CMYK on white paper in which cyan ink is a dark gray (L* 20), and no other ink is seen (section 6.5.10)."""
    cells = b"".join(bytes([51 if cell & 8 else 255, 128, 128]) for cell in range(16))
    identity = bytes(range(256))
    matrix = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x10000)
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + identity * 4 + cells + identity * 3
    return icc(b"CMYK", {b"A2B0": lut}, pcs=b"Lab ")


def frames(path: Path, **options: Any) -> None:
    """An animation whose second frame is white."""
    photo().save(path, save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT), WHITE)], **options)


def indexed() -> Image.Image:
    """The four colours as entries of a palette."""
    image = Image.fromarray(quarters((0, 1, 2, 3)))
    image.putpalette([part for colour in COLOURS for part in colour])
    return image


def other_way_round() -> Image.Image:
    """Red for blue and blue for red, as `swapped_primaries` has them."""
    return Image.fromarray(quarters(COLOURS)[:, :, ::-1].copy())


def deep(white: int, dtype: Any) -> Image.Image:
    """The grays as parts of `white`."""
    return Image.fromarray(quarters([value * white / 255 for value in GRAYS], dtype=dtype))


def bilevel() -> Image.Image:
    return Image.fromarray(quarters((0, 255, 255, 0))).convert("1")


def cmyk(values: Any) -> Image.Image:
    image = Image.fromarray(quarters(values))
    return Image.merge("CMYK", image.split())


# The four colours as Display P3 has them (CSS Color 4), and the grays as light and by BT.709's curve.
AS_P3 = ((234, 51, 35), (117, 251, 76), (0, 0, 245), (255, 255, 84))
AS_LIGHT = (0, 13, 55, 255)
AS_BT709 = (0, 48, 115, 255)
BILEVEL = (BLACK, WHITE, WHITE, BLACK)
TWO_BIT_ROWS = [b"\x00\x00\x00\x55\x55\x55"] * 8 + [b"\xaa\xaa\xaa\xff\xff\xff"] * 8
INKS = ((0, 255, 255, 0), (255, 0, 255, 0), (255, 255, 0, 0), (0, 0, 255, 0))
GREEN_ON_WHITE = (RED, (127, 255, 127), WHITE, YELLOW)
GRAY_ON_WHITE = ((76,) * 3, (202,) * 3, WHITE, (226,) * 3)


def cut(build: Build, left: float) -> Build:
    """Only the first part of a file, as after an interrupted copy."""

    def write(path: Path) -> None:
        build(path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)])

    return write


def holding(data: bytes) -> Build:
    return lambda path: path.write_bytes(data)


def noise(**options: Any) -> Build:
    return saved(Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 40, 3)).astype(np.uint8)), **options)


def png_header(path: Path, width: int, height: int) -> None:
    png(8, 2, [])(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)


def corners(pixels: npt.NDArray[np.uint8]) -> list[list[int]]:
    """Of (C, H, W) the colours a bit within each corner."""
    below, right = pixels.shape[1] - 3, pixels.shape[2] - 3
    return [pixels[:, y, x].tolist() for y, x in ((2, 2), (2, right), (below, 2), (below, right))]
