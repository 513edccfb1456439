"""What a block is trained on: plain functions from its output to a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn import functional

from fedepth.errors import ModelError
from fedepth.models.skip import skip

Head = Callable[[torch.Tensor], torch.Tensor]


class Objective(Protocol):
    """From a block's output to the loss of one micro-batch, a scalar."""

    def __call__(
        self, output: torch.Tensor, *, head: Head, head_shape: tuple[int, ...], targets: torch.Tensor, batch: int
    ) -> torch.Tensor:
        """See `shared_head` for the arguments."""


def shared_head(
    output: torch.Tensor, *, head: Head, head_shape: tuple[int, ...], targets: torch.Tensor, batch: int
) -> torch.Tensor:
    """Cross-entropy behind the skip connection and the head that all blocks share (arXiv 2303.04887, section 4.1).

    Args:
        output: the block's, (n, *shape).
        head: from its input to logits.
        head_shape: of one input of the head.
        targets: (n,), class indices.
        batch: the samples of the whole step; the losses of the micro-batch are summed and divided by it, so that the
            gradients of micro-batches add up to those of the batch.
    """
    return functional.cross_entropy(head(skip(output, head_shape)), targets, reduction="sum") / batch


def any_output(
    output: torch.Tensor, *, head: Head, head_shape: tuple[int, ...], targets: torch.Tensor, batch: int
) -> torch.Tensor:
    """The shared head where there is a skip connection to it, else a mean: for a warm-up, which may train any unit
    alone, and leaves nothing behind."""
    try:
        return shared_head(output, head=head, head_shape=head_shape, targets=targets, batch=batch)
    except ModelError:
        return output.mean()
