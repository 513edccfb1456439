"""The skip connection: a parameter-free map from a unit's output to the input of the shared head."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch.nn import functional as F

from fedepth.errors import ModelError


def skip(x: torch.Tensor, shape: Sequence[int], known: int | None = None) -> torch.Tensor:
    """Maps a unit's output to the head's input (arXiv 2303.04887, section 4.1).

    The paper has feature maps whose channels only grow, and tokens of one width. The rest is ours:

    - Feature maps (B, C, H, W) are averaged over windows down to the head's height and width; channels that are missing
      become zeros, and channels that are too many are averaged in even groups. Series (B, C, T) alike.
    - Maps with channels last (B, H, W, C), and tokens (B, T, D), are treated so in their own order.
    - A vector (B, D) gets the mean over all positions of a map; its missing values are zeros.

    Args:
        x: a unit's output.
        shape: the head's input without the batch.
        known: which dimension of the output holds its channels, without the batch, where that is known
            (fedepth.models.channels).

    Raises:
        ModelError: there is no such map: it would have to enlarge an image, or turn a map into tokens.
    """
    target = tuple(shape)
    if tuple(x.shape[1:]) == target:
        return x
    channels = channel_dimension(tuple(x.shape[1:]), target, known)
    if channels is None:
        raise ModelError(
            f"no skip connection from an output of shape {tuple(x.shape[1:])} to a head that takes {target}: maps can "
            "only shrink, and keep their number of dimensions or become a vector"
        )
    x = x.movedim(channels + 1, 1)
    if len(target) == 1:
        return _channels(x.flatten(2).mean(2) if x.dim() > 2 else x, target[0])
    extents = target[:channels] + target[channels + 1 :]
    return _channels(_pool(x, extents), target[channels]).movedim(1, channels + 1)


def channel_dimension(source: tuple[int, ...], target: tuple[int, ...], known: int | None = None) -> int | None:
    """Which dimension of `source`, without the batch, holds its channels if it is to become `target`.

    The first or the last: the one with which all other dimensions only shrink; of both, the one that is `known`, or in
    which channels grow. None if there is no such map.
    """
    if len(target) == 1:
        # Where nothing tells them apart: an image has fewer pixels to a side than tokens have numbers, and squares.
        if len(source) == 3 and source[0] == source[1] != source[2]:
            return 2
        if len(source) == 2:
            return 1 if known is None else known
        return 0 if source else None
    if len(source) != len(target):
        return None
    fitting = [
        channels
        for channels in (0, len(source) - 1)
        if all(n >= m for at, (n, m) in enumerate(zip(source, target, strict=True)) if at != channels)
    ]
    if len(source) == 2 and known in fitting:
        return known
    growing = [channels for channels in fitting if source[channels] <= target[channels]]
    return next(iter(growing or fitting), None)


def _pool(x: torch.Tensor, extents: tuple[int, ...]) -> torch.Tensor:
    """(B, C, …) averaged over windows to (B, C, *extents)."""
    now = tuple(x.shape[2:])
    if now == extents:
        return x
    even = all(n % m == 0 for n, m in zip(now, extents, strict=True))
    if len(extents) == 2:
        if even:
            return F.avg_pool2d(x, tuple(n // m for n, m in zip(now, extents, strict=True)))
        return F.adaptive_avg_pool2d(x, extents)
    if len(extents) == 1:
        return F.adaptive_avg_pool1d(x, extents[0])
    depth, height, width = extents
    return F.adaptive_avg_pool3d(x, (depth, height, width))


def _channels(x: torch.Tensor, count: int) -> torch.Tensor:
    """(B, C, …) with `count` channels: zeros behind its own, or means of even groups of them."""
    have = x.shape[1]
    if have < count:
        return F.pad(x, (0, 0) * (x.dim() - 2) + (0, count - have))
    if have > count:
        positions = prod(x.shape[2:])
        folded = F.adaptive_avg_pool1d(x.reshape(len(x), have, positions).transpose(1, 2), count)
        return folded.transpose(1, 2).reshape(len(x), count, *x.shape[2:])
    return x
