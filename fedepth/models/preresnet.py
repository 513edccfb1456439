"""PreResNet-20 for 32×32 images: pre-activation residual blocks (He et al. 2016, arXiv 1603.05027)."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import nn
from torch.nn import functional as F

WIDTHS = (16, 32, 64)
BLOCKS_PER_WIDTH = 3


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU, 3×3 convolution, twice, added to the shortcut.

    Where the width changes, the shortcut is a 1×1 convolution of the activated input at stride 2. It is
    written as subsampling followed by a convolution at stride 1, which is the same function with the same
    parameters: the backward pass of a 1×1 convolution with stride 2 from 8 to 16 channels in channels_last
    corrupts the heap for odd batches on x86 (torch 2.13 to 2.15).
    """

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.norm1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.shortcut = None if width_in == width_out and stride == 1 else nn.Conv2d(width_in, width_out, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, width_in, H, W) to (B, width_out, H/stride, W/stride)."""
        activated = F.relu(self.norm1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(activated[:, :, :: self.stride, :: self.stride])
        out: torch.Tensor = self.conv2(F.relu(self.norm2(self.conv1(activated)), inplace=True))
        return out + shortcut


class PreResNet(nn.Module):
    """A convolutional stem and nine blocks (ten units); a head of BatchNorm, ReLU, mean and linear layer."""

    def __init__(self, in_channels: int, classes: int, width: Fraction = Fraction(1)) -> None:
        """`width`: how many times as many channels as PreResNet-20 has, rounded up."""
        super().__init__()
        widths = [math.ceil(width * channels) for channels in WIDTHS]
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        width_in = widths[0]
        for place, width_out in enumerate(widths):
            for number in range(BLOCKS_PER_WIDTH):
                blocks.append(PreActivationBlock(width_in, width_out, stride=2 if place and not number else 1))
                width_in = width_out
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Sequential(
            nn.BatchNorm2d(widths[-1]),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(widths[-1], classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) float images to (B, classes) logits; H and W are multiples of 4."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return logits
