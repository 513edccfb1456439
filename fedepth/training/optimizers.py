"""Optimizer steps in place, a parameter at a time. torch.optim costs tens of MiB at its first use, these cost nothing.

State is there before the first step, so that a stage's first step takes all that the later ones take. Both follow
torch.optim's arithmetic, which the tests hold them to.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fedepth.errors import ConfigError
from fedepth.estimate.peak import optimizer_copies
from fedepth.task import TrainingSpec

Step = Callable[[torch.Tensor, torch.Tensor, list[torch.Tensor], int, TrainingSpec], None]

ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8


def new_state(parameter: torch.Tensor, spec: TrainingSpec) -> list[torch.Tensor]:
    """What an optimizer carries from step to step for one parameter: momentum, or the two means of AdamW."""
    return [torch.zeros_like(parameter) for _ in range(optimizer_copies(spec))]


def sgd(
    parameter: torch.Tensor, gradient: torch.Tensor, state: list[torch.Tensor], step: int, spec: TrainingSpec
) -> None:
    """SGD with momentum and weight decay. `gradient` is used up."""
    if spec.weight_decay:
        gradient.add_(parameter, alpha=spec.weight_decay)
    if spec.momentum:
        (buffer,) = state
        gradient = buffer.mul_(spec.momentum).add_(gradient)
    parameter.add_(gradient, alpha=-spec.learning_rate)


def adamw(
    parameter: torch.Tensor, gradient: torch.Tensor, state: list[torch.Tensor], step: int, spec: TrainingSpec
) -> None:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2). `step` counts from 1. `gradient` is used up."""
    mean, square = state
    first, second = ADAM_BETAS
    parameter.mul_(1 - spec.learning_rate * spec.weight_decay)
    mean.lerp_(gradient, 1 - first)
    square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    torch.sqrt(square, out=gradient)
    gradient.div_(math.sqrt(1 - second**step)).add_(ADAM_EPSILON)
    parameter.addcdiv_(mean, gradient, value=-spec.learning_rate / (1 - first**step))


OPTIMIZERS: dict[str, Step] = {"sgd": sgd, "adamw": adamw}


def optimizer_step(name: str) -> Step:
    """The step function of an optimizer.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"optimizer {name!r} is unknown; there are {', '.join(sorted(OPTIMIZERS))}")
    return OPTIMIZERS[name]
