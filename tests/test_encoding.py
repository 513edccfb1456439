"""Encoded updates: what a part holds, to the number; what rounding loses; and that feedback loses nothing for ever."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedepth.encoding import (
    LARGEST_FLOAT16,
    SLICE_ELEMENTS,
    STEPS,
    DecodedPart,
    EncodedPart,
    quantised,
    runs,
    scales_of,
)
from fedepth.errors import StateError
from fedepth.layout import LARGEST_SCALE, SCALES, Encoding, ModelLayout, TensorInfo, UnitLayout, is_encoded
from fedepth.weights import Array, load_numpy, open_weights, save

SHAPE = (4, 64)
WEIGHT = TensorInfo("w", SHAPE, "F32")
BIAS = TensorInfo("b", (64,), "F32")
COUNTER = TensorInfo("n", (), "I64", parameter=False)
TINY = float(np.finfo(np.float32).tiny)


class Round:
    """One device's way through encoding, on files."""

    def __init__(self, folder: Path, old: dict[str, Array], encoding: Encoding, infos: list[TensorInfo]) -> None:
        self.folder, self.encoding, self.infos = folder, encoding, infos
        save(folder / "old", old)
        self.old = open_weights(folder / "old")
        self.part = folder / "part"

    def write(self, new: dict[str, Array], left_out: Path | None = None, *, checked: bool = True) -> DecodedPart:
        held = open_weights(left_out) if left_out else None
        residuals = dict.fromkeys(held.names, held) if held else {}
        trained = EncodedPart(self.old, self.infos, self.encoding, new.__getitem__, residuals, checked)
        trained.write(self.part)
        if self.encoding is Encoding.INT8:
            trained.write_left_out(self.folder / "left", self.part)
        return DecodedPart(self.old, self.part)

    @property
    def left(self) -> Array:
        return load_numpy(self.folder / "left")["w"]


def filled(*rows: list[float]) -> Array:
    """Rows of 64, what is not said being 0."""
    found = np.zeros(SHAPE, np.float32)
    for row, values in zip(found, rows, strict=False):
        row[: len(values)] = values
    return found


def test_float32_holds_the_new_weights_and_nothing_else(tmp_path: Path) -> None:
    new = {"w": filled([0.1, -3e38]), "b": np.full(64, 0.3, np.float32), "n": np.array(7)}
    found = Round(
        tmp_path, {name: np.zeros_like(each) for name, each in new.items()}, Encoding.FLOAT32, [WEIGHT, BIAS, COUNTER]
    )
    part = found.write(new)
    held = load_numpy(found.part)
    assert held.keys() == new.keys()
    for name, each in new.items():
        assert held[name].dtype == each.dtype and np.array_equal(held[name], each)
        assert np.array_equal(part.read(name), each)


def test_float16_holds_changes_of_what_is_worth_it_and_the_rest_as_it_is(tmp_path: Path) -> None:
    old = {"w": filled([1.0, 1.0, 1.0]), "b": np.ones(64, np.float32), "n": np.array(2)}
    new = {"w": filled([1.5, 1.0, 1.0 + 2**-12]), "b": np.full(64, 0.3, np.float32), "n": np.array(7)}
    found = Round(tmp_path, old, Encoding.FLOAT16, [WEIGHT, BIAS, COUNTER])
    part = found.write(new)
    held = load_numpy(found.part)
    assert {name: each.dtype for name, each in held.items()} == {"w": np.float16, "b": np.float32, "n": np.int64}
    assert held["w"][0, :4].tolist() == [0.5, 0.0, 2**-12, 0.0]
    assert held["b"][0] == np.float32(0.3) and held["n"] == 7
    assert np.array_equal(part.read("w"), new["w"])
    assert part.read_flat("w", 0, 3).dtype == np.float64
    assert part.change("b", 0, 1) == np.float64(np.float32(0.3)) - 1


