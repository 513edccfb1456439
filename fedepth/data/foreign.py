"""What a file is that is not read as an image, in one sentence that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, TiffImagePlugin

from fedepth.errors import DamagedFileError
from fedepth.printable import printable, quoted

_HEAD_BYTES = 1024
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
    (8, b"AVI ", "a video"),
    (8, b"WAVE", "a sound file"),
    (0, b"ID3", "a sound file"),
    (0, b"OggS", "a sound file or a video"),
    (0, b"\x8aMNG", "an MNG animation"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzipped file"),
    (0, b"7z\xbc\xaf", "a 7-Zip archive"),
    (0, b"Rar!", "a RAR archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x93NUMPY", "an array of NumPy"),
    (0, b"\x89HDF", "an HDF5 file"),
    (128, b"DICM", "a DICOM image"),
    (0, b"\xd0\xcf\x11\xe0", "a document of Microsoft Office"),
    (0, b"\0\5\x16\7", "an AppleDouble file, which macOS writes beside the real one"),
    (0, b"\0\0\1\0", "an icon"),
)
# What holds a photo's place until somebody fetches it.
_PLACEHOLDERS = (
    (b"bplist00", "of iCloud; download the photo"),
    (b"version https://git-lfs.github.com/", "of Git LFS; fetch the file with `git lfs pull`"),
)
_BEGINNINGS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG", "PNG"),
    (b"GIF8", "GIF"),
    (b"RIFF", "WebP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"BM", "BMP"),
)
_LEAST_TEXT = 16  # bytes
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_LOSSLESS = frozenset({0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF})
# TIFF 6.0, sections 8, 18 and 19, and what later writers added.
_COMPRESSIONS = {
    6: "old-style JPEG",
    9: "JBIG",
    10: "JBIG",
    34661: "JBIG",
    34712: "JPEG 2000",
    33003: "JPEG 2000",
    33005: "JPEG 2000",
    34887: "LERC",
    34892: "lossy JPEG of DNG",
    50001: "WebP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
_FORMATS = {1: "unsigned integers", 2: "signed integers", 3: "floating-point numbers", 5: "complex", 6: "complex"}
_PHOTOMETRIC = {
    8: "L*a*b*",
    9: "ICC L*a*b*",
    10: "ITU L*a*b*",
    32803: "the filter of a camera",
    34892: "a linear raw file",
}


def foreign(path: Path, what: str) -> DamagedFileError:
    """The refusal of a file that is `what`: "an HEIC image"."""
    message = f"{printable(str(path))} is {what}, which is not read; convert it to JPEG or PNG, or remove it"
    return DamagedFileError(message, path)


def unidentified(path: Path, file: BinaryIO) -> DamagedFileError:
    """The refusal of a file that Pillow does not take for an image."""
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    for start, magic, what in _FOREIGN:
        if head[start:].startswith(magic):
            return foreign(path, what)
    placeholder = next((what for magic, what in _PLACEHOLDERS if head.startswith(magic)), "")
    if placeholder:
        return DamagedFileError(f"{printable(str(path))} is a placeholder {placeholder}, or remove it", path)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<svg", b"<?xml")) and b"<svg" in text:
        return foreign(path, "an SVG drawing")
    if text.startswith((b"<!doctype html", b"<html")):
        message = f"{printable(str(path))} is a web page, not an image; download it again or remove it"
        return DamagedFileError(message, path)
    if head.strip(b"\0") == b"":
        message = f"{printable(str(path))} holds nothing but zero bytes, as after a copy that failed; copy it again"
        return DamagedFileError(message, path)
    kind = next((name for magic, name in _BEGINNINGS if head.startswith(magic)), "")
    if kind == "TIFF" and (why := _of_tiff(file)):
        message = f"{printable(str(path))} is a TIFF {why}, which is not read; save it as PNG or JPEG, or remove it"
        return DamagedFileError(message, path)
    if kind == "JPEG" and (why := unusual_jpeg(file)):
        message = f"{printable(str(path))} is a JPEG {why}, which is not read; save it as PNG or JPEG, or remove it"
        return DamagedFileError(message, path)
    if not kind and len(head) >= _LEAST_TEXT and _is_text(head):
        message = (
            f"{printable(str(path))} is text, not an image ({quoted(head.decode('ascii'), 40)}); repair or remove it"
        )
        return DamagedFileError(message, path)
    why = (
        f"its header is not that of a whole {kind}"
        if kind
        else f"no format that is read begins with {head[:8].hex(' ')}"
    )
    return DamagedFileError(f"{printable(str(path))} cannot be read as an image: {why}; repair or remove it", path)


def unusual_jpeg(file: BinaryIO) -> str:
    """What bars a JPEG from being read, by its frame header (ITU-T T.81, section B.2.2); empty if nothing does."""
    place = 2
    while True:
        file.seek(place)
        data = file.read(9)
        if len(data) < 2 or data[0] != 0xFF:
            return ""
        marker, length = data[1], int.from_bytes(data[2:4], "big")
        if marker == 0xFF:
            place += 1
        elif marker == 0xD9:
            return "without an image in it"
        elif marker in _FRAMES and len(data) == 9:
            if marker in _LOSSLESS:
                return "of the lossless kind" if marker in (0xC3, 0xCB) else "of several resolutions"
            if data[4] != 8:
                return f"of {data[4]} bits a sample"
            return "" if data[5:7] != bytes(2) else "that does not say how high it is"
        else:
            place += 2 + length


def _is_text(head: bytes) -> bool:
    return all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head)


def unlike_any(tags: Any) -> str:
    """What is unusual in the tags of a TIFF that Pillow reads, but not as it is meant; empty if nothing is."""
    bits, formats = _each(tags, ExifTags.Base.BitsPerSample, 1), _each(tags, 339, 1)
    if tags.get(ExifTags.Base.PlanarConfiguration) == 2 and len(bits) > 1 and bits[0] != 8:
        return f"with a plane for each colour and {bits[0]} bits a sample"
    if formats[0] == 2 and bits[0] < 32:
        return f"of signed integers of {bits[0]} bits"
    return ""


def _of_tiff(file: BinaryIO) -> str:
    """Why the first image of a TIFF is not read; empty if its tags cannot be read."""
    try:
        file.seek(0)
        head = file.read(8)
        head += file.read(8) if head[2:3] == b"+" or head[3:4] == b"+" else b""
        tags = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)
        compression = tags.get(ExifTags.Base.Compression, 1)
        bits, formats = _each(tags, ExifTags.Base.BitsPerSample, 1), _each(tags, 339, 1)
        samples = tags.get(ExifTags.Base.SamplesPerPixel, 1)
        meaning = tags.get(ExifTags.Base.PhotometricInterpretation, -1)
    except Exception:  # noqa: BLE001 - of a damaged directory Pillow raises anything, and then it is that
        return ""
    if not tags:
        return ""
    if compression not in TiffImagePlugin.COMPRESSION_INFO:
        return f"with compression {compression}" + (
            f" ({_COMPRESSIONS[compression]})" if compression in _COMPRESSIONS else ""
        )
    of = _FORMATS.get(formats[0], f"samples of format {formats[0]}")
    colours = f", as {_PHOTOMETRIC[meaning]}" if meaning in _PHOTOMETRIC else ""
    return f"of {samples} × {bits[0]}-bit {of} a pixel{colours}"


def _each(tags: Any, tag: int, default: int) -> tuple[int, ...]:
    value = tags.get(tag, default)
    return value if isinstance(value, tuple) and value else (value if isinstance(value, int) else default,)
