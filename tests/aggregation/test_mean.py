"""The weighted mean of partial updates, by numbers worked out by hand; what every rule refuses."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedepth.aggregation.aggregate import aggregate
from fedepth.aggregation.rules import WeightedMean
from fedepth.aggregation.updates import ClientUpdate
from fedepth.errors import StateError
from fedepth.files import file_digest
from fedepth.weights import SLICE_BYTES, load_numpy, save, write_tensors
from tests.aggregation.update_files import client, f4


def average(base: Path, updates: Sequence[ClientUpdate], output: Path) -> str:
    return aggregate(base, updates, output, WeightedMean()).digest


def test_a_parameter_is_averaged_over_the_clients_that_trained_it(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save(base, {"a": f4(100, 100), "b": f4(7), "head": f4(0), "nobody": f4(-3.5)})
    updates = [
        client(tmp_path, "x", 1, {"a": f4(1, 2)}, {"head": f4(4)}),
        client(tmp_path, "y", 3, {"a": f4(5, 10), "b": f4(9)}, {"head": f4(8)}),
    ]
    digest = average(base, updates, tmp_path / "out")
    result = load_numpy(tmp_path / "out")
    assert {name: tensor.tolist() for name, tensor in result.items()} == {
        "a": [4.0, 8.0],  # (1·1 + 3·5) / 4, (1·2 + 3·10) / 4
        "b": [9.0],  # trained by y alone: y's weight does not thin it
        "head": [7.0],  # (1·4 + 3·8) / 4
        "nobody": [-3.5],
    }
    assert digest == file_digest(tmp_path / "out")


def test_an_integer_tensor_gets_the_rounded_mean_and_keeps_its_type(tmp_path: Path) -> None:
    save(tmp_path / "base", {"steps": np.array(0), "flags": np.array([0, 0], "u1")})
    updates = [
        client(tmp_path, "x", 1, {"steps": np.array(10), "flags": np.array([255, 0], "u1")}),
        client(tmp_path, "y", 2, {"steps": np.array(15), "flags": np.array([254, 1], "u1")}),
    ]
    average(tmp_path / "base", updates, tmp_path / "out")
    result = load_numpy(tmp_path / "out")
    assert (result["steps"].dtype, result["steps"].shape, int(result["steps"])) == (
        np.int64,
        (),
        13,
    )  # 40 / 3
    assert result["flags"].tolist() == [254, 1]  # 763 / 3, 2 / 3


def test_negative_integers_are_rounded_to_the_nearest(tmp_path: Path) -> None:
    save(tmp_path / "base", {"n": np.array([0])})
    updates = [client(tmp_path, name, 1, {"n": np.array([value])}) for name, value in (("x", -1), ("y", -2), ("z", -2))]
    average(tmp_path / "base", updates, tmp_path / "out")
    assert load_numpy(tmp_path / "out")["n"].tolist() == [-2]  # −5 / 3


def test_equal_values_stay_exactly_what_they_are(tmp_path: Path) -> None:
    value = f4(0.1, 1 / 3, 1e-38, 3.4e38)
    save(tmp_path / "base", {"a": f4(0, 0, 0, 0)})
    updates = [client(tmp_path, str(index), 7 + index, {"a": value}) for index in range(3)]
    average(tmp_path / "base", updates, tmp_path / "out")
    assert load_numpy(tmp_path / "out")["a"].tobytes() == value.tobytes()


def test_sums_run_in_double_precision(tmp_path: Path) -> None:
    save(tmp_path / "base", {"a": f4(0)})
    values = (2.0**25, 1.0, 1.0, 2.0)  # in float32 the three small ones would be lost
    updates = [client(tmp_path, str(index), 1, {"a": f4(value)}) for index, value in enumerate(values)]
    average(tmp_path / "base", updates, tmp_path / "out")
    assert load_numpy(tmp_path / "out")["a"].tolist() == [2.0**23 + 1]


models = st.lists(
    st.tuples(
        st.integers(1, 10_000),
        st.lists(st.floats(-1e6, 1e6, width=32), min_size=5, max_size=5),
    ),
    min_size=1,
    max_size=5,
)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(clients=models)
def test_where_all_trained_everything_it_is_federated_averaging(
    tmp_path_factory: pytest.TempPathFactory, clients: list[tuple[int, list[float]]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    save(folder / "base", {"a": f4(0, 0, 0), "b": f4(0, 0)})
    updates = [
        client(folder, f"c{index}", weight, {"a": f4(*values[:3]), "b": f4(*values[3:])})
        for index, (weight, values) in enumerate(clients)
    ]
    average(folder / "base", updates, folder / "out")
    result = load_numpy(folder / "out")
    weights = np.array([weight for weight, _ in clients], np.float64)
    plain = (weights[:, None] * np.array([values for _, values in clients])).sum(0) / weights.sum()
    # Where terms cancel, float64 sums in another order differ by up to 1e-9 for values of 1e6.
    got = np.concatenate([result["a"], result["b"]])
    np.testing.assert_allclose(got, plain.astype(np.float32), rtol=2**-23, atol=1e-9)


def test_the_order_of_the_updates_does_not_matter_to_the_last_bit(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    save(tmp_path / "base", {"a": np.zeros(500, np.float64)})
    updates = [client(tmp_path, f"c{i}", random.random() + 0.1, {"a": random.normal(size=500)}) for i in range(4)]
    digests = {average(tmp_path / "base", order, tmp_path / "out") for order in itertools.permutations(updates)}
    assert len(digests) == 1
    shuffled = sum(update.weight * load_numpy(update.parts[0])["a"] for update in reversed(updates))
    total = sum(update.weight for update in updates)
    # The case can tell: another order of summing gives other bits.
    assert (shuffled / total).tobytes() != load_numpy(tmp_path / "out")["a"].tobytes()


def test_without_updates_the_weights_stay(tmp_path: Path) -> None:
    digest = save(tmp_path / "base", {"a": f4(1, 2), "n": np.array(3)})
    assert average(tmp_path / "base", [], tmp_path / "out") == digest


def test_the_output_may_take_the_place_of_the_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save(base, {"a": f4(1), "b": f4(2)})
    average(base, [client(tmp_path, "x", 1, {"a": f4(5)})], base)
    assert {name: tensor.tolist() for name, tensor in load_numpy(base).items()} == {"a": [5.0], "b": [2.0]}


def test_a_tensor_longer_than_one_slice_is_averaged_whole(tmp_path: Path) -> None:
    count = SLICE_BYTES // 8 * 2 + 3
    save(tmp_path / "base", {"a": np.zeros(count, np.float32)})
    ramp = np.arange(count, dtype=np.float32)
    updates = [client(tmp_path, "x", 1, {"a": ramp}), client(tmp_path, "y", 1, {"a": ramp + 2})]
    average(tmp_path / "base", updates, tmp_path / "out")
    assert (load_numpy(tmp_path / "out")["a"] == ramp + 1).all()


def test_memory_does_not_grow_with_the_model_or_the_clients(tmp_path: Path) -> None:
    count = 8 << 20  # 32 MiB each
    infos = dict.fromkeys(("a", "b"), ("F32", (count,)))
    for name in ("base", "c0", "c1", "c2"):
        write_tensors(tmp_path / name, infos, lambda tensor: (np.ones(1 << 18, np.float32) for _ in range(32)))
    updates = [ClientUpdate((tmp_path / f"c{index}",), 1) for index in range(3)]
    tracemalloc.start()
    try:
        average(tmp_path / "base", updates, tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * SLICE_BYTES


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_positive_number_is_refused(tmp_path: Path, weight: float) -> None:
    save(tmp_path / "base", {"a": f4(1)})
    with pytest.raises(StateError, match="must be above 0"):
        average(tmp_path / "base", [client(tmp_path, "x", weight, {"a": f4(1)})], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "base", {"a": f4(1)})
    update = client(tmp_path, "x", 1, {"a": f4(1)})
    with pytest.raises(StateError, match="would count twice"):
        average(tmp_path / "base", [update, update], tmp_path / "out")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        pytest.param([{"z": f4(1)}], "'z' that .*base does not have", id="unknown tensor"),
        pytest.param([{"a": f4(1)}, {"a": f4(1)}], "both hold the tensor a", id="tensor twice"),
        pytest.param([{"a": f4(1, 2)}], r"\('F32', \(2,\)\)", id="shape"),
        pytest.param([{"a": np.array([1.0])}], "F64", id="type"),
    ],
)
def test_an_update_that_does_not_fit_leaves_the_output_as_it_was(
    tmp_path: Path, parts: list[dict[str, Any]], message: str
) -> None:
    save(tmp_path / "base", {"a": f4(1)})
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(StateError, match=message):
        average(tmp_path / "base", [client(tmp_path, "x", 1, *parts)], tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"old"
