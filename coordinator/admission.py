"""Checks an uploaded update before anything of it is used: its result against the task, its tensors against the model.

The parts come from a device and may hold anything. Memory is one slice of 4 MiB and the parts' headers, which are
bounded by what this model's headers can need. Imports numpy: only for when there is an update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from coordinator.store.records import TaskRecord
from fedepth.errors import StateError, UpdateError
from fedepth.layout import ModelLayout, TensorInfo
from fedepth.plan import Plan
from fedepth.task import Result
from fedepth.weights import Reader, open_weights

# Per tensor: type, shape, offsets and punctuation. A name may be written in escapes of 6 bytes per character
# (12 outside the basic plane).
_ENTRY_BYTES = 512
_ESCAPE_BYTES = 12
_METADATA_BYTES = 64 << 10


def check_result(result: Result, task: TaskRecord, layout: ModelLayout, limit_parts: int) -> None:
    """Whether a result fits its task: round, attempt, samples, plan, trained units, measurements, parts.

    Raises:
        UpdateError: it does not.
    """
    if result.round != task.round:
        raise UpdateError("plan", f"task {task.task_id} is of round {task.round}, the update says {result.round}")
    if not 1 <= result.attempt <= task.attempt:
        raise UpdateError("plan", f"attempt {result.attempt} of task {task.task_id}, given were 1 to {task.attempt}")
    if not 0 < result.sample_count <= task.sample_count:
        raise UpdateError(
            "samples",
            f"trained on {result.sample_count} samples, the device had reported {task.sample_count}",
        )
    _check_plan(result, layout)
    _check_stages(result)
    numbers = [part.part for part in result.parts]
    if not 0 < len(numbers) <= limit_parts or len(set(numbers)) != len(numbers):
        raise UpdateError("size", f"parts {numbers} for a model of {len(layout.units)} units")


def check_update(parts: Sequence[Path], layout: ModelLayout, result: Result) -> None:
    """Accepts an update whose parts hold exactly the tensors of `result.trained_units` and the head, each
    once.

    Raises:
        UpdateError: with the reason "plan" (trained units that the model does not have, or one twice), "size"
            (a part is missing or damaged), "unknown_tensor" (one that was not trained, or one twice),
            "missing_tensor", "shape", "dtype" or "not_finite".
    """
    units = result.trained_units
    if len(set(units)) != len(units) or not all(0 <= unit < len(layout.units) for unit in units):
        raise UpdateError(
            "plan", f"trained units {list(units)[:20]} of a model with the units 0 to {len(layout.units) - 1}"
        )
    expected = {tensor.name: tensor for tensor in layout.trained_tensors(units, head=result.plan.trains_head)}
    holders = _holders(parts, expected)
    missing = [name for name in expected if name not in holders]
    if missing:
        raise UpdateError(
            "missing_tensor",
            f"the update lacks {len(missing)} of {len(expected)} tensors, such as {missing[0]}",
        )
    for name, tensor in expected.items():
        _check_info(holders[name], tensor)
    for name in expected:
        _check_values(holders[name], name)


def _check_plan(result: Result, layout: ModelLayout) -> None:
    plan = result.plan
    if not plan.stages:
        raise UpdateError("plan", "the plan has no stage, so that nothing was trained")
    trained = _units_of(plan)
    named = sorted([*trained, *plan.untrained])
    end = len(layout.units)
    # Units that the model's author froze may come first, and are part of no plan.
    first = named[0] if 0 <= named[0] < end and not any(unit.tensors for unit in layout.units[: named[0]]) else 0
    if named != list(range(first, end)):
        raise UpdateError("plan", f"plan {plan.blocks} does not cover units {first} to {end - 1} once each")
    if sorted(result.trained_units) != trained:
        raise UpdateError("plan", f"trained units {list(result.trained_units)} do not fit plan {plan.blocks}")
    if plan.predicted_peak_bytes > plan.budget_bytes:
        raise UpdateError(
            "plan",
            f"plan {plan.blocks} needs {plan.predicted_peak_bytes} bytes, its budget is {plan.budget_bytes}",
        )


def _units_of(plan: Plan) -> list[int]:
    """Sorted. A stage cannot blow this up: bounds are checked before units are listed."""
    found: list[int] = []
    for stage in plan.stages:
        if not 0 <= stage.first <= stage.last < 1 << 16:
            raise UpdateError("plan", f"stage {stage.first}-{stage.last} is not a range of units")
        found.extend(range(stage.first, stage.last + 1))
    return sorted(found)


def _check_stages(result: Result) -> None:
    planned = [(stage.first, stage.last) for stage in result.plan.stages]
    reported = [(stage.first, stage.last) for stage in result.stages]
    if planned != reported:
        raise UpdateError("plan", f"stages {planned} were planned, {reported} are reported")
    for stage in result.stages:
        if not all(map(math.isfinite, (stage.loss_first, stage.loss_last, stage.seconds))):
            raise UpdateError(
                "not_finite",
                f"stage {stage.first}-{stage.last} reports loss {stage.loss_first} to {stage.loss_last}; "
                "lower the learning rate",
            )
        if min(stage.measured_peak_bytes, stage.budget_bytes, stage.steps, stage.samples_seen) < 0:
            raise UpdateError("plan", f"stage {stage.first}-{stage.last} reports a negative measurement")
    if not math.isfinite(result.seconds):
        raise UpdateError("not_finite", f"training took {result.seconds} seconds")


def _holders(parts: Sequence[Path], expected: dict[str, TensorInfo]) -> dict[str, Reader]:
    limit = _METADATA_BYTES + sum(_ENTRY_BYTES + _ESCAPE_BYTES * len(name) for name in expected)
    holders: dict[str, Reader] = {}
    for path in parts:
        try:
            reader = open_weights(path, limit)
        except StateError as error:
            raise UpdateError("size", str(error)) from error
        for name in reader.names:
            if name not in expected:
                raise UpdateError(
                    "unknown_tensor", f"{path.name} holds {name[:80]!r}, which is not in the trained units"
                )
            if name in holders:
                raise UpdateError(
                    "unknown_tensor", f"tensor {name} lies in {holders[name].path.name} and in {path.name}"
                )
            holders[name] = reader
    return holders


def _check_info(reader: Reader, tensor: TensorInfo) -> None:
    dtype, shape = reader.info(tensor.name)
    if dtype != tensor.dtype:
        raise UpdateError("dtype", f"tensor {tensor.name} is of type {dtype}, the model's of {tensor.dtype}")
    if shape != tensor.shape:
        raise UpdateError("shape", f"tensor {tensor.name} has the shape {shape}, the model's {tensor.shape}")


def _check_values(reader: Reader, name: str) -> None:
    if not reader.info(name)[0].startswith("F"):
        return
    try:
        for piece in reader.slices(name):
            if not np.isfinite(piece).all():
                raise UpdateError("not_finite", f"tensor {name} holds values that are not finite numbers")
    except StateError as error:
        raise UpdateError("size", str(error)) from error
