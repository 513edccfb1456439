"""The memory format that a model trains in: channels_last where it is faster and known to be safe."""

from __future__ import annotations

import torch
from torch import nn

from fedepth.models.split import SplitModel


def prefers_channels_last(split: SplitModel, device: torch.device) -> bool:
    """Convolutions on the CPU run several times faster in channels_last.

    Not where the model has a 1×1 convolution with a stride: its backward pass in channels_last has been seen to corrupt
    the heap on two threads (torch 2.13 and 2.14, AVX-512).
    """
    convolutions = [
        m
        for unit in (*split.units, split.head)
        for top in unit.modules
        for m in top.modules()
        if isinstance(m, nn.Conv2d)
    ]
    strided = any(c.kernel_size == (1, 1) and c.stride != (1, 1) for c in convolutions)
    # A patch embedding is no convolutional trunk.
    patches = any(c.kernel_size == c.stride and c.kernel_size != (1, 1) for c in convolutions)
    return device.type == "cpu" and bool(convolutions) and not strided and not patches
