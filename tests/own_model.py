"""Models that only their owner knows."""

from __future__ import annotations

import sys

import torch
from torch import nn

from fedepth.models.digits import DigitsCNN
from fedepth.task import ModelSpec

WIDTHS = (16, 16, 32, 32)
UNWRITTEN_BYTES = 24 << 20


def build(spec: ModelSpec) -> nn.Module:
    """Convolutions in order, which no pattern describes. A trainer may ask for it on the meta device only."""
    if "edge_client.trainer.protocol" in sys.modules and torch.empty(0).device.type != "meta":
        raise MemoryError("a trainer asked for the whole model")
    layers: list[nn.Module] = []
    width = spec.input_shape[0]
    for number, wider in enumerate(WIDTHS):
        layers += [nn.Conv2d(width, wider, 3, stride=1 + number % 2, padding=1), nn.GroupNorm(4, wider), nn.ReLU()]
        width = wider
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * width, len(spec.classes)))


def roomy_digits(spec: ModelSpec) -> nn.Module:
    """digits-cnn, whose last unit asks for memory that it never writes to, as oneDNN's wide convolutions do."""

    def ask(*_: object) -> None:
        torch.empty(UNWRITTEN_BYTES, dtype=torch.uint8)

    model = DigitsCNN(spec.input_shape[0], len(spec.classes))
    model.units[5].register_forward_pre_hook(ask)
    return model
