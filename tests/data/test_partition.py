"""Label-skewed partitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedepth.data.partition import dirichlet
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
    ("clients", "alpha", "minimum"),
    [(0, 1.0, 1), (2, 0.0, 1), (2, float("nan"), 1), (2, float("inf"), 1), (2, 1.0, -1)],
)
def test_settings_out_of_range_are_refused(clients: int, alpha: float, minimum: int) -> None:
    with pytest.raises(ConfigError, match=f"clients {clients}"):
        dirichlet(LABELS, clients, alpha, 1, minimum)
