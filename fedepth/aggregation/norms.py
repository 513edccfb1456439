"""How far updates go, and how far is too far.

The norm of an update is the root-mean-square change of the parameters that it holds, divided by the root mean square
of all parameters of the model. A mean and not a sum, because devices train different numbers of units; relative to the
whole model, because what an update holds may be all zeros at first.

Buffers that training writes, such as the statistics of BatchNorm, are measured apart, against the base's values of the
same buffers: their scale is that of the data. In one norm a large variance would hide a poisoned weight, and the other
way round. Integers do not count.

Honest norms differ by more than a hundred times between devices that take one and fifty steps. Per step they differ far
less (`python -m benchmarks.norms`, docs/aggregation.md), so that bounds are learned per step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fedepth.aggregation.rules import ENOUGH_NORMS, Kind, Norms
from fedepth.aggregation.updates import held_tensors, is_floating, squared_change, sum_of_squares
from fedepth.encoding import DecodedPart
from fedepth.weights import Reader, open_weights

# Above what honest updates were measured to reach. Variances follow activations, which one class alone can drive up.
FACTORS: dict[Kind, float] = {"parameters": 15.0, "buffers": 40.0}


def update_norms(
    base: Path, parts: Sequence[Path], parameters: Collection[str], scales: dict[Path, float] | None = None
) -> Norms:
    """How far an update goes from `base`. Memory is a few slices of 512 KiB.

    Args:
        base: the weights that it was trained from.
        parts: its files.
        parameters: the names of all trainable parameters of the model; other floating-point tensors are buffers.
        scales: scales of the parameters of weights, by their path, as far as they are known; it learns that of `base`.

    Raises:
        StateError: a file is missing or damaged, or the parts do not fit `base`.
    """
    with open_weights(base) as old:
        known = {} if scales is None else scales
        if base not in known:
            known[base] = parameter_scale(old, parameters)
        return change_norms(old, held_tensors(old, parts), parameters, known[base])


def norm_bound(others: Sequence[float], kind: Kind = "parameters") -> float | None:
    """How large a norm per step may be, given those of the other updates of the round: a multiple of their median.

    None while fewer than 5 of them have changed anything. The median of 5 lies between honest norms as long as at most
    2 of them are poisoned; with 3 or 4, a second poisoned one could move it. Honest updates were measured to stay below
    3/4 of the bound, even of one that is learned from the 5 that went least far (docs/aggregation.md).
    """
    known = [norm for norm in others if norm > 0]
    return FACTORS[kind] * statistics.median(known) if len(known) >= ENOUGH_NORMS else None


def too_far(norms: Norms, others: Sequence[Norms]) -> str:
    """Why an update is refused whose norms per step are `norms`, given those of the other updates of its round; empty
    if it is not. Five others are needed to tell."""
    for kind in FACTORS:
        bound = norm_bound([each.of(kind) for each in others], kind)
        if bound is not None and norms.of(kind) > bound:
            return (
                f"its {kind} change by {norms.of(kind):.3g} of their size in a step, "
                f"{norms.of(kind) / bound:.1f} times what the "
                f"{len(others)} other updates of the round allow ([guard] learn_norms)"
            )
    return ""


def parameter_scale(old: Reader, parameters: Collection[str]) -> float:
    """The root mean square of all parameters; 1 where they are all 0."""
    return _root_mean_square(old, [name for name in old.names if name in parameters and is_floating(old, name)])


def change_norms(
    old: Reader, tensors: Mapping[str, DecodedPart], parameters: Collection[str], parameter_scale: float
) -> Norms:
    """`update_norms` of an update that is open."""
    held = [name for name in tensors if is_floating(old, name)]
    trained = sorted(name for name in held if name in parameters)
    buffers = sorted(name for name in held if name not in parameters)
    return Norms(
        _change(old, tensors, trained) / parameter_scale,
        _change(old, tensors, buffers) / _root_mean_square(old, buffers),
    )


def _change(old: Reader, tensors: Mapping[str, DecodedPart], names: Sequence[str]) -> float:
    return math.sqrt(squared_change(tensors, names) / max(_elements(old, names), 1))


def _root_mean_square(old: Reader, names: Sequence[str]) -> float:
    total = 0.0
    for name in names:
        for piece in old.slices(name):
            total += sum_of_squares(piece.astype(np.float64))
    return math.sqrt(total / max(_elements(old, names), 1)) or 1.0


def _elements(old: Reader, names: Iterable[str]) -> int:
    return sum(math.prod(old.info(name)[1]) for name in names)
