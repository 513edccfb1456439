"""What a block is trained on: plain functions from its output to a loss."""

from __future__ import annotations

import torch
from torch.nn import functional

from fedepth.models.skip import skip
from fedepth.models.split import Unit


def shared_head(
    output: torch.Tensor, *, head: Unit, head_shape: tuple[int, ...], targets: torch.Tensor, batch: int
) -> torch.Tensor:
    """Cross-entropy behind the skip connection and the head that all blocks share (arXiv 2303.04887, section 4.1).

    Args:
        output: the block's, (n, *shape).
        head_shape: of one input of the head.
        targets: (n,), class indices.
        batch: the samples of the whole step; the losses of the micro-batch are summed and divided by it, so that the
            gradients of micro-batches add up to those of the batch.
    """
    return functional.cross_entropy(head(skip(output, head_shape)), targets, reduction="sum") / batch
