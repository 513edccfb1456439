"""What every rule checks: digests, values that are not finite, order; and what all rules have in common."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedepth.aggregation.aggregate import aggregate
from fedepth.aggregation.rules import Krum, Median, NormClipping, PrivateMean, Rule, TrimmedMean, WeightedMean
from fedepth.errors import ConfigError, DamagedUpdateError, DiskError, NotFiniteError, StateError
from fedepth.files import file_digest
from fedepth.weights import load_numpy, save
from tests.aggregation.update_files import client, f4

RULES = [
    WeightedMean(),
    TrimmedMean(0.2),
    Median(),
    NormClipping(0.1),
    NormClipping(),
    Krum(1),
    PrivateMean(1.0, 0.5, 5, seed=3),
]


def flip(path: Path) -> None:
    """Flips a bit in the last byte, which lies in a tensor."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_byte_that_flips_after_acceptance_is_found_and_nothing_is_written(tmp_path: Path, rule: Rule) -> None:
    save(tmp_path / "base", {"a": f4(1), "b": f4(1)})
    updates = [client(tmp_path, f"c{index}", 1, {"a": f4(2)}, {"b": f4(index)}) for index in range(6)]
    (tmp_path / "out").write_bytes(b"old")
    flip(updates[1].parts[1])
    updates[4].parts[0].unlink()
    with pytest.raises(DamagedUpdateError) as caught:
        aggregate(tmp_path / "base", updates, tmp_path / "out", rule, parameters={"a", "b"})
    assert caught.value.paths == (updates[1].parts[1], updates[4].parts[0])
    assert f"{updates[1].parts[1]} has sha256 " in str(caught.value)
    assert f"{updates[4].parts[0]} cannot be read (No such file" in str(caught.value)
    assert (tmp_path / "out").read_bytes() == b"old"


def test_a_damaged_header_is_found_by_the_digest(tmp_path: Path) -> None:
    save(tmp_path / "base", {"a": f4(1)})
    update = client(tmp_path, "x", 1, {"a": f4(2)})
    update.parts[0].write_bytes(b"{" * 100)
    with pytest.raises(DamagedUpdateError):
        aggregate(tmp_path / "base", [update], tmp_path / "out", WeightedMean())


def test_damaged_weights_of_the_round_before_are_found(tmp_path: Path) -> None:
    digest = save(tmp_path / "base", {"a": f4(1)})
    update = client(tmp_path, "x", 1, {"a": f4(2)})
    aggregate(tmp_path / "base", [update], tmp_path / "out", WeightedMean(), base_digest=digest)
    flip(tmp_path / "base")
    with pytest.raises(StateError, match=r"base has sha256 .*recorded was .*; restore it from a backup") as caught:
        aggregate(tmp_path / "base", [update], tmp_path / "out", WeightedMean(), base_digest=digest)
    assert not isinstance(caught.value, DamagedUpdateError)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_what_would_not_be_finite_is_not_written(tmp_path: Path, rule: Rule) -> None:
    save(tmp_path / "base", {"a": f4(1, 1), "b": f4(1)})
    bad = {"a": f4(1, float("nan")), "b": f4(1)}
    updates = [client(tmp_path, f"c{index}", 1, bad) for index in range(6)]
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(NotFiniteError, match=r"[12] elements of a would not be finite numbers") as caught:
        aggregate(tmp_path / "base", updates, tmp_path / "out", rule, parameters={"a", "b"})
    assert caught.value.tensor == "a"
    assert (tmp_path / "out").read_bytes() == b"old"


def test_what_overflows_the_tensors_type_is_not_written(tmp_path: Path) -> None:
    save(tmp_path / "base", {"a": np.array([6e4], np.float16)})
    update = client(tmp_path, "x", 1, {"a": np.array([0], np.float16)})
    noise = PrivateMean(6e4, 5.0, 1, seed=2)
    results = []
    for seed in range(6):
        try:
            rule = replace(noise, seed=seed)
            aggregate(tmp_path / "base", [update], tmp_path / "out", rule, parameters={"a"})
        except NotFiniteError as error:
            results.append(error.tensor)
    assert "a" in results


