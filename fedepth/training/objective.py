"""What a block is trained on: an exit leads from its output to logits, the objective from logits to a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from fedepth.errors import ModelError
from fedepth.models.skip import skip

Head = Callable[[torch.Tensor], torch.Tensor]


class Exit(Protocol):
    """From a block's output (n, *shape) to logits (n, classes)."""

    def __call__(
        self, output: torch.Tensor, *, head: Head, head_shape: tuple[int, ...], channels: int | None = None
    ) -> torch.Tensor:
        """`head`: from its input, of shape `head_shape` without the batch, to logits; `channels`: the dimension of the
        output that holds its channels, where that is known."""


@dataclass(frozen=True)
class Teachers:
    """Models that a block learns from beside the labels.

    Attributes:
        logits: what each of them says of the samples of a micro-batch, (n, classes); at least one. No gradient goes
            back to them.
        weight: λ, of the mean of their divergences in the loss.
        temperature: T, by which all logits are divided before they are compared.
    """

    logits: tuple[torch.Tensor, ...]
    weight: float = 1.0
    temperature: float = 1.0


def objective(
    logits: torch.Tensor, *, targets: torch.Tensor, batch: int, teachers: Sequence[Teachers] = ()
) -> torch.Tensor:
    """The loss of one micro-batch, a scalar: cross-entropy, and λ · KL(softmax(b / T) ‖ softmax(a / T)) for logits `a`
    and a teacher's `b` (arXiv 2303.04887, section 4.3); the mean over several teachers.

    As in the paper the divergence is not scaled by T², so that its gradients shrink with the temperature.

    Args:
        logits: (n, classes).
        targets: (n,), class indices.
        batch: the samples of the whole step; the losses of the micro-batch are summed and divided by it, so that the
            gradients of micro-batches add up to those of the batch.
        teachers: each with a weight and a temperature of its own: peers that train together, the global model.
    """
    loss = functional.cross_entropy(logits, targets, reduction="sum") / batch
    for each in teachers:
        own = functional.log_softmax(logits / each.temperature, dim=1)
        for given in each.logits:
            wanted = functional.log_softmax(given.detach() / each.temperature, dim=1)
            divergence = functional.kl_div(own, wanted, reduction="sum", log_target=True)
            loss = loss + divergence * (each.weight / (len(each.logits) * batch))
    return loss


def shared_head(
    output: torch.Tensor, *, head: Head, head_shape: tuple[int, ...], channels: int | None = None
) -> torch.Tensor:
    """The skip connection, and behind it the head that all blocks share (arXiv 2303.04887, section 4.1)."""
    return head(skip(output, head_shape, channels))


def any_exit(
    output: torch.Tensor, *, head: Head, head_shape: tuple[int, ...], channels: int | None = None
) -> torch.Tensor:
    """The shared head where there is a skip connection to it, else its logits of nothing, moved by the output's mean:
    for a warm-up, which may train any unit alone, and leaves nothing behind."""
    try:
        return shared_head(output, head=head, head_shape=head_shape, channels=channels)
    except ModelError:
        return head(output.new_zeros((len(output), *head_shape))) + output.flatten(1).mean(1, keepdim=True)
