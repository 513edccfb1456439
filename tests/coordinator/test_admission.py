"""What is refused of an update, and by which reason."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.admission import (
    check_origin,
    check_report,
    check_result,
    check_settings,
    check_update,
    lacking_classes,
)
from fedepth.budget import Budget, MemoryLimit
from fedepth.costs import Calibration
from fedepth.errors import UpdateError
from fedepth.job_sections import LimitsSection
from fedepth.layout import LARGEST_SCALE, SCALES, Encoding, ModelLayout, TensorInfo, UnitLayout
from fedepth.plan import CachePlace, CacheType, PeakComponents, Plan, Policy, Stage
from fedepth.task import SETTINGS, Distil, Heads, ModelSpec, Result, TrainingSpec
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
    stages = tuple(Stage(unit, unit, 1, CachePlace.DISK, 1, PeakComponents(0, 0, 0, 0, 0, 0, 0)) for unit in units)
    return Result("t", 1, "d", 1, 10, Plan(stages, untrained, Policy.AUTO, 0), units, (), (), 1.0, "malloc", 0)


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


def test_an_update_has_the_auxiliary_heads_that_its_blocks_end_with_and_no_others(tmp_path: Path) -> None:
    own = {"auxiliary.0.linear.bias": np.ones(3, np.float32)}
    layout = replace(LAYOUT, auxiliary=((TensorInfo("auxiliary.0.linear.bias", (3,), "F32"),), ()))
    check_update(saved(tmp_path, stem() | own, body(), head()), layout, result(0, 1))
    assert reason(saved(tmp_path, stem(), body(), head()), 0, 1, layout=layout)[0] == "missing_tensor"
    assert reason(saved(tmp_path, body() | own, head()), 1, layout=layout)[0] == "unknown_tensor"
    whole = Stage(0, 1, 1, CachePlace.DISK, 1, PeakComponents(0, 0, 0, 0, 0, 0, 0))
    at_once = replace(result(0, 1), plan=Plan((whole,), (), Policy.AUTO, 0))
    check_update(saved(tmp_path, stem() | body() | head()), layout, at_once)
    with pytest.raises(UpdateError, match=r"auxiliary\.0\.linear\.bias.*not in the trained units"):
        check_update(saved(tmp_path, stem() | body() | head() | own), layout, at_once)
    through = replace(result(0, untrained=(1,)).plan.stages[0], frozen_suffix=True)
    suffix = replace(result(0), plan=Plan((through,), (1,), Policy.AUTO, 0))
    check_update(saved(tmp_path, stem(), head()), layout, suffix)
    behind = replace(result(0), plan=Plan(result(0).plan.stages, (1,), Policy.AUTO, 0))
    check_update(saved(tmp_path, stem() | own), layout, behind)


TRAINING = TrainingSpec(8, 1, "sgd", 0.1, 0.9, 0.0, 0.0, "none", 1)


@pytest.mark.parametrize(
    ("training", "knows", "unknown"),
    [
        (TRAINING, (), ()),
        (TRAINING, SETTINGS, ()),
        (replace(TRAINING, cache_type=CacheType.UINT8), (), ()),  # which every agent knows
        (replace(TRAINING, heads=Heads.AUXILIARY), (), ("heads",)),
        (replace(TRAINING, heads=Heads.AUXILIARY), SETTINGS, ()),
        (replace(TRAINING, distil=Distil.GLOBAL, distil_weight=0.5), ("batch", "distil"), ("distil_weight",)),
        (replace(TRAINING, distil=Distil.GLOBAL, heads=Heads.AUXILIARY), (), ("heads", "distil")),
    ],
)
def test_a_device_that_would_train_something_else_is_refused_by_name(
    kit: Any, training: TrainingSpec, knows: tuple[str, ...], unknown: tuple[str, ...]
) -> None:
    report = replace(kit.report("a"), settings=knows, fedepth_version="0.0.9")
    told = check_settings(report, training)
    assert bool(told) == bool(unknown)
    if unknown:
        named = ", ".join(f"[training] {name}" for name in unknown)
        assert f"sets {named}, which the agent of this device (fedepth '0.0.9') does not know" in told
        assert "install the coordinator's version" in told


def test_a_device_that_does_not_know_encodings_is_told_so(kit: Any) -> None:
    report = replace(kit.report("a"), settings=("batch",), fedepth_version="0.0.9")
    assert check_settings(report, TRAINING) == ""
    told = check_settings(report, replace(TRAINING, encoding=Encoding.INT8))
    assert told.startswith("the job sets [transfer] encoding, which the agent of this device (fedepth '0.0.9')")
    assert check_settings(replace(report, settings=SETTINGS), replace(TRAINING, encoding=Encoding.INT8)) == ""


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
    "a negative measurement": ("plan", lambda kit, result: with_stage(result, rehearsed_peak_bytes=-1)),
    "a measurement of no machine": ("plan", lambda kit, result: with_stage(result, measured_peak_bytes=1 << 51)),
    "steps without end": ("plan", lambda kit, result: with_stage(result, steps=1 << 41)),
    "a stage of negative seconds": ("plan", lambda kit, result: with_stage(result, seconds=-1.0)),
    "a stage of no time": ("not_finite", lambda kit, result: with_stage(result, seconds=float("nan"))),
    "seconds of centuries": ("plan", lambda kit, result: replace(result, seconds=1e12)),
    "a negative baseline": ("plan", lambda kit, result: replace(result, baseline_bytes=-1)),
    "a negative prediction": (
        "plan",
        lambda kit, result: replace(
            result,
            plan=replace(
                result.plan,
                stages=(
                    replace(result.plan.stages[0], predicted=PeakComponents(-5, 0, 0, 0, 0, 0, 0)),
                    result.plan.stages[1],
                ),
            ),
        ),
    ),
    "untrained units out of order": (
        "plan",
        lambda kit, result: with_plan(kit, result, kit.plan((0, 0), untrained=(2, 1))),
    ),
    "no models": ("plan", lambda kit, result: replace(result, plan=replace(result.plan, models=0))),
    "models without end": ("plan", lambda kit, result: replace(result, plan=replace(result.plan, models=1 << 40))),
    "several models in several stages": (
        "plan",
        lambda kit, result: replace(
            result,
            plan=replace(result.plan, models=2),
            stages=tuple(replace(stage, models=2) for stage in result.stages),
        ),
    ),
    "a stage of more models than planned": ("plan", lambda kit, result: with_stage(result, models=2)),
    "a part of a number that there is not": ("size", lambda kit, result: with_part(result, part=PARTS)),
    "a part of no bytes": ("size", lambda kit, result: with_part(result, size_bytes=0)),
    "a part without a digest": ("digest", lambda kit, result: with_part(result, digest="../../etc/passwd")),
    "no parts": ("size", lambda kit, result: replace(result, parts=())),
    "a part twice": ("size", lambda kit, result: replace(result, parts=result.parts * 2)),
}


def with_plan(kit: Any, result: Result, plan: Any) -> Result:
    small = plan if all(stage.last < 100 for stage in plan.stages) else None
    made: Result = kit.result(kit.task(), {0: DATA}, plan=small or result.plan)
    return made if small else replace(made, plan=plan)


def with_stage(result: Result, **changes: Any) -> Result:
    return replace(result, stages=(replace(result.stages[0], **changes), *result.stages[1:]))


def with_part(result: Result, **changes: Any) -> Result:
    return replace(result, parts=(replace(result.parts[0], **changes), *result.parts[1:]))


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


def test_two_models_in_one_block_of_all_units_are_fine(kit: Any) -> None:
    good = kit.result(kit.task(), {0: DATA}, plan=kit.plan((0, 2)))
    two = replace(good, plan=replace(good.plan, models=2), stages=(replace(good.stages[0], models=2),))
    check_result(two, kit.task(), kit.layout, PARTS)
    with pytest.raises(UpdateError, match="2 models were planned, a stage reports 1"):
        check_result(replace(two, stages=good.stages), kit.task(), kit.layout, PARTS)


STAGE = Stage(0, 65535, 1, CachePlace.DISK, 1, PeakComponents(0, 0, 0, 0, 0, 0, 0))
LONG: dict[str, Callable[[Result], Result]] = {
    "200 stages of 65,536 units": lambda good: replace(good, plan=replace(good.plan, stages=(STAGE,) * 200)),
    "three stages of all units": lambda good: replace(
        good, plan=replace(good.plan, stages=(replace(STAGE, last=2),) * 3)
    ),
    "untrained units": lambda good: replace(good, plan=replace(good.plan, untrained=tuple(range(1000)))),
    "trained units": lambda good: replace(good, trained_units=tuple(range(1000))),
    "stages of results": lambda good: replace(good, stages=good.stages * 500),
    "parts": lambda good: replace(good, parts=good.parts * 1000),
    "a digest": lambda good: with_part(good, digest="\n" * 1000),
}


@pytest.mark.parametrize("case", LONG)
def test_lists_are_refused_by_their_length_and_never_quoted_in_full(kit: Any, case: str) -> None:
    long = LONG[case](kit.result(kit.task(), {0: DATA}))
    tracemalloc.start()
    try:
        with pytest.raises(UpdateError) as caught:
            check_result(long, kit.task(), kit.layout, PARTS)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 18
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_the_largest_plan_of_a_model_is_admitted_and_quoted_in_short(kit: Any) -> None:
    units = 512
    layout = ModelLayout(
        tuple(UnitLayout(f"u{index}", (TensorInfo(f"w{index}", (1,), "F32"),)) for index in range(units)), ()
    )
    result = kit.result(kit.task(), {0: DATA}, plan=kit.plan(*((unit, unit) for unit in range(units))))
    check_result(result, kit.task(), layout, units)
    with pytest.raises(UpdateError, match="…") as caught:
        check_result(replace(result, trained_units=result.trained_units[1:]), kit.task(), layout, units)
    assert len(str(caught.value)) < 500


NORM = ModelLayout(
    units=(
        UnitLayout(
            "norm",
            (
                TensorInfo("weight", (2,), "F32"),
                TensorInfo("running_mean", (2,), "F32"),
                TensorInfo("running_var", (2,), "F32", not_negative=True),
                TensorInfo("num_batches_tracked", (), "I64", not_negative=True),
                TensorInfo("double", (1,), "F64"),
                TensorInfo("flags", (4,), "BOOL"),
                TensorInfo("table", (2,), "I64"),
            ),
        ),
    ),
    head=(),
)


def norm(**changes: Any) -> dict[str, Any]:
    return {
        "weight": np.array([-1.0, 0.0], np.float32),
        "running_mean": np.array([-1.0, 0.0], np.float32),
        "running_var": np.array([0.0, 1e-30], np.float32),
        "num_batches_tracked": np.array(0),
        "double": np.array([-1e280]),
        "flags": np.array([True, False, True, True]),
        "table": np.array([-(1 << 53), 1 << 53]),
    } | changes


def test_a_variance_may_be_zero_and_a_mean_negative(tmp_path: Path) -> None:
    check_update(saved(tmp_path, norm()), NORM, result(0))


@pytest.mark.parametrize(
    "bad",
    [
        {"running_var": np.array([1.0, -1e-30], np.float32)},
        {"num_batches_tracked": np.array(-1)},
        {"double": np.array([1e281])},
        {"table": np.array([0, (1 << 53) + 2])},
        {"table": np.array([-(1 << 63), 0])},
        {"flags": np.array([0, 1, 2, 0], np.uint8).view(np.bool_)},
    ],
    ids=lambda bad: f"{next(iter(bad))} {next(iter(bad.values()))}",
)
def test_values_that_cannot_be_are_refused(tmp_path: Path, bad: dict[str, Any]) -> None:
    found, message = reason(saved(tmp_path, norm(**bad)), 0, layout=NORM)
    assert (found, f"tensor {next(iter(bad))} holds" in message) == ("range", True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_variance_that_is_no_number_is_refused(tmp_path: Path, value: float) -> None:
    changed = norm(running_var=np.array([0.0, value], np.float32))
    assert reason(saved(tmp_path, changed), 0, layout=NORM)[0] == "not_finite"


LIMITS = LimitsSection(samples_per_device=100, devices=2)
CLASSES = ("0", "1")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device_id": "../up\x1b[2J"}, r"device id '../up\\x1b\[2J' is not 1 to 64"),
        ({"device_id": "x" * 65}, "is not 1 to 64 letters"),
        ({"name": ""}, "1 to 200 characters, this one has 0"),
        ({"name": "x" * 201}, "this one has 201"),
        ({"name": "a\nb"}, r"name 'a\\nb' has characters that cannot be shown"),
        ({"name": "\u202eevil"}, r"'\\u202eevil' has characters"),
        ({"hardware": "x" * 1025}, "describes its hardware in 1025 characters, allowed are 1024"),
        ({"class_counts": (1,) * 3}, "the data has 3 classes, the job has 2: '0', '1'; give"),
        (
            {"class_counts": (0, 10, 10)},
            r"has labels 2; .* labels 0 to 1; the labels here start at 1: if 1 stands for '0'",
        ),
        ({"class_names": ("1", "2")}, "1 folder that is not a class of the job .*: folder '2'"),
        ({"class_names": ("1", "0\u200b")}, r"folder '0\\u200b' - did you mean class '0'\?; rename"),
        ({"class_names": ("1", "0", "1")}, "the device reports 3 class folders and counts of 2"),
        ({"class_counts": (21, -1)}, "20 samples, but by class they are 20, the smallest class with -1"),
        ({"class_counts": (10, 11)}, "20 samples, but by class they are 21"),
        ({"sample_count": 0}, "no training samples"),
        ({"sample_count": -5}, "no training samples"),
        ({"sample_count": 101}, "reports 101 samples, the job allows 100; raise"),
        ({"sample_count": (1 << 63) - 1}, "reports 9223372036854775807 samples, the job allows 100"),
        ({"calibration": Calibration(kept=float("nan"))}, "calibration has kept nan, allowed are 0 to 1e"),
        ({"calibration": Calibration(kernel_share=1e300)}, "has kernel_share 1e"),
        ({"calibration": Calibration(reordered_share=-1.0)}, "has reordered_share -1.0"),
        ({"calibration": Calibration(fixed_bytes=-1)}, "has fixed_bytes -1"),
    ],
)
def test_a_report_that_cannot_be_is_answered_with_a_sentence(kit: Any, changes: dict[str, Any], said: str) -> None:
    assert check_report(kit.report("a"), CLASSES, LIMITS) == ""
    told = check_report(replace(kit.report("a"), **changes), CLASSES, LIMITS)
    assert re.search(said, told), told
    assert told.isprintable()
    assert len(told) < 500


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"limits": (MemoryLimit("x", 1),) * 65}, "65 bounds on its memory, allowed are 64"),
        ({"limits": (MemoryLimit("x", -1),)}, "less than 0 bytes available"),
        ({"total_bytes": -1}, "total_bytes -1"),
        ({"reserve_bytes": -1}, "reserve_bytes -1"),
        ({"budget_bytes": -1}, "budget_bytes -1"),
        ({"budget_bytes": 101}, "a budget of 101 bytes, but 100 available"),
        ({"available_bytes": -1, "budget_bytes": 0}, "less than 0 bytes available"),
        ({"cap_bytes": 50}, "a budget of 60 bytes above its cap, 50"),
        ({"fraction": 0.0}, "fraction 0.0"),
        ({"fraction": 1.5}, "fraction 1.5"),
        ({"fraction": float("nan")}, "fraction nan"),
    ],
)
def test_a_budget_that_cannot_be_is_answered_with_a_sentence(kit: Any, changes: dict[str, Any], said: str) -> None:
    budget = Budget(200, 100, (MemoryLimit("MemAvailable", 100, 200),), 10, 20, 0.9, 60, 60)
    assert check_report(replace(kit.report("a"), budget=budget), CLASSES, LIMITS) == ""
    told = check_report(replace(kit.report("a"), budget=replace(budget, **changes)), CLASSES, LIMITS)
    assert said in told


def test_a_device_without_a_class_is_welcome(kit: Any) -> None:
    """It may not know the job's classes yet."""
    assert check_report(replace(kit.report("a"), class_counts=()), CLASSES, LIMITS) == ""
    assert check_report(replace(kit.report("a"), class_counts=(20,)), CLASSES, LIMITS) == ""
    of_one = replace(kit.report("a"), class_names=("1",), class_counts=(20,))
    assert check_report(of_one, CLASSES, LIMITS) == ""
    assert lacking_classes(of_one, ModelSpec("m", CLASSES, (1, 8, 8), (0.0,), (1.0,))) == ("0",)


