"""The skip connection: a parameter-free map from any unit's output to the input of the shared head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from fedepth.errors import ModelError


def skip(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Maps a unit's output to the head's input (arXiv 2303.04887, section 4.1).

    Feature maps (B, C, H, W) are averaged over windows down to the head's height and width, and get channels
    of zeros behind their own. Tokens (B, T, D) get zeros behind their width; where the width is constant, as
    in a ViT, the skip is the identity.

    Args:
        x: a unit's output, (B, C, H, W) or (B, T, D).
        shape: the head's input without the batch, (C, H, W) or (T, D).

    Raises:
        ModelError: the map would have to enlarge an image, drop channels, or change the number of tokens.
    """
    target = tuple(shape)
    if tuple(x.shape[1:]) == target:
        return x
    if x.dim() == 4 and len(target) == 3:
        channels, height, width = target
        if x.shape[1] <= channels and x.shape[2] >= height and x.shape[3] >= width:
            return _pad_dimension(_pool(x, height, width), 1, channels)
    if x.dim() == 3 and len(target) == 2 and x.shape[1] == target[0] and x.shape[2] <= target[1]:
        return _pad_dimension(x, 2, target[1])
    raise ModelError(
        f"No skip connection from an output of shape {tuple(x.shape[1:])} to a head that takes {target}: "
        "images can only shrink, channels only be added, and the number of tokens must stay. Change the "
        "model so that no unit is wider, or smaller in height and width, than the head's input."
    )


def _pool(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if x.shape[2:] == (height, width):
        return x
    if x.shape[2] % height == 0 and x.shape[3] % width == 0:
        return F.avg_pool2d(x, (x.shape[2] // height, x.shape[3] // width))
    return F.adaptive_avg_pool2d(x, (height, width))


def _pad_dimension(x: torch.Tensor, dimension: int, size: int) -> torch.Tensor:
    missing = size - x.shape[dimension]
    return F.pad(x, (0, 0) * (x.dim() - 1 - dimension) + (0, missing)) if missing else x
