"""The warm-up before a task's baseline: every unit runs forward and backward once on two samples.

It pages in the kernels that training will use and leaves no weights behind. What it
costs belongs to the trainer's start, not to the budget.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from fedepth.models.skip import skip
from fedepth.models.split import SplitModel, Unit, assign, release

SAMPLES = 2


def warm_up(split: SplitModel, device: torch.device, channels_last: bool) -> None:
    """Runs every unit and every exit forward and backward, one at a time."""
    _fill(split.head, device, channels_last)
    for unit, shape in zip(split.units, split.input_shapes, strict=True):
        x = torch.rand((SAMPLES, *shape), device=device, requires_grad=True)
        if channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        _fill(unit, device, channels_last)
        unit.train(True)
        split.head.train(True)
        logits = split.head(skip(unit(x), split.head_shape))
        targets = torch.zeros(SAMPLES, dtype=torch.int64, device=device)
        torch.autograd.backward(functional.cross_entropy(logits, targets))
        release(unit)
    release(split.head)


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
    patches = any(c.kernel_size == c.stride for c in convolutions)  # a patch embedding is no convolutional trunk
    return device.type == "cpu" and bool(convolutions) and not strided and not patches


def _fill(unit: Unit, device: torch.device, channels_last: bool) -> None:
    """Real tensors in place of a unit's meta tensors; any values do."""
    for name, like in (*unit.parameters(), *unit.buffers()):
        tensor = torch.full(tuple(like.shape), 1, dtype=like.dtype, device=device)
        if channels_last and tensor.dim() == 4:
            tensor = tensor.to(memory_format=torch.channels_last)
        assign(unit.model, name, tensor, requires_grad=name in unit.parameter_names)
