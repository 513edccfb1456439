"""Label-skewed partitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedepth.data.partition import by_owner, dirichlet, dirichlet_balanced, iid, shards
from fedepth.errors import ConfigError, DataError

LABELS = np.repeat(np.arange(10), 100)


@settings(derandomize=True, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=0, max_size=60),
    clients=st.integers(1, 12),
    alpha=st.floats(1e-300, 1e6),
    seed=st.integers(0, 2**64),
    minimum=st.integers(0, 5),
)
def test_every_sample_goes_to_exactly_one_client_and_each_has_the_minimum(
    labels: list[int], clients: int, alpha: float, seed: int, minimum: int
) -> None:
    array = np.array(labels, np.int64)
    if len(labels) < clients * minimum:
        with pytest.raises(DataError, match=f"{len(labels)} samples cannot give {clients} clients {minimum}"):
            dirichlet(array, clients, alpha, seed, minimum)
        return
    parts = dirichlet(array, clients, alpha, seed, minimum)
    assert len(parts) == clients
    assert all(part.dtype == np.int64 and part.tolist() == sorted(part.tolist()) for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert min(map(len, parts)) >= minimum


def largest_class_share(alpha: float) -> float:
    parts = dirichlet(LABELS, 10, alpha, seed=3)
    return float(np.mean([np.bincount(LABELS[part]).max() / len(part) for part in parts]))


def test_a_small_alpha_skews_the_labels_and_a_large_one_does_not() -> None:
    assert largest_class_share(0.05) > 0.6
    assert largest_class_share(1000) < 0.15


def test_the_seed_decides() -> None:
    first, again, other = (dirichlet(LABELS, 4, 0.5, seed) for seed in (1, 1, 2))
    assert [part.tolist() for part in first] == [part.tolist() for part in again]
    assert [part.tolist() for part in first] != [part.tolist() for part in other]


def test_samples_of_a_class_are_dealt_at_random_and_not_by_position() -> None:
    part = dirichlet(np.zeros(100, np.int64), 2, 1e6, seed=1)[0]
    assert len(part) == 50
    assert 5 < (part < 50).sum() < 45


@pytest.mark.parametrize(
    ("clients", "alpha", "minimum", "says"),
    [
        (0, 1.0, 1, "at least one client, not 0"),
        (2, 0.0, 1, "alpha must be a finite number above 0, is 0"),
        (2, float("nan"), 1, "alpha .* is nan"),
        (2, float("inf"), 1, "alpha .* is inf"),
        (2, 1.0, -1, "fewest samples of a client must be at least 0, are -1"),
    ],
)
def test_settings_out_of_range_are_refused(clients: int, alpha: float, minimum: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        dirichlet(LABELS, clients, alpha, 1, minimum)


def test_balanced_parts_have_equal_sizes_and_mixtures_of_their_own() -> None:
    parts = dirichlet_balanced(LABELS, 8, 0.3, seed=1)
    assert {len(part) for part in parts} == {125}
    assert sorted(np.concatenate(parts).tolist()) == list(range(1000))
    shares = [np.bincount(LABELS[part]).max() / 125 for part in parts]
    assert float(np.mean(shares)) > 0.25  # of ten classes
    even = dirichlet_balanced(LABELS, 8, 1e6, seed=1)
    assert all(np.bincount(LABELS[part], minlength=10).max() <= 25 for part in even)


def test_balanced_parts_at_the_limit_of_a_small_alpha_are_single_classes_while_they_last() -> None:
    # Each mixture is one class. Two clients, two classes, equal sizes: either each its own, or both want the same one,
    # of which each gets what the order of places gives it, and the rest of the other.
    labels = np.repeat([0, 1], 10)
    for seed in range(20):
        first, second = (np.bincount(labels[part], minlength=2) for part in dirichlet_balanced(labels, 2, 1e-300, seed))
        assert first.sum() == second.sum() == 10
        assert (first + second).tolist() == [10, 10]
    assert any(
        sorted(len(set(labels[part])) for part in dirichlet_balanced(labels, 2, 1e-300, seed)) == [1, 1]
        for seed in range(20)
    )


@settings(derandomize=True, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    clients=st.integers(1, 12),
    alpha=st.floats(1e-300, 1e6),
    seed=st.integers(0, 2**64),
)
def test_no_balanced_sample_is_lost(labels: list[int], clients: int, alpha: float, seed: int) -> None:
    array = np.array(labels, np.int64)
    if len(labels) < clients:
        with pytest.raises(DataError, match=f"{len(labels)} samples cannot give {clients} parts one each"):
            dirichlet_balanced(array, clients, alpha, seed)
        return
    for parts in (dirichlet_balanced(array, clients, alpha, seed), iid(len(array), clients, seed)):
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert all(part.tolist() == sorted(part.tolist()) for part in parts)


def test_shards_are_runs_of_samples_sorted_by_class() -> None:
    labels = np.array([1, 0, 1, 0, 2, 2, 3, 3])
    parts = shards(labels, 2, 2, seed=5)
    # Four shards of two samples: exactly the four classes, of which each client has two.
    owned = [sorted(set(labels[part].tolist())) for part in parts]
    assert [len(classes) for classes in owned] == [2, 2] and sorted(owned[0] + owned[1]) == [0, 1, 2, 3]
    with pytest.raises(DataError, match="8 samples cannot give 9 parts"):
        shards(labels, 3, 3, seed=5)
    with pytest.raises(ConfigError, match="the shards of a client must be at least 1, are 0"):
        shards(labels, 3, 0, seed=5)


def test_owners_have_their_samples_in_the_order_of_names() -> None:
    parts = by_owner(["z", "a", "", "z"])
    assert {name: part.tolist() for name, part in parts.items()} == {"a": [1], "z": [0, 3]}
    assert list(parts) == ["a", "z"]
