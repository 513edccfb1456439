"""A forward pass that keeps only what goes into each unit, and a backward pass that computes the rest once more.

The same trade as gradient checkpointing (Chen et al., arXiv 1604.06174), with one segment per unit and without
torch.utils.checkpoint, whose import costs 86 MiB. Gradients are those of the plain passes: random numbers are drawn
alike both times, and the second pass writes to copies of the buffers as they were before the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fedepth.models.run import RunnableUnit


def forward_backward(
    units: Sequence[RunnableUnit], x: torch.Tensor, finish: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Adds up gradients of `finish(units(x))`, a scalar, and returns its value.

    Args:
        units: at least one, in order.
        x: their input; no gradient is computed for it.
        finish: from the last unit's output to the loss.
    """
    inputs, random_states, buffers = [x], [], []
    del x
    with torch.no_grad():
        for unit in units:
            random_states.append(random_state(inputs[-1].device))
            buffers.append(unit.copies_of_written() if unit.training else {})
            inputs.append(unit(inputs[-1]))
    gradients: list[torch.Tensor] = []
    loss = finish(_Capture.apply(inputs.pop().detach().requires_grad_(), gradients))
    torch.autograd.backward(loss)
    for unit in reversed(units):
        if not gradients:  # what comes behind is detached from it
            break
        x = inputs.pop().detach()
        if inputs:  # nobody wants the first unit's input gradient
            x = _Capture.apply(x.requires_grad_(), gradients)
        with random_numbers_of(random_states.pop(), x.device):
            # Neither the output nor its gradient has a name here: the backward pass frees them as it goes.
            going_on = _Continue.apply(unit(x, buffers.pop()), gradients.pop())
        del x
        if going_on.requires_grad:
            torch.autograd.backward(going_on)
        del going_on
    return loss.detach()


class _Capture(torch.autograd.Function):
    """Hands its input on; its backward pass puts the gradient into a list, as it comes.

    A leaf's `.grad` takes the leaf's strides instead, and torch's CPU backward of BatchNorm is wrong for a single
    sample whose gradient has such strides (2.14.1).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
        ctx.gradients = gradients
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> tuple[None, None]:
        ctx.gradients.append(gradient[0])
        return None, None


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
def random_numbers_of(state: torch.Tensor, device: torch.device) -> Iterator[None]:
    """Draws the random numbers again that were drawn from `state` on; what comes behind goes on as if it had not."""
    after = random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(after, device)


def random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: torch.Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