def test_int8_by_hand(tmp_path: Path) -> None:
    """Steps of 1/128 in the first channel and of 2 in the second; nothing in the third; halves go to the even step."""
    old = {"w": np.full(SHAPE, 10, np.float32), "b": np.zeros(64, np.float32)}
    change = filled([127 / 128, -64 / 128, 0.5 / 128, 1.5 / 128, -0.25 / 128], [-254, 3, 2.5], [], [TINY])
    found = Round(tmp_path, old, Encoding.INT8, [WEIGHT, BIAS])
    found.write({"w": old["w"] + change, "b": old["b"]})
    held = load_numpy(found.part)
    assert held["w"].dtype == np.int8
    assert held["w"][0, :5].tolist() == [127, -64, 0, 2, 0]
    assert held["w"][1, :3].tolist() == [-127, 2, 1]
    assert not held["w"][2:].any()
    assert held["w" + SCALES].tolist() == [1 / 128, 2, 0, 0]
    assert held.keys() == {"w", "w" + SCALES, "b"}
    part = DecodedPart(found.old, found.part)
    assert part.names == ("b", "w")
    assert part.read("w")[0, :4].tolist() == [10 + 127 / 128, 9.5, 10, 10 + 2 / 128]
    assert part.read_flat("w", 64, 3).tolist() == [-244, 14, 12]
    assert found.left[0, :5].tolist() == [0, 0, 0.5 / 128, -0.5 / 128, -0.25 / 128]
    assert found.left[1, :3].tolist() == [0, -1, 0.5]


def test_what_was_left_out_goes_up_with_the_next_change(tmp_path: Path) -> None:
    old = {"w": np.zeros(SHAPE, np.float32)}
    found = Round(tmp_path, old, Encoding.INT8, [WEIGHT])
    found.write({"w": filled([127, 0.5])})
    assert found.left[0, :2].tolist() == [0, 0.5]
    (tmp_path / "left").rename(tmp_path / "before")
    found.write({"w": filled([126.5, 0.25])}, tmp_path / "before")  # steps of 126.5 / 127
    step = float(scales_of(np.array(126.5, np.float32)))
    assert load_numpy(found.part)["w"][0, :2].tolist() == [127, 1]
    assert found.left[0, 1] == pytest.approx(0.75 - step, abs=1e-6)


def test_scales_are_exact_multiples_in_float32() -> None:
    largest = np.array([1.27, 1.0, 3e-5, 1e30, 0.0, TINY], np.float32)
    scales = scales_of(largest)
    assert scales.dtype == np.float32
    assert not (scales.view(np.uint32) & 127).any()
    assert (scales[:4] * np.float64(127) >= largest[:4] * (1 - 2.0**-24)).all()
    assert (scales[:4] <= largest[:4] / np.float64(127) * (1 + 2.0**-16)).all()
    assert scales[4:].tolist() == [0, 0]
    for step in range(-128, 128):
        assert (np.float32(step) * scales == np.float64(step) * scales.astype(np.float64)).all()


@given(hnp.arrays(np.float32, SHAPE, elements=st.floats(-(2.0**100), 2.0**100, width=32)))
@settings(max_examples=60, deadline=None)
def test_at_most_half_a_step_is_lost_zero_stays_and_what_is_decoded_is_encoded_as_it_was(values: Array) -> None:
    largest = np.abs(values).max(axis=1)
    scales = scales_of(largest)
    each = np.repeat(scales, 64).reshape(SHAPE)
    steps = quantised(values, each)
    decoded = steps * each
    assert decoded.dtype == np.float32 and np.abs(steps).max(initial=0) <= STEPS
    lost = np.abs(values.astype(np.float64) - decoded)
    assert (lost <= np.where(each > 0, each * (0.5 + 2.0**-14), 127 * TINY)).all()
    assert not decoded[values == 0].any()
    again = scales_of(np.abs(decoded).max(axis=1))
    assert np.array_equal(again, scales)
    assert np.array_equal(quantised(decoded, each), steps)