def test_labels_that_start_at_1_are_welcome_where_the_job_says_so(kit: Any) -> None:
    report = replace(kit.report("a"), class_counts=(0, 20, 0))
    assert check_report(report, CLASSES, LIMITS, first_label=1) == ""
    model = ModelSpec("m", CLASSES, (1, 8, 8), (0.0,), (1.0,), first_label=1)
    assert lacking_classes(report, model) == ("1",)
    told = check_report(replace(report, class_counts=(5, 15)), CLASSES, LIMITS, first_label=1)
    assert "has labels 0; the job has the 2 classes '0', '1', that is labels 1 to 2" in told


ENCODED = ModelLayout(
    units=(UnitLayout("unit", (TensorInfo("w", (4, 64), "F32"), TensorInfo("b", (4,), "F32"))),),
    head=(TensorInfo("h", (4, 64), "F32"),),
)


def as_int8(**changes: Any) -> dict[str, Any]:
    made = {
        "w": np.full((4, 64), -127, np.int8),
        "w" + SCALES: np.array([0, 1e-9, 1, LARGEST_SCALE], np.float32),
        "b": np.ones(4, np.float32),
        "h": np.zeros((4, 64), np.int8),
        "h" + SCALES: np.zeros(4, np.float32),
    }
    return made | {name.replace("_scales", SCALES): value for name, value in changes.items()}


