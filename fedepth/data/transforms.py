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


def augment(batch: npt.NDArray[np.uint8], kind: str, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Random views of a batch; both shapes (n, C, H, W).

    "none" returns the batch itself and draws nothing. "crop-flip" pads with 4 black pixels on each side,
    cuts the original size out at random, and flips half of the images (He et al., arXiv 1512.03385, section
    4.2). Each image takes three draws, so that the views do not depend on how a sequence of images is cut
    into batches.

    Raises:
        ConfigError: there is no such kind.
    """
    if kind == "none":
        return batch
    if kind != "crop-flip":
        raise ConfigError(f"augmentation {kind!r}: there are {', '.join(AUGMENTATIONS)}")
    draws = rng.random((len(batch), 3))
    corners = (draws[:, :2] * (2 * _PADDING + 1)).astype(np.int64)
    height, width = batch.shape[2:]
    padded = np.zeros((batch.shape[1], height + 2 * _PADDING, width + 2 * _PADDING), np.uint8)
    views = np.empty_like(batch, order="C")
    for place, (top, left) in enumerate(corners.tolist()):
        padded[:, _PADDING : _PADDING + height, _PADDING : _PADDING + width] = batch[place]
        view = padded[:, top : top + height, left : left + width]
        views[place] = view[:, :, ::-1] if draws[place, 2] < 0.5 else view
    return views


def views_rng(seed: int, round: int, device_id: str) -> np.random.Generator:
    """The source of a task's random views: the same at every call, another for each round and device.

    A stage that starts anew with it, and draws for its samples in the same order, sees the same views as
    the stage before; that makes a cache of a block's inputs valid under augmentation.
    """
    text = f"{seed}/{round}/{device_id}".encode()
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text).digest(), "little"))
