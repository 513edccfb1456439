"""Fitting a device's calibration to stages that were measured on it. Pure arithmetic; no torch, no numpy.

What an allocator keeps of freed memory is told apart from what a stage needs: a rehearsal, in which nothing is kept,
gives the need, to which the other coefficients are fitted.

A stage's peak is the largest of its moments, and at each of them linear in the calibration's coefficients. So the fit
alternates: which moment is the worst under the coefficients so far, and which coefficients, none negative, bring these
moments closest to what was measured, in relative terms. Few stages cannot tell all coefficients apart; each is drawn a
little towards its default, so that what was not seen stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedepth.costs import Calibration, ModelCosts
from fedepth.estimate.peak import effective_batch, may_keep_bytes, training_step
from fedepth.plan import PeakComponents, Stage
from fedepth.task import TrainingSpec

# What each coefficient is counted in, so that all are of the size of 1 and are drawn to their defaults alike.
_UNITS = {
    "fixed_bytes": 1 << 20,
    "kernel_share": 1.0,
    "depthwise_share": 100.0,
    "reordered_share": 1.0,
}
_PULL = 0.01  # weight of a default beside the squared relative error of one stage
_ROUNDS = 20
_SWEEPS = 200


@dataclass(frozen=True)
class MeasuredStage:
    """A stage, and its peak in bytes above the baseline with freed pages released at once. Its inputs lay on disk."""

    costs: ModelCosts
    training: TrainingSpec
    stage: Stage
    sample_count: int
    measured_bytes: int


def fit(measured: Sequence[MeasuredStage], start: Calibration) -> Calibration:
    """The calibration that predicts these stages best, starting from, and drawn towards, `start`; as if nothing were
    kept."""
    start = found = replace(start, kept=0.0)
    for _ in range(_ROUNDS):
        before = found
        rows = [_worst(each, found) for each in measured]
        found = _coefficients(rows, start)
        if found == before:
            break
    return found


def with_kept(need: Calibration, peaks: Sequence[tuple[int, int]]) -> Calibration:
    """Adds what the allocator keeps, as the mean part of what it may: half a dozen parts scatter, and a median jumps.

    Args:
        need: the calibration as if nothing were kept.
        peaks: (need, peak in training) of plans, in bytes.
    """
    parts = [min(1.0, max(0.0, (peak - each) / may_keep_bytes(each))) for each, peak in peaks]
    return replace(need, kept=math.fsum(parts) / len(parts))


def relative_errors(measured: Sequence[MeasuredStage], calibration: Calibration) -> list[float]:
    """(predicted − measured) / measured of every stage."""
    return [predicted_bytes(each, calibration) / each.measured_bytes - 1 for each in measured]


def predicted_bytes(each: MeasuredStage, calibration: Calibration) -> int:
    return max(components.total for _, components in _moments(each, calibration))


@dataclass(frozen=True)
class _Row:
    """One stage at its worst moment: measured − tensors = Σ feature · coefficient, all over measured."""

    features: dict[str, float]
    target: float


def _moments(each: MeasuredStage, calibration: Calibration) -> tuple[tuple[str, PeakComponents], ...]:
    stage = each.stage
    return training_step(
        replace(each.costs, calibration=calibration),
        each.training,
        stage.first,
        stage.last,
        stage.micro_batch,
        accumulates=stage.micro_batch < effective_batch(each.costs, each.training, each.sample_count),
        cache_bytes=0,
        checkpoint=stage.checkpoint,
        frozen_suffix=stage.frozen_suffix,
    ).moments


def _worst(each: MeasuredStage, calibration: Calibration) -> _Row:
    """Each coefficient's part in the worst moment is what the moment grows by when the coefficient grows by a unit."""
    with_all = [components.total for _, components in _moments(each, calibration)]
    worst = with_all.index(max(with_all))
    nothing = _with(calibration, dict.fromkeys(_UNITS, 0.0))
    tensors = _moments(each, nothing)[worst][1].total
    features = {}
    for name in _UNITS:
        alone = _moments(each, _with(nothing, {name: 1.0}))[worst][1].total
        features[name] = (alone - tensors) / each.measured_bytes
    return _Row(features, (each.measured_bytes - tensors) / each.measured_bytes)


def _coefficients(rows: Sequence[_Row], start: Calibration) -> Calibration:
    """Least squares by coordinate descent, no coefficient below 0."""
    defaults = {name: getattr(start, name) / unit for name, unit in _UNITS.items()}
    values = dict(defaults)
    for _ in range(_SWEEPS):
        for name in _UNITS:
            above = _PULL * defaults[name]
            below = _PULL
            for row in rows:
                others = sum(row.features[other] * values[other] for other in _UNITS if other != name)
                above += row.features[name] * (row.target - others)
                below += row.features[name] ** 2
            values[name] = max(0.0, above / below)
    return _with(start, values)


def _with(calibration: Calibration, values: Mapping[str, float]) -> Calibration:
    """`values` are counted in _UNITS; those that are not named stay."""
    scaled: dict[str, Any] = {
        name: round(value * unit) if isinstance(unit := _UNITS[name], int) else value * unit
        for name, value in values.items()
    }
    return replace(calibration, **scaled)
