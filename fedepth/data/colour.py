"""Colours of images turned into sRGB: by ICC profiles, a PNG's gamma, or code points. numpy and PIL."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

_SRGB_GAMMA = 1 / 2.2  # of a PNG's gAMA chunk, where it changes nothing
_GROUND = (255, 255, 255)  # what shows through transparent parts, as in most viewers
_PROFILES_KEPT = 16

# Chromaticities x, y of red, green and blue; white is D65 (ITU-T H.273, table 2).
_PRIMARIES = {
    1: (0.640, 0.330, 0.300, 0.600, 0.150, 0.060),  # sRGB, BT.709
    5: (0.640, 0.330, 0.290, 0.600, 0.150, 0.060),
    6: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046),  # BT.2020
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060),  # Display P3
}
_D65 = (0.3127, 0.3290)
_SRGB_CURVE = 13
# H.273, table 3; what is not here has no white that a screen shows, or is of another kind.
_GAMMAS = {4: 2.2, 5: 2.8, 8: 1.0}
_BT709_CURVES = (1, 6, 14, 15)
_HIGH_RANGE = {16: "PQ", 18: "HLG"}
_UNSPECIFIED = 2

# None where it would change nothing, or cannot be used: it is damaged, or for other colours than the image has.
Transform = Callable[[Image.Image], Image.Image] | None
_transforms: dict[tuple[bytes, str], Transform] = {}


@dataclass(frozen=True)
class Coding:
    """Colours as code points (ITU-T H.273): which primaries, and which transfer function."""

    primaries: int
    transfer: int

    def to_srgb(self, image: Image.Image) -> Image.Image:
        """The same colours in sRGB, gray or RGB; what sRGB does not have is clipped."""
        if (self.primaries, self.transfer) == (1, _SRGB_CURVE):
            return image
        light = _light(self.transfer)[np.asarray(image)]
        if image.mode == "RGB":
            light = light @ (np.linalg.inv(_to_xyz(1)) @ _to_xyz(self.primaries)).T
        light = np.clip(light, 0, 1)
        encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
        return Image.fromarray(np.rint(255 * encoded).astype(np.uint8))


def coding_of(numbers: tuple[int, int, int, int] | None) -> Coding | None:
    """The colours that a PNG's cICP chunk stands for; None where it says nothing.

    Raises:
        ValueError: they cannot be turned into sRGB. It says what they are.
    """
    if numbers is None or _UNSPECIFIED in numbers[:2]:
        return None
    primaries, transfer, matrix, full = numbers
    if transfer in _HIGH_RANGE:
        raise ValueError(f"of high dynamic range ({_HIGH_RANGE[transfer]})")
    if primaries not in _PRIMARIES or transfer not in (*_GAMMAS, *_BT709_CURVES, _SRGB_CURVE) or matrix or full != 1:
        raise ValueError(f"with colours of the code points {primaries}, {transfer}, {matrix} and {full}")
    return Coding(primaries, transfer)


def _light(transfer: int) -> npt.NDArray[np.float64]:
    """Of each byte the light that it stands for, 0 to 1."""
    value = np.arange(256) / 255
    if transfer == _SRGB_CURVE:
        return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    if transfer in _BT709_CURVES:
        return np.where(value < 0.081, value / 4.5, ((value + 0.099) / 1.099) ** (1 / 0.45))
    return value ** _GAMMAS[transfer]


def _to_xyz(primaries: int) -> npt.NDArray[np.float64]:
    """The matrix from linear RGB of these primaries to CIE XYZ (SMPTE RP 177)."""
    x, y = np.array([*_PRIMARIES[primaries], *_D65]).reshape(4, 2).T
    *colours, white = np.array([x / y, y / y, (1 - x - y) / y]).T
    columns = np.array(colours).T
    return np.asarray(columns * np.linalg.solve(columns, white))


def in_srgb(image: Image.Image, profile: Any, gamma: Any, coding: Coding | None = None) -> Image.Image:
    """An image over white, gray or RGB, in sRGB.

    Args:
        profile: the bytes of its ICC profile, or anything else where it has none.
        gamma: a PNG's, or anything else.
        coding: a PNG's, which comes before both.
    """
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colours = image.convert(image.mode[:-1]) if alpha is not None else image
    transform = _transform(profile, colours.mode) if isinstance(profile, bytes) and coding is None else None
    if transform is not None:
        colours = transform(colours)
    elif colours.mode == "CMYK":
        colours = colours.convert("RGB")
    if coding is not None:
        colours = coding.to_srgb(colours)
    elif isinstance(gamma, float) and gamma > 0 and abs(gamma - _SRGB_GAMMA) > 0.02:
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
