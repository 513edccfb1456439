"""Image files as a viewer shows them, in the shape that a model takes. numpy and PIL, no torch.

Training, evaluation, inference and the parity check of an export all read through `decode_image`; docs/data.md says
what it does with orientation, depth, transparency, colour profiles and animations.
"""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TgaImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from fedepth.data.folders import RAW_SUFFIXES
from fedepth.errors import DamagedFileError, DataError
from fedepth.printable import printable, shortened

# Decoders in C that start no other program. What a file holds decides among them, not its name. Taken from their
# modules, they are there without the 40 others that Pillow would load to look for them.
_FORMATS = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        GifImagePlugin.GifImageFile,
        WebPImagePlugin.WebPImageFile,
        TiffImagePlugin.TiffImageFile,
        BmpImagePlugin.BmpImageFile,
        PpmImagePlugin.PpmImageFile,
    )
)
_BY_NAME = {".tga": (TgaImagePlugin.TgaImageFile.format,)}  # whose first bytes tell nothing
# (where, bytes, what): formats that people have and that are not read.
_FOREIGN: tuple[tuple[int, bytes, str], ...] = (
    *((4, b"ftyp" + brand, "an HEIC image") for brand in (b"heic", b"heix", b"heim", b"hevc", b"mif1", b"msf1")),
    (4, b"ftypavi", "an AVIF image"),
    (4, b"ftypcrx", "a camera's raw file"),
    (4, b"ftyp", "a video"),
    (0, b"\x1a\x45\xdf\xa3", "a video"),
    (0, b"%PDF", "a PDF document"),
    (0, b"%!PS", "a PostScript file"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"gimp xcf", "a GIMP file"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (0, b"#?RADIANCE", "a Radiance HDR image"),
    (0, b"v/1\x01", "an OpenEXR image"),
    (0, b"FUJIFILMCCD-RAW", "a camera's raw file"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzipped file"),
    (0, b"\0\5\x16\7", "an AppleDouble file, which macOS writes beside the real one"),
    (0, b"\0\0\1\0", "an icon"),
)
_BEGINNINGS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG", "PNG"),
    (b"GIF8", "GIF"),
    (b"RIFF", "WebP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"BM", "BMP"),
)
_HEAD_BYTES = 1024
# After a JPEG is scaled while it is decoded. Beyond it, one image takes over half a GiB.
_MOST_PIXELS = 1 << 27
_BAND_ROWS = 64  # 16-bit images become 8-bit ones so many rows at a time
_SRGB_GAMMA = 1 / 2.2  # of a PNG's gAMA chunk, where it changes nothing
_GROUND = (255, 255, 255)  # what shows through transparent parts, as in most viewers
_MODES = {1: "L", 3: "RGB"}
_PROFILES_KEPT = 16

# By EXIF orientation: what turns the stored image into the one to be shown.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = frozenset({5, 6, 7, 8})

# None where it would change nothing, or cannot be used: it is damaged, or for other colours than the image has.
Transform = Callable[[Image.Image], Image.Image] | None
_transforms: dict[tuple[bytes, str], Transform] = {}


def decode_image(path: Path, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """The image in a file as a viewer shows it, scaled to a model's input.

    A JPEG is decoded near its final size; anything else takes its full size in memory once, and is scaled down before
    its colours are converted.

    Args:
        shape: (C, H, W); C is 1 for gray or 3 for RGB.

    Returns:
        A C-contiguous array of this shape, values 0 to 255 in sRGB.

    Raises:
        DamagedFileError: in one sentence, what file cannot be read, why, and what to do.
        DataError: it takes more memory than there is.
        ValueError: `shape` is not one of an image.
    """
    if len(shape) != 3 or shape[0] not in _MODES or min(shape) < 1:
        raise ValueError(f"images are read as (1 or 3, height, width), not as {shape}")
    try:
        with _opened(path) as file, warnings.catch_warnings():
            # Pillow warns of what it could still read; whatever it could not, it raises.
            warnings.simplefilter("ignore")
            pixels = np.asarray(_decoded(file, path, shape))
    except DataError:
        raise
    except (MemoryError, _TooLarge) as error:
        raise DataError(
            f"{printable(str(path))} takes more memory to decode than training may take{_amount(error)}; scale it down "
            f"towards {shape[2]}×{shape[1]} pixels, or save it as JPEG, which is decoded near its final size"
        ) from None
    except Exception as error:  # Pillow's decoders meet damage with every kind of error
        what = shortened(str(error)) or type(error).__name__
        message = f"{printable(str(path))} cannot be read as an image: {what}; repair or remove it"
        raise DamagedFileError(message, path) from error
    return np.ascontiguousarray(pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None])


def check_image(path: Path) -> None:
    """Looks whether a file begins as an image that `decode_image` reads, without decoding its pixels.

    Raises:
        DamagedFileError: as `decode_image`, which may still find damage behind the header.
    """
    try:
        with _opened(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _open(file, path)
    except DataError:
        raise
    except Exception as error:
        what = shortened(str(error)) or type(error).__name__
        message = f"{printable(str(path))} cannot be read as an image: {what}; repair or remove it"
        raise DamagedFileError(message, path) from error


class _TooLarge(Exception):
    """An image has more pixels than are decoded."""


def _amount(error: Exception) -> str:
    return f" ({error})" if isinstance(error, _TooLarge) else ""


def _opened(path: Path) -> BinaryIO:
    """A regular file, open for reading. A pipe, a device or a socket is refused without waiting for anybody."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        what = error.strerror or str(error)
        message = f"{printable(str(path))} cannot be opened: {what}; make it readable or remove it"
        raise DamagedFileError(message, path) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        os.close(descriptor)
        what = "is not a file" if not stat.S_ISREG(status.st_mode) else "is empty"
        raise DamagedFileError(f"{printable(str(path))} {what}; remove it from the data", path)
    return os.fdopen(descriptor, "rb")


def _open(file: BinaryIO, path: Path) -> Image.Image:
    if path.suffix.lower() in RAW_SUFFIXES:
        # Many are TIFF files whose first image is a thumbnail.
        raise _foreign(path, "a camera's raw file")
    most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # a photo of 200 megapixels is no attack; see _decoded
    try:
        return Image.open(file, formats=_FORMATS + _BY_NAME.get(path.suffix.lower(), ()))
    except UnidentifiedImageError:
        file.seek(0)
        raise _unidentified(path, file.read(_HEAD_BYTES)) from None
    finally:
        Image.MAX_IMAGE_PIXELS = most


def _unidentified(path: Path, head: bytes) -> DamagedFileError:
    for start, magic, what in _FOREIGN:
        if head[start:].startswith(magic):
            return _foreign(path, what)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<svg", b"<?xml")) and b"<svg" in text:
        return _foreign(path, "an SVG drawing")
    if text.startswith((b"<!doctype html", b"<html")):
        message = f"{printable(str(path))} is a web page, not an image; download it again or remove it"
        return DamagedFileError(message, path)
    begins = head[:8].hex(" ")
    kind = next((name for magic, name in _BEGINNINGS if head.startswith(magic)), "")
    why = f"its header is not that of a whole {kind}" if kind else f"no format that is read begins with {begins}"
    return DamagedFileError(f"{printable(str(path))} cannot be read as an image: {why}; repair or remove it", path)


def _foreign(path: Path, what: str) -> DamagedFileError:
    message = f"{printable(str(path))} is {what}, which is not read; convert it to JPEG or PNG, or remove it"
    return DamagedFileError(message, path)


def _decoded(file: BinaryIO, path: Path, shape: tuple[int, ...]) -> Image.Image:
    image = _open(file, path)
    mode, size = _MODES[shape[0]], (shape[2], shape[1])
    if image.format in ("JPEG", "MPO"):
        profile = image.info.get("icc_profile")
        stored = _swapped(size) if _orientation(image) in _SWAPS_SIDES else size
        # A 12-megapixel photo would take 36 MB otherwise. Gray comes from the luma alone, where no profile says else.
        image.draft("RGB" if profile else mode, stored)
    if image.width * image.height > _MOST_PIXELS:
        raise _TooLarge(f"{image.width}×{image.height} pixels")
    most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        image.load()
    finally:
        Image.MAX_IMAGE_PIXELS = most
    # Only now: a PNG may say it behind its pixels, and a TIFF is turned by Pillow while it is loaded.
    orientation = _orientation(image)
    profile = image.info.get("icc_profile")
    gamma = None if profile or "srgb" in image.info else image.info.get("gamma")
    # Of a sample, as IHDR has it (PNG specification, section 11.2.1).
    bits = os.pread(file.fileno(), 1, 24)[0] if image.format == "PNG" else 8
    plain = _plain(image, path, bits)
    plain = _resized(plain, _swapped(size) if orientation in _SWAPS_SIDES else size)
    plain = _in_srgb(plain, profile, gamma)
    if orientation in _TURNS:
        plain = plain.transpose(_TURNS[orientation])
    return plain if plain.mode == mode else plain.convert(mode)


def _orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF counts; 1 where it says nothing that can be understood."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - damaged EXIF data bars no photo
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _plain(image: Image.Image, path: Path, bits: int) -> Image.Image:
    """The image, whose file has so many bits a sample, in a mode that can be scaled: L, LA, RGB, RGBA or CMYK."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bits(image, path)
    if image.mode in ("L", "RGB") and "transparency" in image.info:
        return _with_key(image, bits)
    if image.mode in ("P", "PA"):
        return image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return image
    if image.mode == "1":
        keyed = image.info.get("transparency")
        gray = image.convert("L")
        return gray if keyed is None else _with_alpha(gray, np.asarray(gray) != keyed)
    if image.mode in ("La", "RGBa"):
        return image.convert(image.mode.upper())
    return image.convert("RGB")  # YCbCr, HSV, RGBX, LAB


def _with_key(image: Image.Image, bits: int) -> Image.Image:
    """Of a gray or RGB image with one colour that is transparent (PNG's tRNS, GIF): the same with alpha.

    Pillow gives that colour as the file has it, and pixels as 8 bits, whatever depth they had.
    """
    key = image.info["transparency"]
    if isinstance(key, bytes):
        return image
    parts = tuple(part >> 8 if bits == 16 else part * 255 // ((1 << bits) - 1) for part in np.atleast_1d(key).tolist())
    pixels = np.asarray(image)
    opaque = pixels != parts[0] if image.mode == "L" else (pixels != np.array(parts)).any(axis=2)
    return _with_alpha(image, opaque)


def _with_alpha(image: Image.Image, opaque: npt.NDArray[np.bool_]) -> Image.Image:
    result = image.copy()
    result.info.pop("transparency", None)
    result.putalpha(Image.fromarray(opaque.astype(np.uint8) * np.uint8(255)))
    return result


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """Gray of 12, 16 or 32 bits, or of floats, scaled to 8 bits; a few rows at a time."""
    tags: Any = getattr(image, "tag_v2", {})
    key = image.info.get("transparency")
    is_float = image.mode == "F"
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))
    most = 1.0 if is_float else float((1 << min(16, bits[0] if isinstance(bits, tuple) else bits)) - 1)
    inverted = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
    gray = np.empty((image.height, image.width), np.uint8)
    opaque = np.ones((image.height, image.width), np.bool_) if isinstance(key, int) else None
    for top in range(0, image.height, _BAND_ROWS):
        rows = slice(top, min(top + _BAND_ROWS, image.height))
        band = np.asarray(image.crop((0, rows.start, image.width, rows.stop)))
        low, high = band.min(), band.max()
        if not 0 <= low <= high <= most:  # nor NaN
            raise DamagedFileError(
                f"{printable(str(path))} holds {'floating-point' if is_float else 'integer'} values from {low:g} to "
                f"{high:g}, of which nobody can say what is white; only 0 to {most:g} are read: save it with 8 or 16 "
                "bits, or remove it",
                path,
            )
        scaled = np.rint(band * np.float32(255 / most)).astype(np.uint8)
        gray[rows] = 255 - scaled if inverted else scaled
        if opaque is not None:
            opaque[rows] = band != key
    result = Image.fromarray(gray)
    return result if opaque is None else _with_alpha(result, opaque)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bilinear, over all pixels that fall into one. Transparent ones have no part in it."""
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)


def _in_srgb(image: Image.Image, profile: Any, gamma: Any) -> Image.Image:
    """Opaque, gray or RGB, in sRGB."""
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colours = image.convert(image.mode[:-1]) if alpha is not None else image
    transform = _transform(profile, colours.mode) if isinstance(profile, bytes) else None
    if transform is not None:
        colours = transform(colours)
    elif colours.mode == "CMYK":
        colours = colours.convert("RGB")
    if isinstance(gamma, float) and gamma > 0 and abs(gamma - _SRGB_GAMMA) > 0.02:
        exponent = _SRGB_GAMMA / gamma
        table = [round(255 * (value / 255) ** exponent) for value in range(256)]
        colours = colours.point(table * len(colours.getbands()))
    if alpha is None:
        return colours
    ground = Image.new("RGB", colours.size, _GROUND).convert(colours.mode)
    ground.paste(colours, mask=alpha)
    return ground


def _transform(profile: bytes, mode: str) -> Transform:
    """What turns colours of this profile into sRGB. The last few are kept: the photos of one camera share theirs."""
    key = hashlib.sha256(profile).digest(), mode
    if key not in _transforms:
        while len(_transforms) >= _PROFILES_KEPT:
            del _transforms[next(iter(_transforms))]
        _transforms[key] = _new_transform(profile, mode)
    return _transforms[key]


def _new_transform(profile: bytes, mode: str) -> Transform:
    try:
        from PIL import ImageCms  # only here, since most photos have no profile
    except ImportError:  # a Pillow built without it
        return None
    try:
        source, srgb = ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB")
        built = ImageCms.buildTransform(source, srgb, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None

    def apply(image: Image.Image) -> Image.Image:
        result = ImageCms.applyTransform(image, built)
        assert result is not None
        return result

    # sRGB goes by many names, and what is as good as sRGB is left alone.
    probe = _probe(mode)
    if mode != "CMYK" and np.abs(np.asarray(apply(probe), np.int16) - np.asarray(probe.convert("RGB"))).max() <= 2:
        return None
    return apply


def _probe(mode: str) -> Image.Image:
    """Colours all over a mode's range."""
    steps = np.arange(0, 256, 17, dtype=np.uint8)
    if mode == "L":
        return Image.fromarray(steps[None])
    cube = np.stack(np.meshgrid(*[steps] * 3, indexing="ij"), axis=-1).reshape(len(steps), -1, 3)
    return Image.fromarray(cube) if mode == "RGB" else Image.new(mode, (1, 1))


def _swapped(size: tuple[int, int]) -> tuple[int, int]:
    return size[1], size[0]
