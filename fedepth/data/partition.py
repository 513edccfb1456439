"""Splitting a data set among clients with skewed labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    if minimum < 0:
        raise ConfigError(f"the fewest samples of a client must be at least 0, are {minimum}")
    _check_settings(clients, alpha)
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


def dirichlet_balanced(labels: npt.NDArray[Any], clients: int, alpha: float, seed: int) -> list[Indices]:
    """Parts of equal size, each with a class mixture of its own that is drawn from Dirichlet(alpha, …, alpha).

    Every place of every client takes a sample of a class drawn from that client's mixture, as far as classes have
    samples left; places are filled in random order, so that no client is left with what the others did not want. This
    is the split without unequal sizes of FedDyn (Acar et al., arXiv 2111.04263), FedMLB (arXiv 2207.06936) and DepthFL.

    Args:
        labels: shape (n,).
        clients: number of parts; their sizes differ by at most one.
        alpha: concentration, above 0.
        seed: the same seed gives the same parts.

    Returns:
        As `dirichlet`.

    Raises:
        ConfigError: a setting is out of range.
        DataError: there are fewer samples than clients.
    """
    _check(len(labels), clients, alpha)
    rng = np.random.default_rng(seed)
    members = [rng.permutation(np.flatnonzero(labels == label)).tolist() for label in np.unique(labels)]
    mixtures = np.stack([_shares(rng, len(members), alpha) for _ in range(clients)])
    left = np.array([len(each) for each in members], np.float64)
    parts: list[list[int]] = [[] for _ in range(clients)]
    places = rng.permutation(np.arange(len(labels)) % clients)
    for client, draw in zip(places.tolist(), rng.random(len(places)).tolist(), strict=True):
        chances = np.where(left > 0, mixtures[client], 0.0)
        if chances.sum() <= 0:  # all that it would like is gone
            chances = left
        ends = np.cumsum(chances)
        label = int(np.searchsorted(ends, draw * ends[-1], side="right"))
        left[label] -= 1
        parts[client].append(members[label].pop())
    return [np.array(sorted(part), np.int64) for part in parts]


def iid(count: int, clients: int, seed: int) -> list[Indices]:
    """Parts whose sizes differ by at most one, drawn at random; as `dirichlet`.

    Raises:
        ConfigError: there is no client.
        DataError: there are fewer samples than clients.
    """
    _check(count, clients)
    shuffled = np.random.default_rng(seed).permutation(count)
    return [np.sort(part) for part in np.array_split(shuffled, clients)]


def shards(labels: npt.NDArray[Any], clients: int, each: int, seed: int) -> list[Indices]:
    """Samples sorted by class and cut into clients · each shards of equal size, of which every client gets `each`.

    McMahan et al., arXiv 1602.05629, section 3, "pathological non-IID"; sizes of shards differ by at most one.

    Raises:
        ConfigError: a setting is out of range.
        DataError: there are fewer samples than shards.
    """
    if each < 1:
        raise ConfigError(f"the shards of a client must be at least 1, are {each}")
    _check(len(labels), clients * each)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    pieces = np.array_split(by_class, clients * each)
    dealt = rng.permutation(len(pieces)).reshape(clients, each)
    return [np.sort(np.concatenate([pieces[number] for number in own])) for own in dealt.tolist()]


def by_owner(owners: Sequence[str]) -> dict[str, Indices]:
    """The samples of each owner, such as a writer or a site, by name in sorted order; "" owns nothing.

    Args:
        owners: of every sample, in the order of the data.
    """
    found: dict[str, list[int]] = {}
    for index, owner in enumerate(owners):
        if owner:
            found.setdefault(owner, []).append(index)
    return {owner: np.array(found[owner], np.int64) for owner in sorted(found)}


def _check(samples: int, clients: int, alpha: float = 1.0) -> None:
    _check_settings(clients, alpha)
    if samples < clients:
        raise DataError(f"{samples} samples cannot give {clients} parts one each; use fewer clients or shards")


def _check_settings(clients: int, alpha: float) -> None:
    if clients < 1:
        raise ConfigError(f"there must be at least one client, not {clients}")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"alpha must be a finite number above 0, is {alpha:g}")
