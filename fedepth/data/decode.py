"""Image files as a viewer shows them, in the shape that a model takes. numpy and PIL, no torch.

Training, evaluation, inference and the parity check of an export all read through `decode_image`; docs/data.md says
what it does with orientation, depth, transparency, colour profiles and animations.
"""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TgaImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from fedepth.data import png
from fedepth.data.colour import Coding, coding_of, in_srgb
from fedepth.data.folders import RAW_SUFFIXES
from fedepth.data.foreign import foreign, unidentified, unlike_any, unusual_jpeg
from fedepth.data.whole import check_whole
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
# Where an alpha channel of zeros means that there is none; so viewers and libraries have it, since many writers leave
# these bytes empty.
_OPAQUE_AT_ZERO = ("TGA", "BMP", "DIB")
_BY_NAME = {".tga": (TgaImagePlugin.TgaImageFile.format,)}  # whose first bytes tell nothing
# After a JPEG is scaled while it is decoded. Beyond it, one image takes over half a GiB.
_MOST_PIXELS = 1 << 27
_BAND_ROWS = 64  # 16-bit images become 8-bit ones so many rows at a time
_MODES = {1: "L", 3: "RGB"}

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
    except MemoryError:
        raise DataError(
            f"{printable(str(path))} takes more memory to decode than training may take; scale it down "
            f"towards {shape[2]}×{shape[1]} pixels, or save it as JPEG, which is decoded near its final size"
        ) from None
    except Exception as error:  # Pillow's decoders meet damage with every kind of error
        raise _unreadable(path, error) from error
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
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DamagedFileError:
    what = shortened(str(error)) or type(error).__name__
    if what.startswith("decoder error"):  # of libtiff, whose words go to standard error
        what = "its compressed pixels are damaged, or of a kind that is not read"
    return DamagedFileError(f"{printable(str(path))} cannot be read as an image: {what}; repair or remove it", path)


def _too_large(image: Image.Image, path: Path) -> DamagedFileError:
    return DamagedFileError(
        f"{printable(str(path))} has {image.width}×{image.height} pixels, and at most {_MOST_PIXELS / 1e6:.0f} million "
        "are read; scale it down, or save it as JPEG, which is decoded near its final size",
        path,
    )


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
        raise foreign(path, "a camera's raw file")
    image = _identified(file, path)
    why = ""
    if image.format == "PNG":
        _coding(file, path)
        why = png.objection(file)
    elif image.format == "JPEG":
        why = unusual_jpeg(file)
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        why = unlike_any(image.tag_v2)
    if why:
        message = f"{printable(str(path))} is a {image.format} {why}, which is not read; save it as PNG or JPEG"
        raise DamagedFileError(f"{message}, or remove it", path)
    # A JPEG is scaled to an eighth of its size, at least, while it is decoded.
    pixels = image.width * image.height // (64 if image.format in ("JPEG", "MPO") else 1)
    if pixels > _MOST_PIXELS:
        raise _too_large(image, path)
    return image


def _identified(file: BinaryIO, path: Path) -> ImageFile.ImageFile:
    formats = _FORMATS + _BY_NAME.get(path.suffix.lower(), ())
    most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # a photo of 200 megapixels is no attack; see _decoded
    try:
        try:
            return Image.open(file, formats=formats)
        except (UnidentifiedImageError, ValueError):
            file.seek(0)
            repaired = png.without_spoilt(file) if file.read(len(png.SIGNATURE)) == png.SIGNATURE else None
            if repaired is None:
                raise
            return Image.open(repaired, formats=formats)
    except UnidentifiedImageError:
        raise unidentified(path, file) from None
    finally:
        Image.MAX_IMAGE_PIXELS = most


def _coding(file: BinaryIO, path: Path) -> Coding | None:
    """The colours of a PNG's cICP chunk."""
    try:
        return coding_of(png.coding(file))
    except ValueError as error:
        message = (
            f"{printable(str(path))} is a PNG {error}, which is not converted to sRGB; save it as sRGB, or remove it"
        )
        raise DamagedFileError(message, path) from None


def _decoded(file: BinaryIO, path: Path, shape: tuple[int, ...]) -> Image.Image:
    image = _open(file, path)
    mode, size = _MODES[shape[0]], (shape[2], shape[1])
    if image.format in ("JPEG", "MPO"):
        profile = image.info.get("icc_profile")
        stored = _swapped(size) if _orientation(image) in _SWAPS_SIDES else size
        # A 12-megapixel photo would take 36 MB otherwise. Gray comes from the luma alone, where no profile says else.
        image.draft("RGB" if profile else mode, stored)
    if image.width * image.height > _MOST_PIXELS:
        raise _too_large(image, path)
    most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        image.load()
    finally:
        Image.MAX_IMAGE_PIXELS = most
    check_whole(image, file)
    # Only now: a PNG may say it behind its pixels, and a TIFF is turned by Pillow while it is loaded.
    orientation = _orientation(image)
    profile = image.info.get("icc_profile")
    gamma = None if profile or "srgb" in image.info else image.info.get("gamma")
    coding = _coding(file, path) if image.format == "PNG" else None
    plain = _plain(image, path, file)
    plain = _resized(plain, _swapped(size) if orientation in _SWAPS_SIDES else size)
    plain = in_srgb(plain, profile, gamma, coding)
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


def _plain(image: Image.Image, path: Path, file: BinaryIO) -> Image.Image:
    """The image in a mode that can be scaled: L, LA, RGB, RGBA or CMYK."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bits(image, path)
    if image.mode in ("L", "RGB") and "transparency" in image.info:
        return _with_key(image, file, path)
    if (
        image.format in _OPAQUE_AT_ZERO
        and image.mode in ("LA", "RGBA")
        and image.getchannel("A").getextrema() == (0, 0)
    ):
        return image.convert(image.mode[:-1])
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


def _with_key(image: Image.Image, file: BinaryIO, path: Path) -> Image.Image:
    """Of a gray or RGB image with one colour that is transparent (PNG's tRNS, GIF): the same with alpha.

    Pillow gives that colour as the file has it, and pixels as 8 bits, whatever depth they had.
    """
    key = image.info["transparency"]
    if isinstance(key, bytes):
        return image
    bits = png.bits_of(file) if image.format == "PNG" else 8
    parts = np.atleast_1d(key)
    if bits == 16:  # the upper bytes of RGB are what Pillow gives; the lower ones differ, too
        low = _identified(file, path)
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        opaque = _differs(image, parts >> 8) | _differs(low, parts & 255)
    else:
        opaque = _differs(image, parts * 255 // ((1 << bits) - 1))
    return _with_alpha(image, opaque)


def _differs(image: Image.Image, colour: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    pixels = np.asarray(image)
    return np.asarray(pixels != colour[0] if pixels.ndim == 2 else (pixels != colour).any(axis=2))


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
    # Pillow has all integers of 32 bits as signed ones; a TIFF says whether they are (339: SampleFormat).
    is_unsigned = image.mode == "I" and bool(tags) and tags.get(339, (1,)) in (1, (1,))
    inverted = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
    gray = np.empty((image.height, image.width), np.uint8)
    opaque = np.ones((image.height, image.width), np.bool_) if isinstance(key, int) else None
    for top in range(0, image.height, _BAND_ROWS):
        rows = slice(top, min(top + _BAND_ROWS, image.height))
        band = np.asarray(image.crop((0, rows.start, image.width, rows.stop)))
        if is_unsigned:
            band = band.view(np.uint32)
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


def _swapped(size: tuple[int, int]) -> tuple[int, int]:
    return size[1], size[0]
