"""Whether a decoded image has all its pixels. numpy and PIL.

Decoders fill up what is missing behind a proper end of the file: with black in a PNG, with mid-gray in a JPEG. So only
an image that ends like that is looked at more closely.
"""

from __future__ import annotations

import re
import struct
from io import BytesIO
from typing import BinaryIO

import numpy as np
from PIL import Image

from fedepth.data import png

# A marker within the data of a scan that is neither an escaped 0xFF nor a restart (ITU-T T.81, section B.1.1.2).
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_END_OF_IMAGE = b"\xff\xd9"
_START_OF_SCAN = 0xDA
_FURTHER_DATA = bytes(range(1, 255)) * 4  # decodes to something else than mid-gray
_MID_GRAY = frozenset({127, 128})


def check_whole(image: Image.Image, file: BinaryIO) -> None:
    """Checks a PNG or JPEG that has just been decoded from `file`; other decoders tell by themselves.

    Raises:
        OSError: pixels are missing at its end.
    """
    if image.format == "PNG":
        last = image.crop((0, image.height - 1, image.width, image.height))
        if (png.is_interlaced(file) or not np.asarray(last).any()) and (missing := png.missing_bytes(file)):
            raise OSError(f"image file is truncated ({missing} bytes of its pixels are missing)")
    elif image.format in ("JPEG", "MPO"):
        corner = np.asarray(image.crop((image.width - 1, image.height - 1, image.width, image.height)))
        if _MID_GRAY.issuperset(corner.ravel().tolist()) and _would_take_more(image, file):
            raise OSError("image file is truncated (its last rows are missing)")


def _would_take_more(image: Image.Image, file: BinaryIO) -> bool:
    """Whether further data at the end of a JPEG's only scan would change the image, as it does not if it is whole."""
    file.seek(0)
    data = file.read()
    end = _end_of_scan(data)
    if not data.startswith(_END_OF_IMAGE, end):  # further scans refine an image that is whole
        return False
    longer = Image.open(BytesIO(data[:end] + _FURTHER_DATA + data[end:]), formats=("JPEG",))
    longer.draft(image.mode, image.size)
    return longer.size == image.size and not np.array_equal(np.asarray(longer), np.asarray(image))


def _end_of_scan(data: bytes) -> int:
    """Where the data of the first scan ends; the end of the file if there is none."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = struct.unpack_from(">xBH", data, place)
        place += 1 if marker == 0xFF else 2 + length
        if marker == _START_OF_SCAN:
            found = _END_OF_SCAN.search(data, place)
            return found.start() if found else len(data)
    return len(data)
