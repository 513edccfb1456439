"""Coefficients are found again from stages that follow them, and stay where nothing was seen."""

from dataclasses import replace

import pytest

from fedepth.costs import Calibration, Convolution, ModelCosts, Size
from fedepth.estimate.fit import MeasuredStage, fit, predicted_bytes, relative_errors, with_kept
from fedepth.estimate.peak import may_keep_bytes
from fedepth.plan import CachePlace, PeakComponents, Stage
from fedepth.task import TrainingSpec
from tests.unit_costs import unit_cost

MIB = 1 << 20
START = Calibration("tcmalloc", "2.0", 2 * MIB, 0.03, 1.0, 100.0, 0.5)
TRUE = replace(START, fixed_bytes=3 * MIB, kept=0.0, kernel_share=2.0, depthwise_share=250.0, reordered_share=0.9)


def stage(parameters: int, activation: int, depthwise: int, micro_batch: int, true: Calibration) -> MeasuredStage:
    convolution = Convolution(parameters, depthwise, Size(0, activation), Size(0, 4 * activation))
    unit = unit_cost(
        parameter_bytes=parameters,
        input_bytes=activation,
        output_bytes=activation,
        saved=Size(0, 3 * activation),
        convolutions=(convolution,),
        exit_=unit_cost("exit", input_bytes=activation),
    )
    costs = ModelCosts("m", (unit,), activation, activation // 4, 1)
    training = TrainingSpec(16, 1, "sgd", 0.1, 0.9, 0.0, 0.0, "none", 1)
    planned = Stage(0, 0, micro_batch, CachePlace.DISK, 1, PeakComponents(0, 0, 0, 0, 0, 0, 0))
    empty = MeasuredStage(costs, training, planned, 16, 0)
    return replace(empty, measured_bytes=predicted_bytes(empty, true))


def many(true: Calibration) -> list[MeasuredStage]:
    return [
        stage(parameters * MIB, activation * 1000, depthwise, micro_batch, true)
        for parameters in (0, 1, 6)
        for activation in (10, 400)
        for depthwise in (0, 20_000)
        for micro_batch in (4, 16)
    ]


def test_what_stages_follow_is_found() -> None:
    found = fit(many(TRUE) * 50, START)
    assert found.fixed_bytes == pytest.approx(3 * MIB, rel=0.05)
    assert found.kernel_share == pytest.approx(2.0, rel=0.05)
    assert found.depthwise_share == pytest.approx(250, rel=0.1)
    assert max(map(abs, relative_errors(many(TRUE), found))) < 0.01
    assert max(map(abs, relative_errors(many(TRUE), START))) > 0.1
    assert (found.allocator, found.torch) == ("tcmalloc", "2.0")


def test_no_coefficient_becomes_negative() -> None:
    bare = replace(
        TRUE,
        fixed_bytes=0,
        kept=0.0,
        kernel_share=0.0,
        depthwise_share=0.0,
        reordered_share=0.0,
    )
    smaller = [replace(each, measured_bytes=int(0.9 * each.measured_bytes)) for each in many(bare)]
    found = fit(smaller, START)
    assert min(found.fixed_bytes, found.reordered_share, found.kernel_share, found.depthwise_share) >= 0


def test_what_was_not_seen_stays_as_it_was() -> None:
    one = stage(0, 400_000, 0, 16, TRUE)  # no weights, no convolutions
    found = fit([one], START)
    assert found.kernel_share == START.kernel_share
    assert found.depthwise_share == START.depthwise_share
    assert abs(relative_errors([one], found)[0]) < abs(relative_errors([one], START)[0])


def test_what_the_allocator_keeps_is_a_part_of_what_it_may() -> None:
    need = replace(START, kept=0.0)

    def peaks(*parts: float) -> list[tuple[int, int]]:
        return [
            (size * MIB, size * MIB + int(part * may_keep_bytes(size * MIB))) for size, part in enumerate(parts, 50)
        ]

    assert with_kept(need, peaks(0.8, 0.25, 0.45)).kept == pytest.approx(0.5, abs=1e-6)
    assert with_kept(need, peaks(0.8, 7.0, -3.0)).kept == pytest.approx(0.6, abs=1e-6)  # 1 and 0 are the ends
    assert with_kept(need, [(10 * MIB, 9 * MIB)]) == need  # nothing kept is nothing, not less
    assert with_kept(need, peaks(1.5)).kept == 1.0
