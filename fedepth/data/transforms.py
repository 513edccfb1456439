"""From samples as they are stored to a model's input, and augmentation. numpy only."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from fedepth.data.tables import features
from fedepth.errors import ConfigError, DataError
from fedepth.task import InputType, ModelSpec

AUGMENTATIONS = ("none", "crop-flip")
_PADDING = 4


def model_inputs(batch: npt.NDArray[Any], spec: ModelSpec) -> npt.NDArray[np.float32] | npt.NDArray[np.int64]:
    """Samples (n, *spec.sample_shape) as the model takes them (n, *spec.input_shape): bytes normalised, rows of a table
    as features, or token ids.

    Raises:
        DataError: the batch does not have the model's input shape.
    """
    if spec.table is not None:
        return features(batch, spec.table)
    return batch.astype(np.int64) if spec.input_type is InputType.TOKENS else normalise(batch, spec)


def normalise(batch: npt.NDArray[np.uint8], spec: ModelSpec) -> npt.NDArray[np.float32]:
    """(batch / 255 − mean) / std per channel; both shapes (n, C, …).

    Raises:
        DataError: the batch does not have the model's input shape.
    """
    if batch.shape[1:] != spec.input_shape:
        raise DataError(f"a batch of {batch.shape[1:]} for model {spec.name}, which takes {spec.input_shape}")
    channels = (-1, *(1,) * (batch.ndim - 2))
    mean = np.asarray(spec.mean, np.float64).reshape(channels)
    std = np.asarray(spec.std, np.float64).reshape(channels)
    result = batch.astype(np.float32)
    # In place: one float32 copy of the batch is all that this costs.
    result *= (1 / (255 * std)).astype(np.float32)
    result -= (mean / std).astype(np.float32)
    return result


def augment(batch: npt.NDArray[np.uint8], kind: str, key: int, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Random views of a batch; both shapes (n, C, H, W).

    "none" returns the batch itself. "crop-flip" pads with 4 black pixels on each side, cuts the original size out at
    random, and flips half of the images (He et al., arXiv 1512.03385, section 4.2).

    Args:
        key: `views_key`.
        indices: (n,), of the images in their data set. The view of an image depends on this and the key alone, and not
            on how images are cut into batches, or how often they are read.

    Raises:
        ConfigError: there is no such kind, or these are no images.
    """
    if kind == "none":
        return batch
    if kind != "crop-flip":
        raise ConfigError(f"augmentation {kind!r}: there are {', '.join(AUGMENTATIONS)}")
    if batch.ndim != 4:
        raise ConfigError(f"augmentation {kind!r} is for images (channels, height, width), not for {batch.shape[1:]}")
    corners = 2 * _PADDING + 1
    drawn = _drawn(key, indices)
    tops, lefts, flips = drawn % corners, drawn // corners % corners, drawn // corners**2 % 2
    height, width = batch.shape[2:]
    padded = np.zeros((batch.shape[1], height + 2 * _PADDING, width + 2 * _PADDING), np.uint8)
    views = np.empty_like(batch, order="C")
    for place, (top, left, flip) in enumerate(zip(tops.tolist(), lefts.tolist(), flips.tolist(), strict=True)):
        padded[:, _PADDING : _PADDING + height, _PADDING : _PADDING + width] = batch[place]
        view = padded[:, top : top + height, left : left + width]
        views[place] = view[:, :, ::-1] if flip else view
    return views


def views_key(seed: int, round: int, device_id: str, epoch: int = 0) -> int:
    """What the views of an epoch are drawn by: 64 bits, others for each task and epoch."""
    text = f"{seed}/{round}/{device_id}/{epoch}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def _drawn(key: int, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """64 random bits for each index: the output of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
    generators", OOPSLA 2014, figure 17) that starts at `key`, at these places of its sequence.

    numpy's generators would have to draw for all images, and keep that, or be set up for each image.
    """
    z = np.uint64(key) + (indices.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
