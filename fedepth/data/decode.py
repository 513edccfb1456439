"""Image files as arrays: the one way in which training, evaluation and inference read a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from fedepth.errors import DataError

MODES = {1: "L", 3: "RGB"}


def decode_image(path: Path, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """An image in the shape of a model's input, (1 or 3, H, W): resized (bilinear), as gray or RGB.

    Raises:
        DataError: the file cannot be read as an image.
    """
    mode, size = MODES[shape[0]], (shape[2], shape[1])
    try:
        with Image.open(path) as image:
            # A JPEG is then decoded near its final size: a 12-megapixel photo would take 36 MB otherwise.
            image.draft(mode, size)
            plain = image.convert(mode)
            pixels = np.asarray(plain if plain.size == size else plain.resize(size, Image.Resampling.BILINEAR))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}; repair or remove it") from error
    except MemoryError:
        raise DataError(
            f"{path} takes more memory to decode than training may take; scale it down towards "
            f"{size[0]}×{size[1]} pixels, or save it as JPEG, which is decoded near its final size"
        ) from None
    return np.ascontiguousarray(pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None])
