"""What is refused of an update, and by which reason."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.admission import check_result, check_update
from fedepth.errors import UpdateError
from fedepth.layout import ModelLayout, TensorInfo, UnitLayout
from fedepth.plan import CachePlace, PeakComponents, Plan, Policy, Stage
from fedepth.task import Result
from fedepth.weights import save, write_tensors

LAYOUT = ModelLayout(
    units=(
        UnitLayout("stem", (TensorInfo("stem.w", (2, 3), "F32"),)),
        UnitLayout("body", (TensorInfo("body.w", (4,), "F32"), TensorInfo("body.n", (), "I64"))),
    ),
    head=(TensorInfo("head.w", (3,), "F32"),),
)


def stem() -> dict[str, Any]:
    return {"stem.w": np.ones((2, 3), np.float32)}


def body() -> dict[str, Any]:
    return {"body.w": np.ones(4, np.float32), "body.n": np.array(5)}


def head() -> dict[str, Any]:
    return {"head.w": np.ones(3, np.float32)}


def result(*units: int, untrained: tuple[int, ...] = ()) -> Result:
    stage = Stage(0, 1, 1, CachePlace.DISK, 1, PeakComponents(0, 0, 0, 0, 0, 0, 0))
    return Result("t", 1, "d", 1, 10, Plan((stage,), untrained, Policy.AUTO, 0), units, (), (), 1.0, "malloc", 0)


def saved(folder: Path, *parts: dict[str, Any]) -> list[Path]:
    paths = [folder / f"part-{number}" for number in range(len(parts))]
    for path, tensors in zip(paths, parts, strict=True):
        save(path, tensors)
    return paths


def reason(parts: list[Path], *units: int, layout: ModelLayout = LAYOUT) -> tuple[str, str]:
    with pytest.raises(UpdateError) as caught:
        check_update(parts, layout, result(*units))
    return caught.value.reason, str(caught.value)


def test_an_update_of_all_units_in_any_parts_is_accepted(tmp_path: Path) -> None:
    check_update(saved(tmp_path, stem(), body() | head()), LAYOUT, result(0, 1))
    check_update(saved(tmp_path, head(), body(), stem()), LAYOUT, result(1, 0))


def test_an_update_of_some_units_and_the_head_is_accepted(tmp_path: Path) -> None:
    check_update(saved(tmp_path, body(), head()), LAYOUT, result(1))


def test_a_head_that_was_not_trained_is_not_in_the_update(tmp_path: Path) -> None:
    """Units behind the last block are untrained, and nothing was trained through them."""
    small = result(0, untrained=(2,))
    check_update(saved(tmp_path, stem()), LAYOUT, small)
    with pytest.raises(UpdateError, match=r"head\.w"):
        check_update(saved(tmp_path, stem(), head()), LAYOUT, small)


@pytest.mark.parametrize("units", [(2,), (-1,), (0, 0)])
def test_units_that_the_model_does_not_have_are_refused_by_plan(tmp_path: Path, units: tuple[int, ...]) -> None:
    found, message = reason(saved(tmp_path, stem(), head()), *units)
    assert found == "plan"
    assert "units 0 to 1" in message


def test_a_unit_that_is_missing_is_refused(tmp_path: Path) -> None:
    assert reason(saved(tmp_path, stem(), head()), 0, 1) == (
        "missing_tensor",
        "the update lacks 2 of 4 tensors, such as body.w",
    )


def test_a_missing_head_is_refused(tmp_path: Path) -> None:
    found, message = reason(saved(tmp_path, stem()), 0)
    assert (found, "head.w" in message) == ("missing_tensor", True)
    assert reason([], 0)[0] == "missing_tensor"


@pytest.mark.parametrize(
    "extra",
    [{"other": np.ones(1, np.float32)}, body()],
    ids=["a name of no model", "a unit that was not trained"],
)
def test_a_tensor_that_was_not_trained_is_refused(tmp_path: Path, extra: dict[str, Any]) -> None:
    found, message = reason(saved(tmp_path, stem() | head(), extra), 0)
    assert found == "unknown_tensor"
    assert f"part-1 holds {min(extra)!r}" in message


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    found, message = reason(saved(tmp_path, stem() | head(), head()), 0)
    assert found == "unknown_tensor"
    assert "head.w lies in part-0 and in part-1" in message


def test_a_hostile_name_can_be_sent_back_as_text(tmp_path: Path) -> None:
    header = b'{"\\ud800%s":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' % (b"x" * 1000)
    (tmp_path / "part").write_bytes(len(header).to_bytes(8, "little") + header)
    found, message = reason([tmp_path / "part"], 0)
    assert found == "unknown_tensor"
    assert len(message.encode()) < 300


def test_another_shape_is_refused_even_with_as_many_elements(tmp_path: Path) -> None:
    found, message = reason(saved(tmp_path, {"stem.w": np.ones((3, 2), np.float32)} | head()), 0)
    assert found == "shape"
    assert "stem.w has the shape (3, 2), the model's (2, 3)" in message


def test_another_type_is_refused(tmp_path: Path) -> None:
    found, message = reason(saved(tmp_path, {"stem.w": np.ones((2, 3), np.float64)} | head()), 0)
    assert found == "dtype"
    assert "stem.w is of type F64, the model's of F32" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_finite_number_is_refused(tmp_path: Path, value: float) -> None:
    tensors = head()
    tensors["head.w"][2] = value
    found, message = reason(saved(tmp_path, stem(), tensors), 0)
    assert found == "not_finite"
    assert "tensor head.w" in message


def test_a_missing_part_is_refused_by_size(tmp_path: Path) -> None:
    assert reason([*saved(tmp_path, stem()), tmp_path / "absent"], 0)[0] == "size"


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_part_that_is_cut_off_is_refused_by_size(tmp_path: Path, cut: int) -> None:
    paths = saved(tmp_path, stem() | head())
    paths[0].write_bytes(paths[0].read_bytes()[:-cut])
    assert reason(paths, 0)[0] == "size"


def test_a_header_larger_than_the_model_explains_is_not_parsed(tmp_path: Path) -> None:
    names = {f"{number:0900}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for number in range(100)}
    header = json.dumps(names).encode()
    (tmp_path / "part").write_bytes(len(header).to_bytes(8, "little") + header)
    found, message = reason([tmp_path / "part"], 0)
    assert found == "size"
    assert "a header of" in message


def test_names_written_in_escapes_fit_into_the_bound(tmp_path: Path) -> None:
    name = "\U0001f600" * 2000
    layout = ModelLayout((UnitLayout("u", (TensorInfo(name, (1,), "F32"),)),), ())
    check_update(saved(tmp_path, {name: np.ones(1, np.float32)}), layout, result(0))


def test_a_bad_value_at_the_end_of_a_large_tensor_is_found_in_little_memory(tmp_path: Path) -> None:
    count = 8 << 20  # 32 MiB
    layout = ModelLayout((UnitLayout("u", (TensorInfo("w", (count,), "F32"),)),), ())
    piece = np.ones(count // 8, np.float32)
    bad = piece.copy()
    bad[-1] = np.nan
    write_tensors(tmp_path / "good", {"w": ("F32", (count,))}, lambda name: [piece] * 8)
    write_tensors(tmp_path / "bad", {"w": ("F32", (count,))}, lambda name: [piece] * 7 + [bad])
    tracemalloc.start()
    try:
        check_update([tmp_path / "good"], layout, result(0))
        assert reason([tmp_path / "bad"], 0, layout=layout)[0] == "not_finite"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20


DATA = bytes(range(200)) * 10
PARTS = 7  # three units, the head, three to spare
Change = Callable[[Any, Result], Result]
BAD: dict[str, tuple[str, Change]] = {
    "no samples": ("samples", lambda kit, result: replace(result, sample_count=0)),
    "more samples than reported": ("samples", lambda kit, result: replace(result, sample_count=21)),
    "another round": ("plan", lambda kit, result: replace(result, round=2)),
    "a later attempt": ("plan", lambda kit, result: replace(result, attempt=2)),
    "units missing": ("plan", lambda kit, result: with_plan(kit, result, kit.plan((0, 1)))),
    "units twice": ("plan", lambda kit, result: with_plan(kit, result, kit.plan((0, 1), (1, 2)))),
    "units beyond": ("plan", lambda kit, result: with_plan(kit, result, kit.plan((0, 3)))),
    "huge range": ("plan", lambda kit, result: with_plan(kit, result, kit.plan((0, 1 << 40)))),
    "no stage": ("plan", lambda kit, result: with_plan(kit, result, kit.plan(untrained=(0, 1, 2)))),
    "trained units": ("plan", lambda kit, result: replace(result, trained_units=(0, 1))),
    "over its budget": (
        "plan",
        lambda kit, result: replace(result, plan=replace(result.plan, budget_bytes=3999)),
    ),
    "stages": ("plan", lambda kit, result: replace(result, stages=result.stages[:1])),
    "loss": (
        "not_finite",
        lambda kit, result: replace(
            result, stages=(replace(result.stages[0], loss_last=float("nan")), result.stages[1])
        ),
    ),
    "no parts": ("size", lambda kit, result: replace(result, parts=())),
    "a part twice": ("size", lambda kit, result: replace(result, parts=result.parts * 2)),
}


def with_plan(kit: Any, result: Result, plan: Any) -> Result:
    small = plan if all(stage.last < 100 for stage in plan.stages) else None
    made: Result = kit.result(kit.task(), {0: DATA}, plan=small or result.plan)
    return made if small else replace(made, plan=plan)


@pytest.mark.parametrize("case", BAD)
def test_results_that_do_not_fit_their_task_are_refused(kit: Any, case: str) -> None:
    reason, change = BAD[case]
    good = kit.result(kit.task(), {0: DATA})
    check_result(good, kit.task(), kit.layout, PARTS)
    with pytest.raises(UpdateError) as caught:
        check_result(change(kit, good), kit.task(), kit.layout, PARTS)
    assert caught.value.reason == reason


def test_a_plan_may_leave_out_what_the_models_author_froze_at_the_front(kit: Any) -> None:
    frozen = replace(kit.layout, units=(UnitLayout("frozen", ()), *kit.layout.units[1:]))
    result = kit.result(kit.task(), {0: DATA}, plan=kit.plan((1, 1), (2, 2)))
    check_result(result, kit.task(), frozen, PARTS)
    with pytest.raises(UpdateError, match=r"plan 1 \| 2 does not cover units 0 to 2"):
        check_result(result, kit.task(), kit.layout, PARTS)
    with pytest.raises(UpdateError, match="does not cover units 1 to 2"):
        check_result(kit.result(kit.task(), {0: DATA}, plan=kit.plan((1, 1))), kit.task(), frozen, PARTS)


def test_a_smaller_plan_than_the_tasks_is_fine(kit: Any) -> None:
    plan = kit.plan((1, 1), (2, 2), untrained=(0,))
    check_result(kit.result(kit.task(), {0: DATA}, plan=plan), kit.task(), kit.layout, PARTS)
