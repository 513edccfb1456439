"""A small convolutional network for small images, such as scikit-learn's 8×8 digits."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import nn

CHANNELS = (8, 32, 32, 32, 64, 64)
STRIDES = (1, 2, 1, 1, 2, 1)
GRID = 4  # the head sees the last feature map as 4×4 means: where a stroke lies tells digits apart


class DigitsCNN(nn.Module):
    """Six units of convolution, GroupNorm and ReLU, and a linear head on coarse means of the last feature map.

    GroupNorm keeps samples apart: gradients accumulated over micro-batches are those of the whole batch, and
    there are no running statistics for label skew between devices to pull about.
    """

    def __init__(self, in_channels: int, classes: int, width: Fraction = Fraction(1)) -> None:
        """Few channels where the image is large, so that all units need similar memory.

        `width`: how many times as many channels as that, rounded up.
        """
        super().__init__()
        channels = [math.ceil(width * each) for each in CHANNELS]
        inputs = (in_channels, *channels[:-1])
        self.units = nn.ModuleList(
            _unit(width_in, width_out, stride)
            for width_in, width_out, stride in zip(inputs, channels, STRIDES, strict=True)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(GRID), nn.Flatten(), nn.Linear(channels[-1] * GRID**2, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) float images to (B, classes) logits."""
        for unit in self.units:
            x = unit(x)
        logits: torch.Tensor = self.head(x)
        return logits


def _unit(width_in: int, width_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, 3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(math.gcd(8, width_out), width_out),
        nn.ReLU(inplace=True),
    )
