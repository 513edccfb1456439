"""Photos and drawings as people have them, and what a viewer shows of each.

Every image is of four colours, one in each quarter: red and green above, blue and yellow below. A further case is a row
of `SHOWN` or `REFUSED` and, if no builder fits, a few lines that make its file.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from fedepth.data.decode import check_image, decode_image
from fedepth.errors import DataError
from tests.field.pictures import (
    AS_GRAY,
    BILEVEL,
    BLACK,
    BLUE,
    COLOURS,
    GRAY_ON_WHITE,
    GRAYS,
    GREEN,
    GREEN_ON_WHITE,
    HEIGHT,
    INKS,
    ORIENTATION,
    RED,
    STORED,
    TWO_BIT_ROWS,
    WHITE,
    WIDTH,
    YELLOW,
    Build,
    Corners,
    bilevel,
    cmyk,
    corners,
    cut,
    deep,
    frames,
    gray,
    holding,
    indexed,
    linear_gray,
    noise,
    other_way_round,
    photo,
    png,
    png_header,
    quarters,
    rows16,
    saved,
    swapped_primaries,
    tiff,
    turned,
    two_inks,
    with_alpha,
)

# name of the file: how it is made, what a viewer shows
SHOWN: list[tuple[str, Build, Corners]] = [
    *((f"turned-{number}.jpg", turned(number, quality=95, subsampling=0), COLOURS) for number in STORED),
    *((f"draft-{number}.jpg", turned(number, 6, quality=90, subsampling=0), COLOURS) for number in STORED),
    *((f"turned-{number}.png", turned(number), COLOURS) for number in STORED),
    *((f"turned-{number}.webp", turned(number, lossless=True), COLOURS) for number in STORED),
    *((f"turned-{number}.tiff", turned(number), COLOURS) for number in STORED),
    (
        "turned-9.jpg",
        saved(photo(), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x09\0\0", quality=95),
        COLOURS,
    ),
    ("damaged-exif.jpg", saved(photo(), exif=b"Exif\0\0MM\0*\0\0\xff", quality=95, subsampling=0), COLOURS),
    # depths
    ("1-bit.png", saved(bilevel()), BILEVEL),
    ("1-bit.tif", saved(bilevel(), compression="group4"), BILEVEL),
    ("2-bit.png", png(2, 0, TWO_BIT_ROWS), (BLACK, (85,) * 3, (170,) * 3, WHITE)),
    ("16-bit-gray.png", saved(deep(65535, np.uint16)), AS_GRAY),
    ("16-bit-gray.tif", saved(deep(65535, np.uint16)), AS_GRAY),
    (
        "16-bit-min-is-white.tif",
        tiff(Image.fromarray(65535 - quarters([value * 257 for value in GRAYS], dtype=np.uint16)), t262=0),
        AS_GRAY,
    ),
    (
        "16-bit-big-endian.tif",
        saved(Image.frombytes("I;16B", (WIDTH, HEIGHT), b"".join(rows16([value * 257 for value in GRAYS])))),
        AS_GRAY,
    ),
    (
        "16-bit-gray.pgm",
        lambda path: path.write_bytes(b"P5 24 16 65535\n" + b"".join(rows16([v * 257 for v in GRAYS]))),
        AS_GRAY,
    ),
    (
        "10-bit-gray.pgm",
        lambda path: path.write_bytes(b"P5 24 16 1023\n" + b"".join(rows16([0, 257, 514, 1023]))),
        AS_GRAY,
    ),
    ("16-bit-rgb.png", png(16, 2, rows16([[c * 257 for c in colour] for colour in COLOURS])), COLOURS),
    ("16-bit-rgba.png", png(16, 6, rows16([[*(c * 257 for c in colour), 65535] for colour in COLOURS])), COLOURS),
    (
        "16-bit-gray-alpha.png",
        png(16, 4, rows16([(0, 65535), (64 * 257, 65535), (0, 0), (65535, 65535)])),
        (BLACK, (64,) * 3, WHITE, WHITE),
    ),
    ("32-bit-integers.tif", saved(deep(65535, np.int32)), AS_GRAY),
    ("floats.tif", saved(deep(1, np.float32)), AS_GRAY),
    # transparency
    ("alpha.png", saved(with_alpha()), GREEN_ON_WHITE),
    ("alpha.webp", saved(with_alpha(), lossless=True), GREEN_ON_WHITE),
    ("alpha.tif", saved(with_alpha()), GREEN_ON_WHITE),
    ("alpha.tga", saved(with_alpha()), GREEN_ON_WHITE),
    ("gray-alpha.png", saved(with_alpha("LA")), GRAY_ON_WHITE),
    ("gray-alpha.tif", saved(with_alpha("LA")), GRAY_ON_WHITE),
    ("palette.png", saved(photo("P")), COLOURS),
    ("palette.bmp", saved(photo("P")), COLOURS),
    ("palette.tif", saved(photo("P")), COLOURS),
    ("palette-key.png", saved(indexed(), transparency=3), (RED, GREEN, BLUE, WHITE)),
    ("key-rgb.png", saved(photo(), transparency=BLUE), (RED, GREEN, WHITE, YELLOW)),
    ("key-gray.png", saved(gray(), transparency=64), (BLACK, WHITE, (128,) * 3, WHITE)),
    ("key-gray-2-bit.png", png(2, 0, TWO_BIT_ROWS, (b"tRNS", b"\0\1")), (BLACK, WHITE, (170,) * 3, WHITE)),
    (
        "key-gray-16-bit.png",
        png(16, 0, rows16([0, 64 * 257, 128 * 257, 65535]), (b"tRNS", struct.pack(">H", 128 * 257))),
        (BLACK, (64,) * 3, WHITE, WHITE),
    ),
    (
        "key-rgb-16-bit.png",
        png(
            16, 2, rows16([[c * 257 for c in colour] for colour in COLOURS]), (b"tRNS", struct.pack(">3H", 0, 0, 65535))
        ),
        (RED, GREEN, WHITE, YELLOW),
    ),
    ("key-1-bit.png", saved(bilevel(), transparency=0), (WHITE,) * 4),
    # colours
    ("gray.jpg", saved(gray(), quality=95), AS_GRAY),
    ("inks.jpg", saved(cmyk(INKS), quality=95), COLOURS),
    ("inks.tif", saved(cmyk(INKS)), COLOURS),
    (
        "lab.tif",
        saved(
            ImageCms.profileToProfile(
                photo(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
            )
        ),
        COLOURS,
    ),
    ("ycbcr.tif", saved(photo("YCbCr")), COLOURS),
    ("profile.jpg", saved(other_way_round(), icc_profile=swapped_primaries(), quality=95, subsampling=0), COLOURS),
    ("profile.png", saved(other_way_round(), icc_profile=swapped_primaries()), COLOURS),
    ("profile.webp", saved(other_way_round(), icc_profile=swapped_primaries(), lossless=True), COLOURS),
    ("profile.tif", saved(other_way_round(), icc_profile=swapped_primaries()), COLOURS),
    (
        "srgb-profile.png",
        saved(photo(), icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        COLOURS,
    ),
    ("broken-profile.png", saved(photo(), icc_profile=b"no profile"), COLOURS),
    ("profile-of-other-colours.png", saved(photo(), icc_profile=two_inks()), COLOURS),
    ("gray-profile.png", saved(Image.fromarray(quarters((0, 13, 55, 255))), icc_profile=linear_gray()), AS_GRAY),
    (
        "ink-profile.jpg",
        saved(cmyk(((0, 0, 0, 0), (128, 0, 0, 0), (0, 255, 0, 0), (0, 0, 0, 255))), icc_profile=two_inks(), quality=95),
        (WHITE, (139,) * 3, WHITE, WHITE),
    ),
    (
        "linear-gamma.png",
        png(8, 0, [bytes(row) for row in quarters((0, 13, 55, 255))], (b"gAMA", struct.pack(">I", 100000))),
        AS_GRAY,
    ),
    # animations: the first frame
    ("animation.gif", frames, COLOURS),
    ("animation.png", frames, COLOURS),
    ("animation.webp", lambda path: frames(path, lossless=True), COLOURS),
    ("pages.tif", frames, COLOURS),
    ("key.gif", saved(indexed(), transparency=2), (RED, GREEN, WHITE, YELLOW)),
    # names
    ("is-png.jpg", saved(photo(), format="PNG"), COLOURS),
    ("is-gif.png", saved(photo("P"), format="GIF"), COLOURS),
    ("photo.JFIF", saved(photo(), format="JPEG", quality=95, subsampling=0), COLOURS),
    ("photo.ppm", saved(photo()), COLOURS),
]

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


# name of the file: how it is made, what is said of it
REFUSED: list[tuple[str, Build, str]] = [
    ("empty.jpg", holding(b""), "is empty; remove it from the data"),
    (
        "text.png",
        holding(b"no image"),
        "no format that is read begins with 6e 6f 20 69 6d 61 67 65; repair or remove it",
    ),
    *(
        (f"cut.{end}", cut(noise(), 0.6), "cannot be read as an image")
        for end in ("jpg", "png", "gif", "bmp", "webp", "ppm", "tif")
    ),
    ("head.jpg", cut(noise(), 0.02), "cannot be read as an image: Truncated File Read"),
    (
        "head.png",
        holding(b"\x89PNG" + bytes(60)),
        "its header is not that of a whole PNG; repair or remove it",
    ),
    ("pipe.jpg", os.mkfifo, "is not a file; remove it from the data"),
    ("folder.jpg", Path.mkdir, "is not a file; remove it from the data"),
    ("absent.jpg", lambda path: None, "cannot be opened: No such file or directory"),
    ("dangling.jpg", lambda path: path.symlink_to("nowhere"), "cannot be opened: No such file or directory"),
    ("circle.jpg", lambda path: path.symlink_to(path), "cannot be opened: Too many levels of symbolic links"),
    ("iphone.jpg", holding(HEIC), "is an HEIC image, which is not read; convert it to JPEG or PNG, or remove it"),
    ("photo.avif", holding(b"\0\0\0\x1cftypavif\0\0\0\0"), "is an AVIF image, which is not read; convert it"),
    (
        "drawing.svg",
        holding(b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>'),
        "is an SVG drawing, which",
    ),
    ("camera.NEF", saved(photo(), format="TIFF"), "is a camera's raw file, which is not read; convert it"),
    ("page.jpg", holding(b"<!DOCTYPE html><html>404"), "is a web page, not an image; download it again or remove it"),
    ("clip.jpg", holding(b"\0\0\0\x18ftypisom"), "is a video, which is not read"),
    ("scan.jpg", holding(b"%PDF-1.7"), "is a PDF document, which is not read"),
    ("scan.eps", holding(b"%!PS-Adobe-3.0 EPSF-3.0"), "is a PostScript file, which is not read"),
    (
        "._photo.jpg",
        holding(b"\0\5\x16\7\0\2\0\0Mac OS X"),
        "is an AppleDouble file, which macOS writes beside the real one",
    ),
    (
        "huge.png",
        lambda path: png_header(path, 100_000, 100_000),
        "has 100000×100000 pixels, and at most 134 million are read; scale it down, or save it as JPEG",
    ),
    (
        "too-bright.tif",
        saved(deep(4, np.float32)),
        "holds floating-point values from 0 to 4, of which nobody can say what is white; only 0 to 1",
    ),
    (
        "not-a-number.tif",
        saved(Image.fromarray(np.full((4, 4), np.nan, np.float32))),
        "holds floating-point values from nan to nan",
    ),
    ("below-zero.tif", saved(Image.fromarray(np.full((4, 4), -5, np.int32))), "holds integer values from -5 to -5"),
    ("a\u202eb.png", holding(b"no image"), r"a\\u202eb\.png cannot be read"),
]


@pytest.mark.parametrize(("name", "build", "shown"), SHOWN, ids=[case[0] for case in SHOWN])
def test_an_image_is_read_as_a_viewer_shows_it(tmp_path: Path, name: str, build: Build, shown: Corners) -> None:
    path = tmp_path / name
    build(path)
    assert path.stat().st_size < 10_000
    check_image(path)
    pixels = decode_image(path, (3, HEIGHT, WIDTH))
    assert (pixels.shape, pixels.dtype, pixels.flags.c_contiguous) == ((3, HEIGHT, WIDTH), np.uint8, True)
    most = 12 if ".j" in name.lower() else 24 if name.startswith("lab") else 3  # bytes of L*a*b* are coarse
    assert np.abs(np.array(corners(pixels)) - np.array(shown)).max() <= most, corners(pixels)
    luma = np.array(shown) @ (0.299, 0.587, 0.114)
    as_gray = corners(decode_image(path, (1, HEIGHT, WIDTH)))
    assert np.abs(np.array(as_gray)[:, 0] - luma).max() <= most, as_gray
    small = decode_image(path, (3, 4, 12))
    assert np.abs(small[:, [0, 0, -1, -1], [0, -1, 0, -1]].T.astype(int) - np.array(shown)).max() <= most + 2


@pytest.mark.parametrize(("name", "build", "said"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_cannot_be_read_is_named_with_the_reason(tmp_path: Path, name: str, build: Build, said: str) -> None:
    build(tmp_path / name)
    with pytest.raises(DataError, match=said) as caught:
        decode_image(tmp_path / name, (3, HEIGHT, WIDTH))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (3, 5)])
def test_every_size_is_scaled(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "x.png")
    pixels = decode_image(tmp_path / "x.png", (3, 8, 6))
    assert pixels.reshape(3, -1).T.tolist() == [[10, 20, 30]] * 48


def test_a_turned_photo_is_the_same_as_a_plain_copy(tmp_path: Path) -> None:
    plain = Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 60, 3)).astype(np.uint8))
    plain.save(tmp_path / "plain.png")
    expected = decode_image(tmp_path / "plain.png", (3, 16, 24)).astype(int)
    for orientation, undo in STORED.items():
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        (plain if undo is None else plain.transpose(undo)).save(tmp_path / "turned.png", exif=exif)
        assert np.abs(decode_image(tmp_path / "turned.png", (3, 16, 24)) - expected).max() <= 1


def test_a_pipe_is_not_waited_for_and_no_file_stays_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    saved(photo())(tmp_path / "photo.png")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for name in ("pipe.png", "photo.png", "absent.png"):
        for _ in range(3):
            try:
                decode_image(tmp_path / name, (3, 4, 4))
            except DataError:
                continue
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_photo_is_decoded_near_its_final_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: int
) -> None:
    """Held on its side, too."""
    turned(orientation, 10, quality=50)(tmp_path / "x.jpg")
    sizes = []
    real = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *rest: (sizes.append(self.size), real(self, *rest))[1])
    decode_image(tmp_path / "x.jpg", (3, HEIGHT, WIDTH))
    assert sizes == [(30, 20) if orientation == 1 else (20, 30)]


@pytest.mark.parametrize("shape", [(2, 4, 4), (3, 0, 4), (3, 4), (16,)])
def test_other_inputs_are_no_images(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images are read as"):
        decode_image(tmp_path / "x.png", shape)
