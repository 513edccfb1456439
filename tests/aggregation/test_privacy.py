"""Central differential privacy: the noisy mean by numbers worked out by hand, and what it has spent."""

from __future__ import annotations

import builtins
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedepth.aggregation.aggregate import aggregate
from fedepth.aggregation.privacy import spent_epsilon
from fedepth.aggregation.rules import PrivateMean
from fedepth.errors import ConfigError
from fedepth.weights import load_numpy, save
from tests.aggregation.update_files import client, f4


def test_changes_are_clipped_over_all_that_an_update_holds_and_divided_by_a_fixed_number(tmp_path: Path) -> None:
    save(tmp_path / "base", {"a": f4(10), "b": f4(20, 30)})
    updates = [
        client(tmp_path, "x", 1, {"a": f4(13)}, {"b": f4(20, 34)}),  # change 3, 0, 4: norm 5, halved
        client(tmp_path, "y", 999, {"b": f4(21, 30)}),  # norm 1: as it is, and no weight of its own
    ]
    rule = PrivateMean(clip_norm=2.5, noise_multiplier=0, updates=4)
    aggregate(tmp_path / "base", updates, tmp_path / "out", rule, parameters={"a", "b"})
    result = {name: tensor.tolist() for name, tensor in load_numpy(tmp_path / "out").items()}
    assert result == {"a": [10.375], "b": [20.25, 30.5]}  # 1.5 / 4; 1 / 4, 2 / 4


def test_one_update_more_moves_the_result_by_at_most_the_bound_whatever_it_holds(tmp_path: Path) -> None:
    save(tmp_path / "base", {"a": np.zeros(50), "b": np.zeros(50)})
    random = np.random.default_rng(1)
    rule = PrivateMean(clip_norm=0.7, noise_multiplier=0, updates=3)
    for names in (("a",), ("b",), ("a", "b")):
        first = [client(tmp_path, f"c{i}", 1, {"a": random.normal(size=50)}) for i in range(2)]
        more = client(tmp_path, "more", 1, {name: 1e6 * random.normal(size=50) for name in names})
        results = []
        for updates in (first, [*first, more]):
            aggregate(tmp_path / "base", updates, tmp_path / "out", rule, parameters={"a", "b"})
            results.append(np.concatenate([load_numpy(tmp_path / "out")[name] for name in ("a", "b")]))
        assert np.linalg.norm(results[1] - results[0]) == pytest.approx(0.7 / 3)


def test_noise_is_on_every_parameter_held_or_not_and_on_nothing_else(tmp_path: Path) -> None:
    count = 200_000
    tensors = {"held": np.zeros(count), "not_held": np.zeros(count)}
    save(tmp_path / "base", {**tensors, "frozen": f4(7), "var": f4(1), "n": np.array(3)})
    update = client(tmp_path, "x", 1, {"held": np.zeros(count), "var": f4(50), "n": np.array(9)})
    rule = PrivateMean(clip_norm=2.0, noise_multiplier=1.5, updates=4, seed=11)
    told = aggregate(tmp_path / "base", [update], tmp_path / "out", rule, parameters={"held", "not_held"})
    result = load_numpy(tmp_path / "out")
    assert (result["frozen"].tolist(), result["var"].tolist(), int(result["n"])) == ([7.0], [1.0], 3)
    for name in tensors:
        # Deviation 1.5 · 2 / 4 = 0.75. Four standard errors: 0.0067 of the mean, 0.0047 of the deviation.
        assert abs(result[name].mean()) < 0.0067
        assert abs(result[name].std() - 0.75) < 0.0047
    assert abs(np.corrcoef(result["held"], result["not_held"])[0, 1]) < 0.009
    assert told.notes == ("2 buffers, such as n, stay as they are under differential privacy",)


def test_a_seed_gives_the_same_noise_and_no_seed_another_each_time(tmp_path: Path) -> None:
    save(tmp_path / "base", {"a": np.zeros(8)})
    digests = [
        aggregate(tmp_path / "base", [], tmp_path / "out", PrivateMean(1, 1, 1, seed), parameters={"a"}).digest
        for seed in (1, 1, 2, None, None)
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def analytic_delta(epsilon: float, sigma: float) -> float:
    """δ of the Gaussian mechanism with sensitivity 1 (Balle and Wang, arXiv 1805.06530, theorem 8)."""

    def normal(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    return normal(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * normal(-0.5 / sigma - epsilon * sigma)


@pytest.mark.parametrize(("multiplier", "rounds", "delta"), [(1.0, 1, 1e-5), (5.0, 100, 1e-5), (20.0, 500, 1e-6)])
def test_spent_epsilon_is_that_of_the_analytic_gaussian_mechanism(multiplier: float, rounds: int, delta: float) -> None:
    epsilon = spent_epsilon([multiplier] * rounds, delta)
    # Rounds of one device's updates are one release of a vector that is √rounds times as far away.
    assert analytic_delta(epsilon, multiplier / math.sqrt(rounds)) == pytest.approx(delta, rel=1e-6)


def test_spent_epsilon_is_what_the_librarys_accountants_compose() -> None:
    event = SelfComposedDpEvent(GaussianDpEvent(5.0), 30)
    exact, upper = PLDAccountant(), RdpAccountant()
    exact.compose(event)
    upper.compose(event)
    epsilon = spent_epsilon([5.0] * 30, 1e-5)
    assert epsilon == pytest.approx(exact.get_epsilon(1e-5), rel=1e-4)
    assert epsilon < upper.get_epsilon(1e-5) < 1.15 * epsilon


def test_spent_epsilon_is_below_the_classical_bound_of_a_single_release() -> None:
    # Dwork and Roth, theorem 3.22: for ε < 1, σ = sqrt(2 ln(1.25 / δ)) / ε is enough.
    sigma = math.sqrt(2 * math.log(1.25 / 1e-5)) / 0.9
    assert 0.5 < spent_epsilon([sigma], 1e-5) < 0.9


def test_nothing_is_spent_before_the_first_round_and_everything_without_noise() -> None:
    assert spent_epsilon([], 1e-5) == 0
    assert spent_epsilon([2.0, 0.0], 1e-5) == math.inf
    spent = [spent_epsilon([1.0] * rounds, 1e-5) for rounds in range(5)]
    assert spent == sorted(spent)


def test_rounds_with_different_noise_compose_as_the_librarys_accountant_says() -> None:
    exact = PLDAccountant()
    for multiplier, rounds in ((2.0, 5), (30.0, 7), (4.0, 1)):
        exact.compose(SelfComposedDpEvent(GaussianDpEvent(multiplier), rounds))
    epsilon = spent_epsilon([*[2.0] * 5, *[30.0] * 7, 4.0], 1e-5)
    assert epsilon == pytest.approx(exact.get_epsilon(1e-5), rel=1e-3)
    assert epsilon > spent_epsilon([2.0] * 5, 1e-5)  # more noise later takes nothing back


@pytest.mark.parametrize(("multipliers", "delta"), [([1.0], 0.0), ([1.0], 1.0), ([1.0, -1.0], 0.1)])
def test_numbers_without_a_meaning_are_refused(multipliers: list[float], delta: float) -> None:
    with pytest.raises(ValueError, match="noise multiplier"):
        spent_epsilon(multipliers, delta)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "dp_accounting":
            raise ImportError(name)
        return known(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'fedepth\[privacy\]'"):
        spent_epsilon([1.0], 1e-5)
