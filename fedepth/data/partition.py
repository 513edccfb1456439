"""Splitting a data set among clients with skewed labels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fedepth.errors import ConfigError, DataError

Indices = npt.NDArray[np.int64]


def dirichlet(labels: npt.NDArray[Any], clients: int, alpha: float, seed: int, minimum: int = 1) -> list[Indices]:
    """Deals the samples of each class to the clients in shares drawn from Dirichlet(alpha, …, alpha).

    A small alpha gives each client few classes, a large one equal shares (Yurochkin et al., arXiv 1905.12022,
    section 4). A client left with fewer than `minimum` samples is given some by the largest.

    Args:
        labels: shape (n,).
        clients: number of parts.
        alpha: concentration, above 0.
        seed: the same seed gives the same parts.
        minimum: samples that every client gets at least.

    Returns:
        For each client, its indices in rising order; every index below n occurs exactly once.

    Raises:
        ConfigError: a setting is out of range.
        DataError: there are fewer than clients · minimum samples.
    """
    if clients < 1 or minimum < 0 or not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"clients {clients} ≥ 1, minimum {minimum} ≥ 0 and a finite alpha {alpha} > 0 are needed")
    if len(labels) < clients * minimum:
        raise DataError(f"{len(labels)} samples cannot give {clients} clients {minimum} each; use fewer clients")
    rng = np.random.default_rng(seed)
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        ends = np.rint(np.cumsum(_shares(rng, clients, alpha)) * len(members)).astype(np.int64)
        for part, piece in zip(parts, np.split(members, ends[:-1]), strict=True):
            part.extend(piece.tolist())
    _give_minimum(parts, minimum)
    return [np.array(sorted(part), np.int64) for part in parts]


def _shares(rng: np.random.Generator, clients: int, alpha: float) -> npt.NDArray[np.float64]:
    shares = rng.dirichlet(np.full(clients, alpha))
    if np.isfinite(shares).all():
        return shares
    # So small an alpha that every gamma draw is 0: the limit, all to one client.
    shares = np.zeros(clients)
    shares[rng.integers(clients)] = 1
    return shares


def _give_minimum(parts: list[list[int]], minimum: int) -> None:
    for part in parts:
        while len(part) < minimum:
            part.append(max(parts, key=len).pop())
