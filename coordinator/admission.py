"""Decides what of a device may enter: its report, the result of its task, the tensors of its update.

All of it may hold anything. So numbers and lengths are checked before anything is listed or added up, and what is
quoted in a refusal is short and printable. Checking tensors takes one slice of 4 MiB and the parts' headers, which are
bounded by what this model's headers can need.

numpy, and what needs it, is imported only when there is an update: a coordinator that waits has no use for it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedepth_wire.bounds import MOST_COUNT, MOST_SIZE

from coordinator.store.records import TaskRecord
from fedepth.aggregation.rules import Norms
from fedepth.budget import Budget
from fedepth.costs import Calibration
from fedepth.data.labels import by_class, labels_outside, lacking, listed, unknown_names
from fedepth.data.splits import images_by_class
from fedepth.errors import StateError, UpdateError
from fedepth.job_sections import MOST_SECONDS, LimitsSection
from fedepth.layout import LARGEST_SCALE, SCALES, Encoding, ModelLayout, TensorInfo
from fedepth.plan import MOST_MODELS, Plan
from fedepth.printable import printable, quoted, shortened
from fedepth.task import FIRST_SETTINGS, MOST_DEVICE_NAME, DeviceReport, ModelSpec, Result, StageResult, TrainingSpec

if TYPE_CHECKING:
    from fedepth.weights import Array, Reader

MOST_DESCRIPTION = 1024
MOST_LIMITS = 64
MOST_SHARE = 1e6
# Beyond these a mean in float64 is not exact, or overflows: weights add up to less than 2^60.
MOST_INTEGER = 1 << 53
MOST_FLOAT = 1e280

# Per tensor: type, shape, offsets and punctuation. A name may be written in escapes of 6 bytes per character
# (12 outside the basic plane).
_ENTRY_BYTES = 512
_ESCAPE_BYTES = 12
_METADATA_BYTES = 64 << 10
_QUOTED_PLAN = 200
_OTHER_ENCODING = "the update is in another encoding than [transfer] encoding of the job says"

_DEVICE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_report(report: DeviceReport, classes: Sequence[str], limits: LimitsSection, first_label: int = 0) -> str:
    """Why a device with this report cannot take part as it is; empty if it can.

    Args:
        first_label: the label of the first class, where labels are numbers.
    """
    if not _DEVICE_ID.fullmatch(report.device_id):
        return f"device id {quoted(report.device_id, 80)} is not 1 to 64 letters, digits, '.', '_' or '-'"
    if not 0 < len(report.name) <= MOST_DEVICE_NAME:
        return f"a device name has 1 to {MOST_DEVICE_NAME} characters, this one has {len(report.name)}"
    if printable(report.name) != report.name:
        return f"the device name {quoted(report.name)} has characters that cannot be shown; give it another name"
    for field in ("hardware", "accelerator", "software", "fedepth_version"):
        length = len(getattr(report, field))
        if length > MOST_DESCRIPTION:
            return f"the device describes its {field} in {length} characters, allowed are {MOST_DESCRIPTION}"
    return (
        _objection_to_classes(report, classes, first_label)
        or _objection_to_samples(report, limits)
        or _objection_to_budget(report.budget)
        or _objection_to_calibration(report.calibration)
    )


def counted_for(report: DeviceReport, classes: Sequence[str]) -> DeviceReport:
    """The report with its samples counted by these classes, where names of folders left open what they are."""
    names, counts = report.folder_names, report.folder_counts
    if not names or len(names) != len(counts):
        return report
    found = images_by_class(names, counts, classes)
    return dataclasses.replace(
        report, sample_count=sum(found.values()), class_names=tuple(found), class_counts=tuple(found.values())
    )


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
    _check_plan(result.plan, layout)
    _check_models(result)
    _check_trained(result, layout)
    _check_stages(result)
    _check_parts(result, limit_parts, len(layout.units))


def check_origin(result: Result, weights_digest: str, encoding: Encoding = Encoding.FLOAT32) -> None:
    """Whether an update was trained from the weights of its task.

    A record that was restored from a copy hands out task ids that its abandoned life has handed out with other weights.
    An agent that does not say what it trained from is taken at its task's id; but changes mean nothing without.

    Raises:
        UpdateError: it was trained from others ("weights").
    """
    if encoding is not Encoding.FLOAT32 and not result.weights_digest:
        raise UpdateError("weights", f"the update holds changes as {encoding.value}, and does not say of which weights")
    if not result.trained_from(weights_digest):
        raise UpdateError(
            "weights",
            f"trained from weights {shortened(result.weights_digest[:12])}…, task {result.task_id} has "
            f"{weights_digest[:12]}…: it answers a task that another copy of this job's state gave out",
        )


def check_norms(norms: Norms, others: Sequence[Norms]) -> None:
    """Whether an update goes about as far as the others of its round, for each step that it took.

    Five others are needed to tell: see `fedepth.aggregation.norms.norm_bound`.

    Raises:
        UpdateError: it goes too far ("norm").
    """
    from fedepth.aggregation.norms import too_far

    why = too_far(norms, others)
    if why:
        raise UpdateError("norm", why)


def check_settings(report: DeviceReport, training: TrainingSpec) -> str:
    """Why a device cannot train as this job does, since its agent would not know how; empty if it can."""
    unknown = [name for name in training.asks_for if name not in (report.settings or FIRST_SETTINGS)]
    if not unknown:
        return ""
    what = ", ".join(f"[{'transfer' if name == 'encoding' else 'training'}] {name}" for name in unknown)
    return (
        f"the job sets {what}, which the agent of this device (fedepth {quoted(report.fedepth_version, 40)}) does not "
        "know, so that it would train something else; install the coordinator's version of fedepth on the device"
    )


def check_update(parts: Sequence[Path], layout: ModelLayout, result: Result) -> None:
    """Accepts an update whose parts hold exactly the tensors that its plan trains, each once: those of units, of the
    head, and of the auxiliary heads that its blocks end with.

    Args:
        layout: what updates of the job consist of (`ModelLayout.as_sent`).

    Raises:
        UpdateError: with the reason "plan" (trained units that the model does not have, or one twice), "size"
            (a part is missing or damaged), "unknown_tensor" (one that was not trained, or one twice),
            "missing_tensor", "shape", "dtype" (also of another encoding), "not_finite" or "range" (a negative
            variance, counter or scale, an integer or float64 beyond what can be averaged, a scale beyond what can be
            decoded, a boolean that is neither).
    """
    _check_units("trained", result.trained_units, layout)
    expected = {tensor.name: tensor for tensor in layout.trained_tensors(result.plan)}
    holders = _holders(parts, expected)
    for name in holders:
        _check_info(holders[name], expected[name])
    missing = [name for name in expected if name not in holders]
    if missing:
        raise UpdateError(
            "missing_tensor",
            f"the update lacks {len(missing)} of {len(expected)} tensors, such as {missing[0]}",
        )
    for name, tensor in expected.items():
        if name.endswith(SCALES) and holders[name] is not holders[name.removesuffix(SCALES)]:
            raise UpdateError("unknown_tensor", f"tensor {name} is not in the part of the tensor that it scales")
        _check_values(holders[name], tensor)


def lacking_classes(report: DeviceReport, model: ModelSpec) -> tuple[str, ...]:
    """The classes of the job of which a device with this report, which is in order, has no sample."""
    if not report.class_counts:
        return ()
    counts = by_class(report.class_names, report.class_counts, model.classes, model.first_label)
    return lacking(model.classes, counts)


def _objection_to_classes(report: DeviceReport, classes: Sequence[str], first_label: int) -> str:
    """A device that does not know the job's classes yet may hold samples of only some of them."""
    names, counts = report.class_names, report.class_counts
    if len(report.folder_names) != len(report.folder_counts):
        return f"the device reports {len(report.folder_names)} folders and counts of {len(report.folder_counts)}"
    if names:
        if len(names) != len(counts):
            return f"the device reports {len(names)} class folders and counts of {len(counts)}"
        unknown = unknown_names(names, classes)
        return f"the data has {unknown}; rename what is misspelt, move the rest away" if unknown else ""
    if first_label == 0 and counts and counts[0] and len(counts) > len(classes):
        return (
            f"the data has {len(counts)} classes, the job has {len(classes)}: {listed(classes)}; "
            "give the device data with the job's classes"
        )
    outside = labels_outside([label for label, count in enumerate(counts) if count], classes, first_label)
    return f"the data {outside}" if outside else ""


