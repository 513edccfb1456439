"""Krum, by numbers worked out by hand."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedepth.aggregation.aggregate import aggregate
from fedepth.aggregation.coordinates import STACK_BYTES
from fedepth.aggregation.krum import scores, squared_distances
from fedepth.aggregation.rules import Krum
from fedepth.aggregation.updates import OpenUpdate, open_updates
from fedepth.weights import load_numpy, open_weights, save
from tests.aggregation.update_files import client, f4


def points(folder: Path, *values: float) -> list[OpenUpdate]:
    save(folder / "base", {"a": f4(0)})
    updates = [client(folder, f"c{index}", 1, {"a": f4(value)}) for index, value in enumerate(values)]
    return open_updates(open_weights(folder / "base"), updates)


def test_a_score_is_the_sum_of_squared_distances_to_the_nearest(tmp_path: Path) -> None:
    distances = squared_distances(points(tmp_path, 0, 1, 3, 4, 100), ["a"])
    assert distances[0].tolist() == [0, 1, 9, 16, 10_000]
    # n = 5, f = 1: the two nearest count.
    assert scores(distances, 1) == [1 + 9, 1 + 4, 1 + 4, 1 + 9, 96**2 + 97**2]


def test_the_n_minus_f_of_the_lowest_scores_are_averaged_by_weight(tmp_path: Path) -> None:
    save(tmp_path / "base", {"a": f4(0), "mean": f4(0), "n": np.array(0)})
    updates = [
        client(tmp_path, name, weight, {"a": f4(value), "mean": f4(mean), "n": np.array(count)})
        for name, weight, value, mean, count in (
            ("p", 1, 0.0, 5.0, 3),
            ("q", 2, 1.0, 6.0, 5),
            ("r", 3, 3.0, 1e9, 6),
            ("s", 2, 4.0, 8.0, 10**6),
            ("t", 900, 100.0, 6.0, 1),
        )
    ]
    told = aggregate(tmp_path / "base", updates, tmp_path / "out", Krum(1), parameters={"a"})
    result = {name: tensor.tolist() for name, tensor in load_numpy(tmp_path / "out").items()}
    # (1·0 + 2·1 + 3·3 + 2·4) / 8; a poisoned buffer is not seen in distances, but cannot move a median far
    assert result == {"a": [19 / 8], "mean": [7.0], "n": 6}  # of 3, 5, 6, 10^6: 5.5, rounded to even
    assert (told.left_out, told.unjudged, told.notes) == ((4,), (), ())


def test_only_updates_of_the_same_tensors_are_compared(tmp_path: Path) -> None:
    save(tmp_path / "base", {"a": f4(0), "b": f4(0)})
    whole = [client(tmp_path, f"w{i}", 1, {"a": f4(v), "b": f4(0)}) for i, v in enumerate((1, 2, 3, 4, 1e6))]
    partial = [client(tmp_path, f"p{i}", 1, {"b": f4(v)}) for i, v in enumerate((10, 20))]
    updates = [partial[0], *whole, partial[1]]
    told = aggregate(tmp_path / "base", updates, tmp_path / "out", Krum(1), parameters={"a", "b"})
    result = {name: tensor.tolist() for name, tensor in load_numpy(tmp_path / "out").items()}
    assert result == {"a": [2.5], "b": [5.0]}  # b: (4 · 0 + 10 + 20) / 6
    assert told.left_out == (5,)
    assert told.unjudged == (0, 6)
    assert told.notes == (
        "2 updates of the same 1 tensors are too few to find 1 faulty ones among them, which takes 5: "
        "they were taken as they are",
    )


def test_an_update_that_is_not_finite_has_no_company(tmp_path: Path) -> None:
    save(tmp_path / "base", {"a": f4(0)})
    bad = (float("nan"), float("inf"))
    for value in bad:
        updates = [client(tmp_path, f"c{i}", 1, {"a": f4(v)}) for i, v in enumerate((value, 1, 2, 3, 4))]
        told = aggregate(tmp_path / "base", updates, tmp_path / "out", Krum(1), parameters={"a"})
        assert told.left_out == (0,)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    honest=st.lists(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=2), min_size=4, max_size=7),
    far=st.lists(st.floats(100, 2.0**100, width=32), min_size=2, max_size=2),
    place=st.integers(0, 7),
)
def test_the_far_outlier_is_never_chosen(
    tmp_path_factory: pytest.TempPathFactory, honest: list[list[float]], far: list[float], place: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    place = min(place, len(honest))
    rows = [*honest[:place], far, *honest[place:]]
    save(folder / "base", {"a": f4(0, 0)})
    updates = [client(folder, f"c{index}", 1, {"a": f4(*row)}) for index, row in enumerate(rows)]
    told = aggregate(folder / "base", updates, folder / "out", Krum(1), parameters={"a"})
    assert told.left_out == (place,)


def test_memory_is_one_stack(tmp_path: Path) -> None:
    count = 1 << 20
    save(tmp_path / "base", {"a": np.zeros(count, np.float32)})
    updates = [client(tmp_path, f"c{i}", 1, {"a": np.full(count, i, np.float32)}) for i in range(6)]
    opened = open_updates(open_weights(tmp_path / "base"), updates)
    tracemalloc.start()
    try:
        distances = squared_distances(opened, ["a"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert distances[1].tolist() == [count * (i - 1) ** 2 for i in range(6)]
    assert peak < STACK_BYTES + (4 << 20)
