"""By how much updates are scaled down that go too far: `rules.NormClipping`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fedepth.aggregation.norms import FACTORS, change_norms, norm_bound, parameter_scale
from fedepth.aggregation.rules import Kind
from fedepth.aggregation.updates import OpenUpdate
from fedepth.weights import Reader


@dataclass(frozen=True)
class Clipped:
    """An update that went too far.

    Attributes:
        update: its index among those given.
        kind: what of it was scaled down.
        change: its relative change (see `norms`).
        bound: what that was scaled down to.
    """

    update: int
    kind: Kind
    change: float
    bound: float


def clip(
    old: Reader, updates: Sequence[OpenUpdate], parameters: Collection[str], max_change: float | None
) -> tuple[dict[tuple[int, Kind], float], list[Clipped], list[int]]:
    """What to multiply the changes of each update with, by its index; what was too far; which could not be judged.

    Args:
        max_change: bound on the change of parameters; None for one that is learned, as that on buffers always is.
    """
    scale = parameter_scale(old, parameters)
    norms = [change_norms(old, update.tensors, parameters, scale) for update in updates]
    steps = [update.update.steps for update in updates]
    scales: dict[tuple[int, Kind], float] = {}
    clipped = []
    unjudged = set()
    for kind in FACTORS:
        changes = [norm.of(kind) for norm in norms]
        per_step = [change / count for change, count in zip(changes, steps, strict=True)]
        for place, update in enumerate(updates):
            change = changes[place]
            bound = max_change if kind == "parameters" else None
            if bound is None:
                bound = _bound(per_step, place, kind, steps[place])
            scales[update.index, kind] = 1.0
            if bound is None and change > 0:
                unjudged.add(update.index)
            elif bound is not None and change > bound:
                scales[update.index, kind] = bound / change
                clipped.append(Clipped(update.index, kind, change, bound))
    return scales, clipped, sorted(unjudged)


def _bound(per_step: Sequence[float], judged: int, kind: Kind, steps: int) -> float | None:
    """How far one update may go in its number of steps, given all others."""
    learned = norm_bound([*per_step[:judged], *per_step[judged + 1 :]], kind)
    return None if learned is None else learned * steps
