"""The network of Flower's baseline niid_bench (github.com/adap/flower), as a user's model file beside a job."""

from __future__ import annotations

from typing import Any

from torch import nn


def lenet(spec: Any) -> nn.Module:
    """6 and 16 channels of 5×5 convolutions, each halved by pooling, and linear layers of 120, 84 and the classes."""
    channels, height, width = spec.input_shape
    positions = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * positions, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, len(spec.classes)),
    )
