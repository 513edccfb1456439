"""Memory that others take in the middle of a stage shrinks its micro-batch, or makes it wait."""

from dataclasses import replace

import pytest

from fedepth.costs import ModelCosts, Size
from fedepth.estimate.peak import needed_bytes, training_step
from fedepth.plan import CachePlace, PeakComponents, Stage
from fedepth.task import TrainingSpec
from fedepth.training.pressure import fitting_micro_batch
from tests.unit_costs import unit_cost

MIB = 1 << 20
TRAINING = TrainingSpec(16, 1, "sgd", 0.1, 0.9, 0.0, 0.0, "none", 1)
UNIT = unit_cost(
    parameter_bytes=MIB,
    input_bytes=1000,
    output_bytes=1000,
    saved=Size(0, 4 * MIB),
    flops=10,
    exit_=unit_cost("exit", input_bytes=1000, flops=10),
)
COSTS = ModelCosts("m", (UNIT,), 1000, 250, 1)
STAGE = Stage(0, 0, 16, CachePlace.DISK, 16, PeakComponents(0, 0, 0, 0, 0, 0, 0))


def needed(micro_batch: int) -> int:
    peak = training_step(COSTS, TRAINING, 0, 0, micro_batch, accumulates=micro_batch < 16, cache_bytes=0).peak
    return needed_bytes(peak.total)


@pytest.mark.parametrize("micro_batch", [16, 8, 4, 2, 1])
def test_the_largest_half_that_fits_is_taken(micro_batch: int) -> None:
    assert fitting_micro_batch(COSTS, TRAINING, STAGE, 64, needed(micro_batch)) == micro_batch


def test_below_one_sample_nothing_fits() -> None:
    assert fitting_micro_batch(COSTS, TRAINING, STAGE, 64, needed(1) - 1) is None


def test_batch_norm_keeps_its_two_samples() -> None:
    costs = replace(COSTS, smallest_micro_batch=2)
    assert fitting_micro_batch(costs, TRAINING, STAGE, 64, needed(2) - 1) is None


def test_no_piece_of_an_odd_batch_is_too_small_for_batch_norm() -> None:
    costs, training = replace(COSTS, smallest_micro_batch=2), replace(TRAINING, batch=101)
    stage = replace(STAGE, micro_batch=101)
    enough_for = {
        size: needed_bytes(training_step(costs, training, 0, 0, size, accumulates=True, cache_bytes=0).peak.total)
        for size in (2, 3)
    }
    # Of 201 samples a step has 101 or 100: in twos, 101 would leave one alone.
    assert fitting_micro_batch(costs, training, stage, 201, enough_for[3]) == 3
    assert fitting_micro_batch(costs, training, stage, 201, enough_for[2]) is None


def test_it_never_grows_beyond_what_was_planned() -> None:
    assert fitting_micro_batch(COSTS, TRAINING, replace(STAGE, micro_batch=4), 64, 1 << 40) == 4
