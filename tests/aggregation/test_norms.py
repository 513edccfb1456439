"""How far updates go: norms, learned bounds and clipping, by numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedepth.aggregation.aggregate import aggregate
from fedepth.aggregation.clipping import Clipped
from fedepth.aggregation.norms import Norms, norm_bound, update_norms
from fedepth.aggregation.rules import NormClipping
from fedepth.aggregation.updates import ClientUpdate
from fedepth.weights import load_numpy, save
from tests.aggregation.update_files import client, f4


def test_a_norm_is_the_change_per_element_relative_to_the_model(tmp_path: Path) -> None:
    save(tmp_path / "base", {"a": f4(3, 4), "b": f4(0, 0), "var": f4(2), "n": np.array(0)})
    parameters = {"a", "b"}  # root mean square: sqrt(25 / 4) = 2.5
    whole = client(tmp_path, "w", 1, {"a": f4(3, 9), "b": f4(5, 0), "var": f4(8), "n": np.array(10**9)})
    assert update_norms(tmp_path / "base", whole.parts, parameters) == Norms(
        np.sqrt(50 / 4) / 2.5, 3.0
    )  # the variance: 6 / 2, whatever the parameters do
    part = client(tmp_path, "p", 1, {"b": f4(5, 0)})  # it holds zeros alone: half of the elements, half of the change
    assert update_norms(tmp_path / "base", part.parts, parameters) == Norms(np.sqrt(25 / 2) / 2.5, 0.0)


def test_a_norm_that_cannot_be_counted_is_infinite(tmp_path: Path) -> None:
    save(tmp_path / "base", {"a": np.array([1.0]), "var": f4(1)})
    for value in (float("nan"), float("inf"), 1e200):
        update = client(tmp_path, "x", 1, {"a": np.array([value])})
        assert update_norms(tmp_path / "base", update.parts, {"a"}) == Norms(np.inf, 0.0)


def test_a_model_of_zeros_has_the_scale_one(tmp_path: Path) -> None:
    save(tmp_path / "base", {"a": f4(0, 0), "mean": f4(0)})
    update = client(tmp_path, "x", 1, {"a": f4(3, 3), "mean": f4(2)})
    assert update_norms(tmp_path / "base", update.parts, {"a"}) == Norms(3.0, 2.0)


def test_a_bound_is_a_multiple_of_the_median_of_five_or_more_that_changed_anything() -> None:
    assert norm_bound([1, 2, 3, 4]) is None
    assert norm_bound([1, 2, 3, 4, 0, 0]) is None
    assert norm_bound([1, 2, 3, 4, 1e9]) == 45
    assert norm_bound([1, 2, 4, 5, 1e9, np.inf]) == 15 * 4.5
    assert norm_bound([1, 2, 3, 4, 1e9], "buffers") == 120


def test_two_poisoned_of_five_cannot_lift_the_bound_beyond_the_honest_ones() -> None:
    assert norm_bound([1.0, 1.1, 1.2, 1e9, 1e9]) == pytest.approx(15 * 1.2)


def walk(folder: Path, name: str, change: float, *, steps: int = 1, var: float | None = None) -> ClientUpdate:
    """An update of a base of ones that changes every parameter by `change`."""
    tensors = {"a": f4(1 + change, 1 + change)}
    if var is not None:
        tensors["var"] = f4(var)
    return client(folder, name, 1, tensors, steps=steps)


def test_a_change_is_scaled_down_to_the_operators_bound(tmp_path: Path) -> None:
    save(tmp_path / "base", {"a": f4(1, 1), "n": np.array(0)})
    updates = [
        client(tmp_path, "x", 1, {"a": f4(9, 1), "n": np.array(5)}),  # sqrt(64 / 2) = 5.657
        client(tmp_path, "y", 3, {"a": f4(1.25, 1.25), "n": np.array(9)}),
    ]
    told = aggregate(tmp_path / "base", updates, tmp_path / "out", NormClipping(0.5), parameters={"a"})
    # x becomes 1 + 8 · 0.5 / sqrt(32) = 1 + sqrt(0.5), 1; integers are averaged as they are
    result = load_numpy(tmp_path / "out")
    np.testing.assert_allclose(result["a"], [(1 + np.sqrt(0.5) + 3.75) / 4, (1 + 3.75) / 4], rtol=1e-7)
    assert int(result["n"]) == 8
    assert told.clipped == (Clipped(0, "parameters", pytest.approx(np.sqrt(32)), 0.5),)
    assert told.unjudged == ()


def test_without_a_bound_it_is_learned_per_step_from_the_others(tmp_path: Path) -> None:
    save(tmp_path / "base", {"a": f4(1, 1)})
    # Per step: 0.5 five times, then 0.25 of 50 steps, which is far but honest, and 500.
    updates = [walk(tmp_path, f"h{index}", 1.0, steps=2) for index in range(5)]
    updates += [walk(tmp_path, "long", 12.5, steps=50), walk(tmp_path, "poisoned", 1000, steps=2)]
    told = aggregate(tmp_path / "base", updates, tmp_path / "out", NormClipping(), parameters={"a"})
    assert told.clipped == (Clipped(6, "parameters", 1000, 15 * 0.5 * 2),)
    assert told.unjudged == ()
    assert load_numpy(tmp_path / "out")["a"].tolist() == pytest.approx([1 + (5 * 1 + 12.5 + 15) / 7] * 2)


def test_a_variance_does_not_hide_a_weight_nor_a_weight_a_variance(tmp_path: Path) -> None:
    save(tmp_path / "base", {"a": f4(1, 1), "var": f4(1)})
    updates = [walk(tmp_path, f"h{index}", 0.5, var=2.0) for index in range(6)]
    updates += [walk(tmp_path, "weight", 500, var=2.0), walk(tmp_path, "z", 0.5, var=1001)]
    told = aggregate(tmp_path / "base", updates, tmp_path / "out", NormClipping(), parameters={"a"})
    assert told.clipped == (Clipped(6, "parameters", 500, 7.5), Clipped(7, "buffers", 1000, 40))
    result = load_numpy(tmp_path / "out")
    assert result["var"].tolist() == [1 + (7 * 1 + 40) / 8]
    assert result["a"].tolist() == [1 + (7 * 0.5 + 7.5) / 8] * 2


def test_too_few_to_learn_from_are_taken_as_they_are_and_named(tmp_path: Path) -> None:
    save(tmp_path / "base", {"a": f4(1, 1)})
    updates = [walk(tmp_path, f"c{index}", 1.0) for index in range(4)] + [walk(tmp_path, "poisoned", 1e6)]
    told = aggregate(tmp_path / "base", updates, tmp_path / "out", NormClipping(), parameters={"a"})
    assert (told.clipped, told.unjudged) == ((), (0, 1, 2, 3, 4))


@pytest.mark.parametrize("scale", [100, 1e6, -100])
def test_a_scaled_update_is_beyond_the_bound_and_honest_unequal_ones_are_not(tmp_path: Path, scale: float) -> None:
    """Least squares on unequal devices: 1 to 50 steps, 10 to 5,000 samples, all features or a few of them."""
    random = np.random.default_rng(3)
    truth = random.normal(size=32)
    base = {"a": random.normal(size=16).astype(np.float32), "b": random.normal(size=16).astype(np.float32)}
    save(tmp_path / "base", base)
    start = np.concatenate([base["a"], base["b"]]).astype(np.float64)
    updates, per_step = [], []
    for number, (steps, samples) in enumerate([(1, 10), (50, 5000), (3, 50), (10, 800), (25, 20), (50, 10), (1, 5000)]):
        inputs = random.normal(size=(samples, 32)) * np.where(random.random(32) < 0.5, 1, 0.2)  # other shares of data
        trained = slice(16, 32) if number % 2 else slice(0, 32)
        weights = start.copy()
        for _ in range(steps):
            gradient = inputs.T @ (inputs @ (weights - truth)) / samples
            weights[trained] -= 0.02 * gradient[trained]
        tensors = {"b": weights[16:].astype(np.float32)}
        if number % 2 == 0:
            tensors["a"] = weights[:16].astype(np.float32)
        updates.append(client(tmp_path, f"c{number}", samples, tensors, steps=steps))
        norms = update_norms(tmp_path / "base", updates[-1].parts, {"a", "b"})
        per_step.append(norms.per_step(steps).parameters)
    for place, norm in enumerate(per_step):
        bound = norm_bound(per_step[:place] + per_step[place + 1 :])
        assert bound is not None
        assert norm < bound
    poisoned = {name: base[name] + scale * (load_numpy(updates[3].parts[0])[name] - base[name]) for name in ("b",)}
    update = client(tmp_path, "poisoned", 800, poisoned, steps=10)
    bound = norm_bound(per_step)
    assert bound is not None
    assert update_norms(tmp_path / "base", update.parts, {"a", "b"}).per_step(10).parameters > bound