def as_float16(**changes: Any) -> dict[str, Any]:
    return {name: np.ones((4, 64), np.float16) for name in "wh"} | {"b": np.ones(4, np.float32)} | changes


def as_float32() -> dict[str, Any]:
    return {name: np.ones((4, 64), np.float32) for name in "wh"} | {"b": np.ones(4, np.float32)}


SENT = {Encoding.FLOAT32: as_float32, Encoding.FLOAT16: as_float16, Encoding.INT8: as_int8}


@pytest.mark.parametrize("job", list(Encoding))
@pytest.mark.parametrize("device", list(Encoding))
def test_an_update_is_accepted_in_the_encoding_of_its_job_and_in_no_other(
    tmp_path: Path, job: Encoding, device: Encoding
) -> None:
    parts, layout = saved(tmp_path, SENT[device]()), ENCODED.as_sent(job)
    if job is device:
        check_update(parts, layout, result(0))
        return
    found, message = reason(parts, 0, layout=layout)
    assert found == "dtype"
    assert "the update is in another encoding than [transfer] encoding of the job says" in message


@pytest.mark.parametrize(
    ("changes", "why", "message"),
    [
        ({"w_scales": np.array([1, -1e-9, 1, 1], np.float32)}, "range", "no variance, counter or scale is below 0"),
        ({"w_scales": np.array([1, np.nan, 1, 1], np.float32)}, "not_finite", "not finite"),
        ({"w_scales": np.array([1, np.inf, 1, 1], np.float32)}, "not_finite", "not finite"),
        ({"w_scales": np.array([1, 1, 1, 3e38], np.float32)}, "range", "values from 1.0 to"),
        ({"w_scales": np.ones(5, np.float32)}, "shape", "the model's (4,)"),
        ({"w_scales": np.ones((), np.float32)}, "shape", "the model's (4,)"),
        ({"w_scales": np.ones(4, np.float64)}, "dtype", "of type F64"),
        ({"w_scales": np.ones(4, np.float16)}, "dtype", "of type F16"),
        ({"w": np.ones((4, 64), np.uint8)}, "dtype", "of type U8"),
        ({"w": np.ones((64, 4), np.int8)}, "shape", "the model's (4, 64)"),
        ({"b": np.ones(4, np.int8)}, "dtype", "tensor b is of type I8, the model's of F32"),
        ({"b_scales": np.ones((), np.float32)}, "dtype", "int8 scales"),
        ({"x_scales": np.ones((), np.float32)}, "unknown_tensor", "not in the trained units"),
        ({"b": np.array([1, np.inf, 1, 1], np.float32)}, "not_finite", "not finite"),
    ],
)
def test_hostile_int8_is_refused(tmp_path: Path, changes: dict[str, Any], why: str, message: str) -> None:
    found, said = reason(saved(tmp_path, as_int8(**changes)), 0, layout=ENCODED.as_sent(Encoding.INT8))
    assert found == why
    assert message in said


def test_scales_have_to_be_there_and_beside_what_they_scale(tmp_path: Path) -> None:
    layout, whole = ENCODED.as_sent(Encoding.INT8), as_int8()
    scales = {"w" + SCALES: whole.pop("w" + SCALES)}
    assert reason(saved(tmp_path, whole), 0, layout=layout)[0] == "missing_tensor"
    found, message = reason(saved(tmp_path, whole, scales), 0, layout=layout)
    assert found == "unknown_tensor"
    assert "w..scales is not in the part of the tensor that it scales" in message


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_float16_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    made = as_float16(w=np.full((4, 64), value, np.float16))
    assert reason(saved(tmp_path, made), 0, layout=ENCODED.as_sent(Encoding.FLOAT16))[0] == "not_finite"


def test_changes_of_nobody_knows_which_weights_are_refused() -> None:
    check_origin(result(0), "0" * 64)
    for encoding in (Encoding.FLOAT16, Encoding.INT8):
        check_origin(replace(result(0), weights_digest="0" * 64), "0" * 64, encoding)
        with pytest.raises(
            UpdateError, match=f"holds changes as {encoding.value}, and does not say of which"
        ) as caught:
            check_origin(result(0), "0" * 64, encoding)
        assert caught.value.reason == "weights"