@given(st.lists(st.integers(1, 70), min_size=1, max_size=3), st.data())
@settings(max_examples=100, deadline=None)
def test_runs_are_those_of_the_elements_whatever_the_slice(shape: list[int], data: Any) -> None:
    whole = (*shape, 64)
    count = int(np.prod(whole))
    first = data.draw(st.integers(0, count - 1))
    length = data.draw(st.integers(1, count - first))
    begin, counts = runs(whole, first, length)
    found = np.repeat(np.arange(begin, begin + len(counts)), counts)
    assert np.array_equal(found, np.arange(first, first + length) // (count // shape[0]))
    assert counts.min() >= 1


@given(st.integers(0, 2**32 - 1), st.integers(2, 12))
@settings(max_examples=20, deadline=None)
def test_over_many_rounds_the_sum_is_out_by_one_residual_at_most(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rounds: int
) -> None:
    random = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("rounds")
    old = {"w": random.normal(size=SHAPE).astype(np.float32)}
    found = Round(folder, old, Encoding.INT8, [WEIGHT])
    meant, sent = np.zeros(SHAPE), np.zeros(SHAPE)
    before: Path | None = None
    for _ in range(rounds):
        size = 10.0 ** random.integers(-6, 3)
        new = {"w": (old["w"] + random.normal(0, size, SHAPE)).astype(np.float32)}
        meant += new["w"] - old["w"]
        part = found.write(new, before)
        sent += part.change("w", 0, 256).reshape(SHAPE)
        before = (folder / "left").rename(folder / "before")
    left = load_numpy(before or folder)["w"]
    scales = load_numpy(found.part)["w" + SCALES]
    assert np.allclose(meant - sent, left, rtol=1e-5, atol=1e-5 * np.abs(meant).max() + 1e-9)
    assert (np.abs(left) <= scales[:, None] * 0.5001).all()


def test_small_channels_have_one_scale_together(tmp_path: Path) -> None:
    info = TensorInfo("w", (64, 3, 3), "F32")
    found = Round(tmp_path, {"w": np.zeros(info.shape, np.float32)}, Encoding.INT8, [info])
    new = np.zeros(info.shape, np.float32)
    new[0, 0, 0], new[63, 2, 2] = 254, 2
    found.write({"w": new})
    held = load_numpy(found.part)
    assert held["w" + SCALES].shape == () and held["w" + SCALES] == 2
    assert (held["w"][0, 0, 0], held["w"][63, 2, 2]) == (127, 1)


def test_tensors_of_many_slices_and_channels_across_their_ends(tmp_path: Path) -> None:
    shape = (3, SLICE_ELEMENTS // 2 + 7)
    random = np.random.default_rng(1)
    old = {"w": random.normal(size=shape).astype(np.float32)}
    new = {"w": old["w"] + (random.normal(size=shape) * [[1e-3], [1], [100]]).astype(np.float32)}
    found = Round(tmp_path, old, Encoding.INT8, [TensorInfo("w", shape, "F32")])
    part = found.write(new)
    change = new["w"] - old["w"]
    scales = load_numpy(found.part)["w" + SCALES]
    assert np.array_equal(scales, scales_of(np.abs(change).max(axis=1)))
    steps = quantised(change, np.broadcast_to(scales[:, None], shape))
    assert np.array_equal(load_numpy(found.part)["w"], steps)
    assert np.array_equal(part.change("w", 0, change.size), (steps * scales[:, None]).reshape(-1))
    assert np.array_equal(part.read("w"), old["w"] + steps * scales[:, None])
    assert np.array_equal(found.left, change - steps * scales[:, None])


def test_writing_takes_a_few_slices(tmp_path: Path) -> None:
    shape = (64, 1 << 16)  # 16 MiB
    old, new = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    found = Round(tmp_path, {"w": old}, Encoding.INT8, [TensorInfo("w", shape, "F32")])
    tracemalloc.start()
    found.write({"w": new})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("sign", [1, -1])
def test_what_float16_cannot_hold_is_an_error_and_nothing_is_written(tmp_path: Path, sign: int) -> None:
    found = Round(tmp_path, {"w": np.zeros(SHAPE, np.float32)}, Encoding.FLOAT16, [WEIGHT])
    found.write({"w": filled([sign * LARGEST_FLOAT16])})
    found.part.unlink()
    with pytest.raises(OverflowError, match=r"changes by 65536, more than float16 can hold \(65504\)"):
        found.write({"w": filled([], [sign * 65536.0])})
    assert not found.part.exists()


def test_what_int8_cannot_hold_is_an_error(tmp_path: Path) -> None:
    found = Round(tmp_path, {"w": np.zeros(SHAPE, np.float32)}, Encoding.INT8, [WEIGHT])
    with pytest.raises(OverflowError, match=r"w changes by 3e\+38, more than int8 can hold"):
        found.write({"w": filled([3e38])})
    assert not found.part.exists()


@pytest.mark.parametrize("encoding", [Encoding.FLOAT16, Encoding.INT8])
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_rehearsal_writes_whatever_came_of_it(tmp_path: Path, encoding: Encoding, value: float) -> None:
    found = Round(tmp_path, {"w": np.zeros(SHAPE, np.float32)}, encoding, [WEIGHT])
    found.write({"w": filled([value])}, checked=False)
    assert found.part.exists()


def broken(tensors: dict[str, Array]) -> Iterator[tuple[str, dict[str, Array]]]:
    yield "of another type", tensors | {"w": tensors["w"].astype(np.int16)}
    yield "of another shape", tensors | {"w": tensors["w"].reshape(64, 4)}
    yield "without scales", {"w": tensors["w"]}
    yield "too few scales", tensors | {"w" + SCALES: tensors["w" + SCALES][:3]}
    yield "scales of another type", tensors | {"w" + SCALES: tensors["w" + SCALES].astype(np.float64)}
    yield "scales and a float16", tensors | {"w": tensors["w"].astype(np.float16)}
    yield "scales of nothing", tensors | {"x" + SCALES: tensors["w" + SCALES]}
    yield "another tensor", tensors | {"x": tensors["w"]}


GOOD: dict[str, Array] = {"w": np.ones(SHAPE, np.int8), "w" + SCALES: np.ones(4, np.float32)}


@pytest.mark.parametrize("tensors", [pytest.param(each, id=what) for what, each in broken(GOOD)])
def test_a_part_that_cannot_be_read_as_tensors_of_the_model_is_refused(
    tmp_path: Path, tensors: dict[str, Array]
) -> None:
    save(tmp_path / "old", {"w": np.zeros(SHAPE, np.float32)})
    save(tmp_path / "good", GOOD)
    save(tmp_path / "part", tensors)
    old = open_weights(tmp_path / "old")
    assert DecodedPart(old, tmp_path / "good").read("w").tolist() == np.ones(SHAPE).tolist()
    with pytest.raises(StateError, match="part"):
        DecodedPart(old, tmp_path / "part")


def test_small_tensors_are_not_encoded_by_anybody(tmp_path: Path) -> None:
    assert not is_encoded("F32", (255, 1), parameter=True)
    assert not is_encoded("F32", (512,), parameter=True)
    assert not is_encoded("F64", SHAPE, parameter=True)
    assert not is_encoded("F32", SHAPE, parameter=False)
    assert is_encoded("F32", SHAPE, parameter=True)
    save(tmp_path / "old", {"b": np.zeros(64, np.float32)})
    save(tmp_path / "part", {"b": np.zeros(64, np.float16)})
    with pytest.raises(StateError, match=r"holds b as \('F16'"):
        DecodedPart(open_weights(tmp_path / "old"), tmp_path / "part")


def test_the_layout_of_what_is_sent() -> None:
    layout = ModelLayout((UnitLayout("unit", (WEIGHT, BIAS, COUNTER)),), (TensorInfo("h", (64, 16), "F32"),))
    assert layout.as_sent(Encoding.FLOAT32) is layout
    sent = {each.name: (each.dtype, each.shape) for each in layout.as_sent(Encoding.INT8).tensors}
    assert sent == {
        "w": ("I8", SHAPE),
        "w..scales": ("F32", (4,)),
        "b": ("F32", (64,)),
        "n": ("I64", ()),
        "h": ("I8", (64, 16)),
        "h..scales": ("F32", ()),
    }
    assert layout.as_sent(Encoding.INT8).parameters == layout.parameters
    halved = {each.name: each.dtype for each in layout.as_sent(Encoding.FLOAT16).tensors}
    assert halved == {"w": "F16", "b": "F32", "n": "I64", "h": "F16"}


def test_the_largest_scale_can_be_decoded() -> None:
    with np.errstate(over="raise"):
        assert np.isfinite(np.float32(-128) * np.float32(LARGEST_SCALE))
