"""A forward pass that keeps only what goes into each unit, and a backward pass that computes the rest once more.

The same trade as gradient checkpointing (Chen et al., arXiv 1604.06174), with one segment per unit and without
torch.utils.checkpoint, whose import costs 86 MiB. Gradients are those of the plain passes: random numbers are drawn
alike both times, and running statistics move in the first pass only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedepth.models.split import Unit


def forward_backward(
    units: Sequence[Unit], x: torch.Tensor, finish: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Adds up gradients of `finish(units(x))`, a scalar, and returns its value.

    Args:
        units: at least one, in order.
        x: their input; no gradient is computed for it.
        finish: from the last unit's output to the loss.
    """
    inputs, random_states = [x], []
    del x
    with torch.no_grad():
        for unit in units:
            random_states.append(_random_state(inputs[-1].device))
            inputs.append(unit(inputs[-1]))
    output = inputs.pop().requires_grad_()
    loss = finish(output)
    torch.autograd.backward(loss)
    gradients = [output.grad]
    del output
    for unit in reversed(units):
        x = inputs.pop().detach().requires_grad_(bool(inputs))  # nobody wants the first unit's input gradient
        with _repeated(unit, random_states.pop(), x.device):
            # Neither the output nor its gradient has a name here: the backward pass frees them as it goes.
            going_on = _Continue.apply(unit(x), gradients.pop())
        torch.autograd.backward(going_on)
        gradients.append(x.grad)
        del x, going_on
    return loss.detach()


class _Continue(torch.autograd.Function):
    """A scalar whose backward pass goes on with a given gradient.

    torch.autograd.backward would take it as its second argument, and import sympy to check its shape: 35 MiB.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.gradient = gradient
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient, None


@contextmanager
def _repeated(unit: Unit, random_state: torch.Tensor, device: torch.device) -> Iterator[None]:
    """Draws the random numbers of the first pass again, and leaves running statistics alone."""
    after = _random_state(device)
    norms = [
        module
        for top in unit.modules
        for module in top.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    _set_random_state(random_state, device)
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        _set_random_state(after, device)


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: torch.Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