def _objection_to_samples(report: DeviceReport, limits: LimitsSection) -> str:
    counts = report.class_counts
    if report.sample_count <= 0:
        beside = [
            name.rstrip("/") for name, count in zip(report.folder_names, report.folder_counts, strict=True) if count > 0
        ]
        if beside:
            return (
                f"the device has images in {listed(beside)}, and none in a folder of a class of the job; make a folder "
                "for each class"
            )
        return "the device has no training samples; add data and ask again"
    if report.sample_count > limits.samples_per_device:
        return (
            f"the device reports {report.sample_count} samples, the job allows {limits.samples_per_device}; "
            "raise [limits] samples_per_device in the job file if it really has so many"
        )
    if counts and (min(counts) < 0 or sum(counts) != report.sample_count):
        return (
            f"the device reports {report.sample_count} samples, but by class they are {sum(counts)}, "
            f"the smallest class with {min(counts)}"
        )
    return ""


def _objection_to_budget(budget: Budget) -> str:
    if len(budget.limits) > MOST_LIMITS:
        return f"the device reports {len(budget.limits)} bounds on its memory, allowed are {MOST_LIMITS}"
    for field in ("total_bytes", "start_bytes", "reserve_bytes", "cap_bytes", "budget_bytes"):
        value = getattr(budget, field)
        if not 0 <= value <= MOST_SIZE:
            return f"the device reports a budget with {field} {value}, allowed are 0 to {MOST_SIZE}"
    if min(budget.available_bytes, *(limit.available_bytes for limit in budget.limits), 0) < 0:
        return "the device reports less than 0 bytes available"
    if not 0 < budget.fraction <= 1:
        return f"the device may use the fraction {budget.fraction} of its memory, allowed is above 0 to 1"
    if not budget.budget_bytes <= max(0, budget.available_bytes):
        return f"the device reports a budget of {budget.budget_bytes} bytes, but {budget.available_bytes} available"
    if budget.cap_bytes and budget.budget_bytes > budget.cap_bytes:
        return f"the device reports a budget of {budget.budget_bytes} bytes above its cap, {budget.cap_bytes}"
    return ""


