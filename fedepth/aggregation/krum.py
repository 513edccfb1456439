"""Which updates have the closest company (Krum: Blanchard et al., arXiv 1703.02757, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedepth.aggregation.coordinates import STACK_BYTES, stacks
from fedepth.aggregation.updates import OpenUpdate
from fedepth.weights import Array


def groups(updates: Sequence[OpenUpdate]) -> list[list[OpenUpdate]]:
    """The updates by the tensors that they hold, in the order of their first."""
    found: dict[frozenset[str], list[OpenUpdate]] = {}
    for update in updates:
        found.setdefault(frozenset(update.tensors), []).append(update)
    return list(found.values())


def choose(group: Sequence[OpenUpdate], names: Sequence[str], faulty: int) -> list[OpenUpdate]:
    """The n − f updates of the lowest scores, in the order of `group`; of equal scores, the first."""
    scored = scores(squared_distances(group, names), faulty)
    best = sorted(range(len(group)), key=lambda place: (scored[place], place))[: len(group) - faulty]
    return [group[place] for place in sorted(best)]


def scores(distances: Array, faulty: int) -> list[float]:
    """Each update's sum of squared distances to its n − f − 2 nearest; infinite where a value was not finite.

    Args:
        distances: squared, shape (n, n).
    """
    count = len(distances)
    others = np.where(np.isnan(distances), np.inf, distances)
    np.fill_diagonal(others, np.inf)  # nobody is his own neighbour; sorted, this comes last
    others.sort(axis=1)
    nearest: Array = others[:, : count - faulty - 2].sum(axis=1)
    return [float(score) for score in nearest]


def squared_distances(group: Sequence[OpenUpdate], names: Sequence[str]) -> Array:
    """Between all pairs over the named tensors, which all of them hold; shape (n, n).

    From differences, not from inner products: close updates would drown in rounding there. The time is n² / 2 times the
    number of elements.
    """
    count = len(group)
    distances = np.zeros((count, count), np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        for name in names:
            # Half a stack, and as much again for the differences.
            for stack in stacks([update.tensors[name] for update in group], name, STACK_BYTES // 2):
                differences = np.empty_like(stack)
                for place in range(count - 1):
                    rest = np.subtract(stack[place + 1 :], stack[place], out=differences[place + 1 :])
                    distances[place, place + 1 :] += np.einsum("ij,ij->i", rest, rest)
                del differences, rest  # before the next are made
    return distances + distances.T
