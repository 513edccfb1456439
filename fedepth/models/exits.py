"""Where a block may end: behind a unit whose output tells something of the input, by a skip connection to the head."""

from __future__ import annotations

import torch

from fedepth.errors import ModelError
from fedepth.models.run import Model
from fedepth.models.skip import skip

# Logits of two inputs that differ by less than this share of their size do not depend on the input.
_SMALLEST_CHANGE = 1e-6


def find_exits(model: Model, inputs: torch.Tensor) -> tuple[bool, ...]:
    """For every unit whether a block may end behind it.

    A Vision Transformer's embedding, for one, has a skip connection, but its class token has met no patch yet: logits
    would not depend on the image. Full depth needs no skip connection, so the last unit always is an exit.

    Args:
        model: with weights, in evaluation mode.
        inputs: at least two that differ, (B, *input_shape).
    """
    exits: list[bool] = []
    with torch.no_grad():
        x = inputs
        for unit in model.units:
            x = unit(x)
            exits.append(_leads_to_head(model, x, unit.channels))
    return (*exits[:-1], True)


def _leads_to_head(model: Model, x: torch.Tensor, channels: int | None) -> bool:
    try:
        return tells_apart(model.head(skip(x, model.graph.head_shape, channels)))
    except ModelError:
        return False


def tells_apart(logits: torch.Tensor) -> bool:
    """Whether logits (B, classes) of inputs that differ depend on them."""
    change = (logits - logits[:1]).abs().max()
    return bool(change > _SMALLEST_CHANGE * logits.abs().max().clamp_min(1e-12))