def test_constants_that_are_infinite_stay(tmp_path: Path) -> None:
    save(tmp_path / "base", {"a": f4(1), "mask": f4(0, float("-inf"))})
    aggregate(tmp_path / "base", [client(tmp_path, "x", 1, {"a": f4(2)})], tmp_path / "out", WeightedMean())
    assert load_numpy(tmp_path / "out")["mask"].tolist() == [0, float("-inf")]


@pytest.mark.parametrize("rule", [NormClipping(), Krum(1), PrivateMean(1, 1, 1)])
def test_rules_that_tell_parameters_from_buffers_must_know_them(tmp_path: Path, rule: Rule) -> None:
    save(tmp_path / "base", {"a": f4(1)})
    with pytest.raises(ConfigError, match="give parameters"):
        aggregate(tmp_path / "base", [], tmp_path / "out", rule)


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        *((TrimmedMean, value) for value in (0.0, 0.5, -0.1, float("nan"))),
        *((NormClipping, value) for value in (0.0, -1.0, float("inf"), float("nan"))),
        *((Krum, value) for value in (0, -1)),
    ],
)
def test_rules_are_not_made_of_what_no_job_may_say(rule: Any, value: Any) -> None:
    with pytest.raises(ConfigError, match="it must be"):
        rule(value)


def test_where_nothing_can_be_written_the_error_is_one_of_the_disk(tmp_path: Path) -> None:
    save(tmp_path / "base", {"a": f4(1)})
    with pytest.raises(DiskError, match=r"the average cannot be written: .*absent/out: No such file or directory"):
        aggregate(tmp_path / "base", [], tmp_path / "absent" / "out", WeightedMean())


def test_an_update_without_steps_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "base", {"a": f4(1)})
    with pytest.raises(StateError, match="0 steps"):
        aggregate(tmp_path / "base", [client(tmp_path, "x", 1, {}, steps=0)], tmp_path / "out", WeightedMean())


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 7),
    rule=st.sampled_from(RULES),
    order=st.randoms(use_true_random=False),
)
def test_the_order_of_the_updates_does_not_matter_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, rule: Rule, order: object
) -> None:
    folder = tmp_path_factory.getbasetemp()
    random = np.random.default_rng(seed)
    save(folder / "base", {"a": random.normal(size=40), "b": f4(1, 2), "var": f4(1), "n": np.array(0)})
    updates = []
    for index in range(count):
        tensors = {"a": random.normal(size=40), "n": np.array(int(random.integers(100)))}
        if random.random() < 0.5:
            tensors |= {"b": random.normal(size=2).astype(np.float32), "var": f4(random.random())}
        updates.append(client(folder, f"c{index}", random.random() + 0.1, tensors, steps=1 + index))
    shuffled = list(updates)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    first = aggregate(folder / "base", updates, folder / "out", rule, parameters={"a", "b"})
    second = aggregate(folder / "base", shuffled, folder / "again", rule, parameters={"a", "b"})
    assert first.digest == second.digest == file_digest(folder / "out")
    named = [{updates[index].name for index in first.left_out}, {shuffled[index].name for index in second.left_out}]
    assert named[0] == named[1]


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    values=st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=3, max_size=3),
    count=st.integers(1, 7),
    rule=st.sampled_from([WeightedMean(), TrimmedMean(0.2), Median(), Krum(1), NormClipping(1e300)]),
)
def test_of_equal_updates_the_update_comes_out(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], count: int, rule: Rule
) -> None:
    folder = tmp_path_factory.getbasetemp()
    save(folder / "base", {"a": f4(0, 0), "b": f4(0)})
    updates = [client(folder, f"c{i}", 3 + i, {"a": f4(*values[:2]), "b": f4(values[2])}) for i in range(count)]
    aggregate(folder / "base", updates, folder / "out", rule, parameters={"a"})
    result = load_numpy(folder / "out")
    assert [*result["a"].tolist(), *result["b"].tolist()] == values


def test_every_order_of_five_gives_the_same_file_under_every_rule(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    save(tmp_path / "base", {"a": np.ones(9)})
    updates = [client(tmp_path, f"c{i}", random.random() + 0.1, {"a": random.normal(size=9)}) for i in range(5)]
    orders = list(itertools.permutations(updates))[::17]
    for rule in RULES:
        digests = {aggregate(tmp_path / "base", o, tmp_path / "out", rule, parameters={"a"}).digest for o in orders}
        assert len(digests) == 1
