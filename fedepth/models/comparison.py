"""One step of a model with given inputs, what came of it, and how far two such outcomes are apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

# On one thread kernels sum in the same order every time. A wrong graph, or a random number, is off by far more.
TOLERANCE = 1e-4
SEED = 7


@dataclass(frozen=True)
class Trial:
    """One comparison: a batch of inputs of some scale, in one mode, with weights as they are or perturbed.

    Attributes:
        gradient: scale of the gradient of the logits; what is clipped shows where it is large.
        factor: of that gradient, a power of two; gradients of tensors are divided by it, so that they stay the same.
        channels_last: the graph runs in this memory format.
    """

    samples: int
    scale: float
    training: bool
    perturbed: bool
    gradient: float = 1.0
    factor: float = 1.0
    channels_last: bool = False

    def __str__(self) -> str:
        mode = "training" if self.training else "evaluation"
        layout = ", channels_last" if self.channels_last else ""
        gradients = f", gradients of scale {self.gradient * self.factor:.1g}" if self.factor != 1 else ""
        return f"{mode} mode, batch {self.samples}, inputs of scale {self.scale:g}{gradients}{layout}"


@dataclass(frozen=True)
class Outcome:
    """Of one step. `tensors`: parameters, buffers and constants as they are behind it; the unchanged are no copies."""

    logits: torch.Tensor
    gradients: Mapping[str, torch.Tensor]
    tensors: Mapping[str, torch.Tensor]


def backward(logits: torch.Tensor, trial: Trial) -> None:
    """The backward pass of a trial, from a loss that tells all logits apart."""
    if logits.requires_grad:
        weights = torch.linspace(-trial.gradient, trial.gradient, logits.numel()).view_as(logits)
        torch.autograd.backward((logits * (weights * trial.factor)).sum())


def gradients(parameters: Mapping[str, torch.Tensor], trial: Trial) -> dict[str, torch.Tensor]:
    """Those that a backward pass has left, without the trial's factor."""
    found = {each: tensor.grad for each, tensor in parameters.items() if tensor.grad is not None}
    if trial.factor != 1:
        for gradient in found.values():
            gradient.div_(trial.factor)
    return found


def difference(one: Outcome, other: Outcome, *, with_gradients: bool = True) -> tuple[float, str]:
    """The largest relative difference, and where it is."""
    pairs = [("the logits", one.logits, other.logits)]
    for each in one.gradients.keys() | other.gradients.keys() if with_gradients else ():
        known = one.gradients.get(each, other.gradients.get(each))
        assert known is not None
        zeros = torch.zeros_like(known)
        mine, theirs = one.gradients.get(each, zeros), other.gradients.get(each, zeros)
        pairs.append((f"the gradient of {each}", mine, theirs))
    pairs += [(each, one.tensors[each], other.tensors[each]) for each in one.tensors]
    return max(((relative(a, b), what) for what, a, b in pairs), key=lambda each: each[0])


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of the larger; what is no number in both is the same."""
    if one.shape != other.shape:
        return float("inf")
    if one.numel() == 0 or torch.equal(one, other):
        return 0.0
    one, other = one.double(), other.double()
    both = ~(one.isnan() & other.isnan() | (one == other))
    one, other = one[both], other[both]
    if one.numel() == 0:
        return 0.0
    size = max(float(one.abs().max()), float(other.abs().max()), 1e-6)
    apart = float((one - other).abs().max()) / size
    return apart if apart == apart else float("inf")
