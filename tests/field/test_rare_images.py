"""Image files that few programs write, and files that are not whole behind a proper end. A further case is a row."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.data_check import measure
from fedepth.data.check import check_data
from fedepth.data.decode import check_image, decode_image
from fedepth.errors import DamagedFileError
from tests.field.pictures import (
    AS_BT709,
    AS_GRAY,
    AS_LIGHT,
    AS_P3,
    BLACK,
    BLUE,
    COLOURS,
    GRAYS,
    HEIGHT,
    RED,
    WHITE,
    WIDTH,
    YELLOW,
    Build,
    Corners,
    bmp32,
    corners,
    ends_early,
    gray,
    holding,
    interlaced,
    noise,
    photo,
    png,
    quarters,
    raw_tiff,
    rgb_rows,
    rows16,
    saved,
    spoilt,
    swapped_primaries,
    tga32,
)

HALF_WHITE = tuple(tuple(max(part, 127) for part in colour) for colour in COLOURS)
PLAIN = png(8, 2, rgb_rows())
DARK = (255, 128, 0, 0)
FLOATS = quarters([[part / 255 for part in colour] for colour in COLOURS], dtype="<f4").tobytes()
DEEP = quarters([[part * 257 for part in colour] for colour in COLOURS], dtype="<u2")


def cicp(primaries: int, transfer: int, matrix: int = 0, full: int = 1) -> tuple[bytes, bytes]:
    return b"cICP", bytes((primaries, transfer, matrix, full))


def gray_rows(values: tuple[int, ...]) -> list[bytes]:
    return [bytes(row) for row in quarters(values)]


# name of the file: how it is made, what a viewer shows
SHOWN: list[tuple[str, Build, Corners]] = [
    # an alpha channel that nobody filled in
    ("alpha-0.tga", tga32(0, 8), COLOURS),
    ("alpha-0-of-no-bits.tga", tga32(0, 0), COLOURS),
    ("alpha-128.tga", tga32(128, 8), HALF_WHITE),
    ("alpha-0-v3.bmp", bmp32(0, 56), COLOURS),
    ("alpha-0-v4.bmp", bmp32(0), COLOURS),
    ("alpha-0-v5.bmp", bmp32(0, 124), COLOURS),
    ("alpha-128-v4.bmp", bmp32(128), HALF_WHITE),
    ("alpha-0.png", saved(Image.merge("RGBA", (*photo().split(), Image.new("L", (WIDTH, HEIGHT), 0)))), (WHITE,) * 4),
    # chunks that a viewer passes over
    ("text.png", spoilt(PLAIN, b"tEXt"), COLOURS),
    ("international-text.png", spoilt(PLAIN, b"iTXt"), COLOURS),
    ("unknown-chunk.png", spoilt(PLAIN, b"zzZz"), COLOURS),
    ("text-behind.png", spoilt(PLAIN, b"tEXt", b"IEND"), COLOURS),
    ("spoilt-gamma.png", spoilt(PLAIN, b"gAMA", data=struct.pack(">I", 100000)), COLOURS),
    (
        "text-bomb.png",
        png(8, 2, rgb_rows(), (b"zTXt", b"a\0\0" + zlib.compress(bytes(3 << 20)))),
        COLOURS,
    ),
    (
        "key-in-the-lower-byte.png",
        png(
            16,
            2,
            rows16([(65535, 1, 2), (65535, 3, 4), (0, 0, 65535), (65535, 65535, 0)]),
            (b"tRNS", struct.pack(">3H", 65535, 1, 2)),
        ),
        (WHITE, RED, BLUE, YELLOW),
    ),
    # rows
    ("black-below.png", saved(Image.fromarray(quarters(DARK))), ((255,) * 3, (128,) * 3, BLACK, BLACK)),
    ("interlaced.png", interlaced(GRAYS), AS_GRAY),
    ("interlaced-black-below.png", interlaced(DARK), ((255,) * 3, (128,) * 3, BLACK, BLACK)),
    (
        "gray-below.jpg",
        saved(Image.fromarray(quarters((0, 255, 64, 128))), quality=95),
        (BLACK, WHITE, (64,) * 3, (128,) * 3),
    ),
    ("refined.jpg", saved(gray(), quality=95, progressive=True), AS_GRAY),
    # colours by code points
    ("cicp-srgb.png", png(8, 2, rgb_rows(), cicp(1, 13)), COLOURS),
    ("cicp-unspecified.png", png(8, 2, rgb_rows(), cicp(2, 2)), COLOURS),
    ("cicp-p3.png", png(8, 2, rgb_rows(AS_P3), cicp(12, 13)), COLOURS),
    ("cicp-light.png", png(8, 0, gray_rows(AS_LIGHT), cicp(1, 8)), AS_GRAY),
    ("cicp-video.png", png(8, 0, gray_rows(AS_BT709), cicp(1, 1)), AS_GRAY),
    ("cicp-2020-gray.png", png(8, 2, rgb_rows(AS_GRAY), cicp(9, 13)), AS_GRAY),
    ("cicp-before-gamma.png", png(8, 2, rgb_rows(), (b"gAMA", struct.pack(">I", 100000)), cicp(1, 13)), COLOURS),
    # TIFF
    ("planes.tif", raw_tiff([quarters(COLOURS)[:, :, n].tobytes() for n in range(3)], 8, 3, 2, t284=2), COLOURS),
    ("16-bit.tif", raw_tiff([DEEP.tobytes()], 16, 3, 2), COLOURS),
    (
        "unsigned-32-bit.tif",
        raw_tiff([quarters([value * 257 for value in GRAYS], dtype="<u4").tobytes()], 32, 1, 1),
        AS_GRAY,
    ),
    ("big.tif", saved(photo(), big_tiff=True), COLOURS),
]

# Headers of images of billions of pixels.
LARGE = {
    "bmp": b"BM"
    + struct.pack("<IHHIIiiHHIIiiII", 58, 0, 0, 54, 40, 1 << 30, 1 << 30, 1, 24, 0, 4, 0, 0, 0, 0)
    + b"1234",
    "gif": b"GIF89a\xff\xff\xff\xff\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\xff\xff\xff\xff\0\2\2D\1\0;",
    "tga": struct.pack("<3B5x4H2B", 0, 0, 2, 0, 0, 65535, 65535, 24, 0),
    "ppm": b"P6 100000 100000 255\n123",
}
# How files begin that are no images at all, and what is said of them.
OTHERS = [
    (b"RIFF\0\0\0\0AVI LIST", "is a video, which is not read"),
    (b"RIFF\0\0\0\0WAVEfmt ", "is a sound file, which"),
    (b"\x93NUMPY\1\0", "is an array of NumPy, which"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file, which"),
    (bytes(128) + b"DICM", "is a DICOM image, which"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive, which"),
    (b"bplist00\xd1", "is a placeholder of iCloud; download the photo, or remove it"),
    (
        b"version https://git-lfs.github.com/spec/v1\noid",
        "is a placeholder of Git LFS; fetch the file with `git lfs pull`",
    ),
    (b'{"error": "not found"}', r"is text, not an image \('{\"error\": \"not found\"}'\); repair or remove it"),
    (b"\x8aMNG\r\n\x1a\n", "is an MNG animation, which"),
]


def changed(build: Build, old: bytes, new: bytes) -> Build:
    """With other bytes in its header."""

    def write(path: Path) -> None:
        build(path)
        content = path.read_bytes()
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, new))

    return write


# name of the file: how it is made, what is said of it
REFUSED: list[tuple[str, Build, str]] = [
    (
        "half.png",
        png(8, 2, rgb_rows()[:8]),
        r"an image: image file is truncated \(584 bytes of its pixels are",
    ),
    (
        "but-one.png",
        png(8, 2, rgb_rows()[:15]),
        r"truncated \(73 bytes of its pixels are missing\); repair",
    ),
    ("half-interlaced.png", interlaced(GRAYS, 100), r"truncated \(100 bytes of its pixels are missing\)"),
    ("half.jpg", ends_early(noise(quality=90), b"\xff\xd9"), r"image file is truncated \(its last rows are missing\)"),
    ("half-gray.jpg", ends_early(saved(gray(8), quality=90), b"\xff\xd9"), "image file is truncated"),
    ("critical.png", spoilt(PLAIN, b"IABC"), "its header is not that of a whole PNG"),
    (
        "pq.png",
        png(8, 2, rgb_rows(), cicp(9, 16)),
        r"is a PNG of high dynamic range \(PQ\), which is not",
    ),
    ("hlg.png", png(8, 2, rgb_rows(), cicp(9, 18)), r"high dynamic range \(HLG\)"),
    ("narrow.png", png(8, 2, rgb_rows(), cicp(1, 13, 0, 0)), "colours of the code points 1, 13, 0 and 0, which"),
    ("film.png", png(8, 2, rgb_rows(), cicp(8, 13)), "colours of the code points 8, 13, 0 and 1"),
    (
        "floats.tif",
        raw_tiff([FLOATS], 32, 3, 2, t339=3),
        "is a TIFF of 3 × 32-bit floating-point numbers a pixel",
    ),
    ("32-bit.tif", raw_tiff([FLOATS], 32, 3, 2), "is a TIFF of 3 × 32-bit unsigned integers a pixel"),
    (
        "signed.tif",
        raw_tiff([DEEP[:, :, 0].tobytes()], 16, 1, 1, t339=2),
        "is a TIFF of signed integers of 16 bits, which",
    ),
    (
        "deep-planes.tif",
        raw_tiff([np.ascontiguousarray(DEEP[:, :, n]).tobytes() for n in range(3)], 16, 3, 2, t284=2),
        "is a TIFF with a plane for each colour and 16 bits a sample, which is not read; save",
    ),
    (
        "raw.tif",
        raw_tiff([bytes(WIDTH * HEIGHT)], 8, 1, 32803),
        "integers a pixel, as the filter of a camera, which",
    ),
    *(
        (
            f"compression-{number}.tif",
            raw_tiff([b"x"], 8, 3, 2, t259=number),
            f"compression {number}{name}, which",
        )
        for number, name in {34892: r" \(lossy JPEG of DNG\)", 34712: r" \(JPEG 2000\)", 65000: ""}.items()
    ),
    ("spoilt-deflate.tif", raw_tiff([b"x" * 99], 8, 3, 2, t259=8), "its compressed pixels are damaged, or of a kind"),
    (
        "white-at-4-billion.tif",
        raw_tiff([quarters([value << 24 for value in GRAYS], dtype="<u4").tobytes()], 32, 1, 1),
        "holds integer values from 0 to 4.27819e\\+09, of which nobody can say what is white",
    ),
    ("no-palette.png", png(8, 3, gray_rows((0, 1, 2, 3))), "is a PNG without its palette, which is not read"),
    ("app.png", png(8, 2, rgb_rows(), (b"CgBI", b"P\0 \2")), r"is a PNG as Apple packs it for apps \(CgBI\), which"),
    ("thumbnail-only.jpg", holding(b"\xff\xd8\xff\xe1\0\x06Exif\xff\xd9"), "is a JPEG without an image in it, which"),
    (
        "12-bit.jpg",
        changed(noise(), b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
        "is a JPEG of 12 bits a sample, which",
    ),
    (
        "lossless.jpg",
        changed(noise(), b"\xff\xc0\0\x11", b"\xff\xc3\0\x11"),
        "is a JPEG of the lossless kind, which is not read",
    ),
    ("no-height.jpg", changed(noise(), b"\xff\xc0\0\x11\x08\0\x28", b"\xff\xc0\0\x11\x08\0\0"), "say how high it is"),
    *(
        (f"large.{end}", holding(head), "has .* pixels, and at most 134 million are read; scale")
        for end, head in LARGE.items()
    ),
    *((f"{number}.jpg", holding(head), said) for number, (head, said) in enumerate(OTHERS)),
    ("zeros.jpg", holding(bytes(5000)), "holds nothing but zero bytes, as after a copy that failed; copy it again"),
]


@pytest.mark.parametrize(("name", "build", "shown"), SHOWN, ids=[case[0] for case in SHOWN])
def test_a_rare_image_is_read_as_a_viewer_shows_it(tmp_path: Path, name: str, build: Build, shown: Corners) -> None:
    path = tmp_path / name
    build(path)
    assert path.stat().st_size < 10_000
    check_image(path)
    pixels = decode_image(path, (3, HEIGHT, WIDTH))
    most = 12 if name.endswith(".jpg") else 6 if "p3" in name else 3  # 8 bits of a wide gamut are coarse in the dark
    assert np.abs(np.array(corners(pixels)) - np.array(shown)).max() <= most, corners(pixels)


@pytest.mark.parametrize(("name", "build", "said"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_is_not_read_is_named_with_the_right_reason(tmp_path: Path, name: str, build: Build, said: str) -> None:
    build(tmp_path / name)
    with pytest.raises(DamagedFileError, match=said) as caught:
        decode_image(tmp_path / name, (3, HEIGHT, WIDTH))
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_code_points_come_before_a_profile(tmp_path: Path) -> None:
    saved(photo(), icc_profile=swapped_primaries())(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    png(8, 2, rgb_rows(), cicp(1, 13))(tmp_path / "y.png")
    chunk = (tmp_path / "y.png").read_bytes()[33:49]
    assert chunk[4:8] == b"cICP"
    (tmp_path / "x.png").write_bytes(content[:33] + chunk + content[33:])
    assert corners(decode_image(tmp_path / "x.png", (3, HEIGHT, WIDTH))) == [list(colour) for colour in COLOURS]


def test_what_the_check_costs_can_be_measured(tmp_path: Path) -> None:
    cost = measure(tmp_path, "png", 2)
    assert cost.file_bytes == (tmp_path / "png/class/1.png").stat().st_size
    assert cost.decoded_us > cost.looked_us > 0


def test_a_check_that_decodes_finds_all_of_them(tmp_path: Path) -> None:
    for name, build, _ in REFUSED:
        (tmp_path / "data/a").mkdir(parents=True, exist_ok=True)
        build(tmp_path / "data/a" / name)
    for name, build, _ in SHOWN:
        build(tmp_path / "data/a" / name)
    found = check_data(tmp_path / "data", tmp_path / "record", decode=True)
    assert len(found.damaged) == len(REFUSED)