def _objection_to_calibration(calibration: Calibration) -> str:
    if not 0 <= calibration.fixed_bytes <= MOST_SIZE:
        return f"the device's calibration has fixed_bytes {calibration.fixed_bytes}, allowed are 0 to {MOST_SIZE}"
    for field in ("kept", "kernel_share", "depthwise_share", "reordered_share"):
        value = getattr(calibration, field)
        if not 0 <= value <= MOST_SHARE:  # nor NaN
            return f"the device's calibration has {field} {value}, allowed are 0 to {MOST_SHARE:g}"
    return ""


def _check_plan(plan: Plan, layout: ModelLayout) -> None:
    """Lengths and ranges first: 200 stages of units 0 to 65,535 are 3 kB, and 13 million units."""
    end = len(layout.units)
    if not plan.stages:
        raise UpdateError("plan", "the plan has no stage, so that nothing was trained")
    if len(plan.stages) > end or len(plan.untrained) > end:
        raise UpdateError(
            "plan",
            f"the plan has {len(plan.stages)} stages and {len(plan.untrained)} untrained units, the model {end} units",
        )
    for stage in plan.stages:
        if not 0 <= stage.first <= stage.last < end:
            raise UpdateError(
                "plan", f"stage {stage.first}-{stage.last} is not within the model's units 0 to {end - 1}"
            )
        _check_numbers(f"planned stage {stage.block}", dataclasses.astuple(stage.predicted), MOST_SIZE)
        if not (1 <= stage.micro_batch <= MOST_COUNT and 1 <= stage.build_batch <= MOST_COUNT):
            raise UpdateError(
                "plan", f"stage {stage.block} has batches of {stage.micro_batch} and {stage.build_batch} samples"
            )
    planned = sum(stage.last - stage.first + 1 for stage in plan.stages) + len(plan.untrained)
    if planned > end:
        raise UpdateError("plan", f"the plan names {planned} units and does not cover the model's {end} once each")
    _check_units("untrained", plan.untrained, layout)
    if list(plan.untrained) != sorted(plan.untrained):  # the last of them tells whether the head is trained
        raise UpdateError("plan", f"untrained units {_listed(plan.untrained)} are not in order")
    named = sorted([*plan.trained_units, *plan.untrained])
    # Units that the model's author froze may come first, and are part of no plan.
    first = 0 if any(unit.tensors for unit in layout.units[: named[0]]) else named[0]
    if named != list(range(first, end)):
        raise UpdateError("plan", f"plan {_blocks(plan)} does not cover units {first} to {end - 1} once each")
    _check_numbers("plan", (plan.budget_bytes,), MOST_SIZE)
    if plan.predicted_peak_bytes > plan.budget_bytes:
        raise UpdateError(
            "plan",
            f"plan {_blocks(plan)} needs {plan.predicted_peak_bytes} bytes, its budget is {plan.budget_bytes}",
        )


