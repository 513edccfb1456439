"""All kinds of faults, and which seed is which."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.faults import damage, divergence, elsewhere, hostile, transitions
from benchmarks.faults.scenario import Kind


@dataclass(frozen=True)
class Planned:
    """A scenario of a full run."""

    seed: int
    kind: Kind


def planned() -> list[Planned]:
    """Every scenario. A kind has the seeds n·100 + 1 and on, where n is its place."""
    kinds = [
        *transitions.kinds(),
        *damage.kinds(),
        *divergence.kinds(),
        *hostile.kinds(),
        *elsewhere.kinds(),
        divergence.collapse(),
    ]
    return [
        Planned(place * 100 + time, kind) for place, kind in enumerate(kinds, 1) for time in range(1, kind.times + 1)
    ]
