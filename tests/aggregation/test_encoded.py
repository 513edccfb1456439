"""Encoded updates under every rule: out comes what comes of the weights that they stand for, to the last bit, where
these are exact in float32."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedepth.aggregation.aggregate import aggregate
from fedepth.aggregation.norms import update_norms
from fedepth.aggregation.rules import Krum, Median, NormClipping, PrivateMean, Rule, TrimmedMean, WeightedMean
from fedepth.aggregation.updates import ClientUpdate
from fedepth.errors import NotFiniteError, StateError
from fedepth.layout import SCALES
from fedepth.weights import Array, load_numpy, save
from tests.aggregation.update_files import client

SHAPE = (4, 128)
CLIENTS = 7


def sent(random: np.random.Generator) -> dict[str, Array]:
    """A change in steps of powers of two, as int8."""
    return {
        "w": random.integers(-127, 128, SHAPE).astype(np.int8),
        "w" + SCALES: (2.0 ** random.integers(-9, -5, 4)).astype(np.float32),
        "v": (random.integers(-512, 513, (16, 32)) / 1024).astype(np.float16),
        "b": (random.integers(-64, 65, 8) / 64).astype(np.float32),
        "n": np.array(random.integers(0, 9)),
    }


def as_weights(old: dict[str, Array], update: dict[str, Array]) -> dict[str, Array]:
    change = update["w"] * update["w" + SCALES][:, None]
    found = {"w": old["w"] + change, "v": old["v"] + update["v"].astype(np.float32), "b": update["b"], "n": update["n"]}
    assert {each.dtype.name for each in found.values()} == {"float32", "int64"}
    return found


def updates(folder: Path, old: dict[str, Array]) -> tuple[list[ClientUpdate], list[ClientUpdate]]:
    """The same ones, encoded and as weights; the last client trained only "w"."""
    random = np.random.default_rng(5)
    encoded, plain = [], []
    for number in range(CLIENTS):
        update = sent(random)
        weights = as_weights(old, update)
        kept = ("w", "w" + SCALES) if number == CLIENTS - 1 else tuple(update)
        encoded.append(client(folder, f"encoded-{number}", 1 + number, {name: update[name] for name in kept}, steps=3))
        kept = ("w",) if number == CLIENTS - 1 else tuple(weights)
        plain.append(client(folder, f"plain-{number}", 1 + number, {name: weights[name] for name in kept}, steps=3))
    return encoded, plain


@pytest.fixture
def old(tmp_path: Path) -> dict[str, Array]:
    random = np.random.default_rng(3)
    found: dict[str, Array] = {
        "w": (random.integers(-256, 257, SHAPE) / 256).astype(np.float32),
        "v": (random.integers(-256, 257, (16, 32)) / 256).astype(np.float32),
        "b": np.ones(8, np.float32),
        "n": np.array(2),
    }
    save(tmp_path / "base", found)
    return found


RULES: list[Rule] = [
    WeightedMean(),
    TrimmedMean(0.2),
    Median(),
    NormClipping(0.05),
    NormClipping(None),
    Krum(1),
    PrivateMean(1.0, 0.5, CLIENTS, seed=3),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_rule_makes_of_them_what_it_makes_of_the_weights(tmp_path: Path, old: dict[str, Array], rule: Rule) -> None:
    encoded, plain = updates(tmp_path, old)
    base, parameters = tmp_path / "base", {"w", "v", "b"}
    found = aggregate(base, encoded, tmp_path / "out", rule, parameters=parameters)
    expected = aggregate(base, plain, tmp_path / "expected", rule, parameters=parameters)
    assert found == expected
    assert found.digest == expected.digest
    result = load_numpy(tmp_path / "out")
    assert {name: (each.dtype, each.shape) for name, each in result.items()} == {
        name: (each.dtype, each.shape) for name, each in old.items()
    }
    assert not np.array_equal(result["w"], old["w"])


def test_their_norms_are_those_of_the_change(tmp_path: Path, old: dict[str, Array]) -> None:
    encoded, plain = updates(tmp_path, old)
    for one, other in zip(encoded, plain, strict=True):
        found = update_norms(tmp_path / "base", one.parts, {"w", "v", "b"})
        assert found == update_norms(tmp_path / "base", other.parts, {"w", "v", "b"})
        assert found.parameters > 0


def test_the_mean_by_hand(tmp_path: Path) -> None:
    """Of an update that went up as int8 and one in float32, as where a job's encoding has changed in the middle of a
    round."""
    save(tmp_path / "base", {"w": np.full(SHAPE, 10, np.float32)})
    steps = np.zeros(SHAPE, np.int8)
    steps[1, :2] = (100, -4)
    one = client(tmp_path, "a", 1, {"w": steps, "w" + SCALES: np.array([1, 0.5, 1, 1], np.float32)})
    other = client(tmp_path, "b", 3, {"w": np.full(SHAPE, 30, np.float32)})
    aggregate(tmp_path / "base", [one, other], tmp_path / "out", WeightedMean())
    found = load_numpy(tmp_path / "out")["w"]
    assert found[0, 0] == (10 + 3 * 30) / 4
    assert found[1, :3].tolist() == [(60 + 90) / 4, (8 + 90) / 4, (10 + 90) / 4]


def test_scales_of_a_part_do_not_scale_another(tmp_path: Path, old: dict[str, Array]) -> None:
    update = sent(np.random.default_rng(1))
    apart = client(tmp_path, "a", 1, {"w": update["w"]}, {"w" + SCALES: update["w" + SCALES]})
    with pytest.raises(StateError, match="holds w as"):
        aggregate(tmp_path / "base", [apart], tmp_path / "out", WeightedMean())


def test_a_change_that_is_not_finite_makes_no_weights(tmp_path: Path, old: dict[str, Array]) -> None:
    """Admission refuses it; if ever one is on the disk, nothing is published."""
    update: dict[str, Any] = {"w": np.ones(SHAPE, np.int8), "w" + SCALES: np.full(4, np.inf, np.float32)}
    with pytest.raises(NotFiniteError, match="elements of w"):
        aggregate(tmp_path / "base", [client(tmp_path, "a", 1, update)], tmp_path / "out", WeightedMean())
    assert not (tmp_path / "out").exists()


def test_memory_is_that_of_slices(tmp_path: Path) -> None:
    shape = (64, 1 << 17)  # 32 MiB as float32
    save(tmp_path / "base", {"w": np.zeros(shape, np.float32)})
    made = [
        client(tmp_path, f"u{number}", 1, {"w": np.ones(shape, np.int8), "w" + SCALES: np.ones(64, np.float32)})
        for number in range(4)
    ]
    tracemalloc.start()
    aggregate(tmp_path / "base", made, tmp_path / "out", WeightedMean())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20