def _check_units(what: str, units: Sequence[int], layout: ModelLayout) -> None:
    end = len(layout.units)
    if len(units) > end or len(set(units)) != len(units) or not all(0 <= unit < end for unit in units):
        raise UpdateError("plan", f"{what} units {_listed(units)} of a model with the units 0 to {end - 1}")


def _check_models(result: Result) -> None:
    """Several models are one block of all units each; one of them is the update."""
    plan = result.plan
    if not 1 <= plan.models <= MOST_MODELS or (plan.models > 1 and not plan.may_have_peers):
        raise UpdateError("plan", f"plan {_blocks(plan)} trains {plan.models} models")
    if odd := [stage.models for stage in result.stages if stage.models != plan.models]:
        raise UpdateError("plan", f"{plan.models} models were planned, a stage reports {odd[0]}")


def _check_trained(result: Result, layout: ModelLayout) -> None:
    _check_units("trained", result.trained_units, layout)
    if sorted(result.trained_units) != sorted(result.plan.trained_units):
        raise UpdateError(
            "plan", f"trained units {_listed(result.trained_units)} do not fit plan {_blocks(result.plan)}"
        )


def _check_stages(result: Result) -> None:
    planned = result.plan.stages
    if [(stage.first, stage.last) for stage in planned] != [(stage.first, stage.last) for stage in result.stages]:
        reported = ", ".join(f"{stage.first}-{stage.last}" for stage in result.stages[:20])
        raise UpdateError(
            "plan",
            f"{len(planned)} stages were planned, {_blocks(result.plan)}; {len(result.stages)} are reported, "
            f"{reported or 'none'}",
        )
    for stage in result.stages:
        _check_stage(stage)
    _check_numbers("the result", (result.baseline_bytes,), MOST_SIZE)
    _check_seconds("training", result.seconds)


def _check_stage(stage: StageResult) -> None:
    where = f"stage {stage.first}-{stage.last}"
    if not (math.isfinite(stage.loss_first) and math.isfinite(stage.loss_last)):
        raise UpdateError(
            "not_finite", f"{where} reports loss {stage.loss_first} to {stage.loss_last}; lower the learning rate"
        )
    sizes = (
        stage.predicted_peak_bytes,
        stage.rehearsed_peak_bytes,
        stage.measured_peak_bytes,
        stage.measured_anonymous_bytes,
        stage.budget_bytes,
    )
    _check_numbers(where, sizes, MOST_SIZE)
    _check_numbers(where, (stage.micro_batch, stage.steps, stage.samples_seen), MOST_COUNT)
    _check_seconds(where, stage.seconds)


def _check_numbers(what: str, numbers: Iterable[int], most: int) -> None:
    for number in numbers:
        if not 0 <= number <= most:
            raise UpdateError("plan", f"{what} reports {number}, allowed are 0 to {most}")


