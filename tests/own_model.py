"""A model that only its owner knows: no pattern describes how to split it, and a trainer never has all of it."""

from __future__ import annotations

import sys

import torch
from torch import nn

from fedepth.task import ModelSpec

WIDTHS = (16, 16, 32, 32)


def build(spec: ModelSpec) -> nn.Module:
    """Convolutions in order. A trainer may ask for it on the meta device only."""
    if "edge_client.train_request" in sys.modules and torch.empty(0).device.type != "meta":
        raise MemoryError("a trainer asked for the whole model")
    layers: list[nn.Module] = []
    width = spec.input_shape[0]
    for number, wider in enumerate(WIDTHS):
        layers += [nn.Conv2d(width, wider, 3, stride=1 + number % 2, padding=1), nn.GroupNorm(4, wider), nn.ReLU()]
        width = wider
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * width, len(spec.classes)))