def _check_seconds(what: str, seconds: float) -> None:
    if not math.isfinite(seconds):
        raise UpdateError("not_finite", f"{what} took {seconds} seconds")
    if not 0 <= seconds <= MOST_SECONDS:
        raise UpdateError("plan", f"{what} took {seconds} seconds, allowed are 0 to {MOST_SECONDS}")


def _check_parts(result: Result, limit_parts: int, units: int) -> None:
    parts = result.parts
    if not 0 < len(parts) <= limit_parts:
        raise UpdateError("size", f"{len(parts)} parts for a model of {units} units, allowed are 1 to {limit_parts}")
    numbers = [part.part for part in parts]
    if len(set(numbers)) != len(numbers) or not all(0 <= number < limit_parts for number in numbers):
        raise UpdateError("size", f"parts {_listed(numbers)}, allowed are 0 to {limit_parts - 1}, each once")
    for part in parts:
        if not 0 < part.size_bytes <= MOST_SIZE:
            raise UpdateError("size", f"part {part.part} has {part.size_bytes} bytes, allowed are 1 to {MOST_SIZE}")
        if not _DIGEST.fullmatch(part.digest):
            raise UpdateError("digest", f"part {part.part}: {quoted(part.digest, 80)} is not a sha256 in hex")


def _holders(parts: Sequence[Path], expected: dict[str, TensorInfo]) -> dict[str, Reader]:
    from fedepth.weights import open_weights

    limit = _METADATA_BYTES + sum(_ENTRY_BYTES + _ESCAPE_BYTES * len(name) for name in expected)
    holders: dict[str, Reader] = {}
    for path in parts:
        try:
            reader = open_weights(path, limit)
        except StateError as error:
            raise UpdateError("size", str(error)) from error
        for name in reader.names:
            if name not in expected and name.endswith(SCALES) and name.removesuffix(SCALES) in expected:
                raise UpdateError("dtype", f"{path.name} holds int8 scales, {quoted(name, 80)}; {_OTHER_ENCODING}")
            if name not in expected:
                raise UpdateError(
                    "unknown_tensor", f"{path.name} holds {quoted(name, 80)}, which is not in the trained units"
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
        encoded = "F16" in (dtype, tensor.dtype) or "I8" in (dtype, tensor.dtype)
        hint = f"; {_OTHER_ENCODING}" if encoded else ""
        raise UpdateError("dtype", f"tensor {tensor.name} is of type {dtype}, the model's of {tensor.dtype}{hint}")
    if shape != tensor.shape:
        raise UpdateError("shape", f"tensor {tensor.name} has the shape {shape}, the model's {tensor.shape}")


def _check_values(reader: Reader, tensor: TensorInfo) -> None:
    try:
        for piece in reader.slices(tensor.name):
            _check_piece(piece, tensor)
    except StateError as error:
        raise UpdateError("size", str(error)) from error


def _check_piece(piece: Array, tensor: TensorInfo) -> None:
    import numpy as np

    name = tensor.name
    if tensor.dtype == "BOOL":
        if piece.view(np.uint8).max() > 1:
            raise UpdateError("range", f"tensor {name} holds booleans that are neither true nor false")
        return
    least, most = piece.min(), piece.max()  # NaN if there is one
    if tensor.dtype.startswith("F"):
        if not (np.isfinite(least) and np.isfinite(most)):
            raise UpdateError("not_finite", f"tensor {name} holds values that are not finite numbers")
        bound: float = MOST_FLOAT
    else:
        bound = MOST_INTEGER
    if name.endswith(SCALES):
        bound = LARGEST_SCALE
    if tensor.not_negative and least < 0:
        raise UpdateError("range", f"tensor {name} holds {least}, and no variance, counter or scale is below 0")
    if not -bound <= float(least) <= float(most) <= bound:
        raise UpdateError("range", f"tensor {name} holds values from {least} to {most}, allowed are ±{bound:g}")


def _blocks(plan: Plan) -> str:
    """Of a plan whose lengths have been checked."""
    text = plan.blocks
    return text if len(text) <= _QUOTED_PLAN else f"{text[:_QUOTED_PLAN]}…"


def _listed(numbers: Sequence[int]) -> str:
    return f"{list(numbers[:20])}" + (f" and {len(numbers) - 20} more" if len(numbers) > 20 else "")
