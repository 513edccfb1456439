"""What other budgets buy: thresholds worked out by hand, and that they are exact to the byte."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedepth.costs import Calibration, ModelCosts, Size, UnitCost
from fedepth.errors import PlanError
from fedepth.estimate.peak import needed_bytes
from fedepth.plan import Ending, Policy
from fedepth.planning.explain import CLEARLY_LESS, Explanation, explain
from fedepth.planning.planner import estimated_work, full_training_peak, make_plan, smallest_peak
from fedepth.task import TrainingSpec
from tests.drawn_costs import models
from tests.unit_costs import unit_cost

KIB = 1024
MIB = KIB * KIB
TRAINING = TrainingSpec(8, 1, "sgd", 0.1, 0.9, 0.0, 0.0, "none", 1)
BARE = Calibration(fixed_bytes=0, kept=0.0, kernel_share=0.0, depthwise_share=0.0, reordered_share=0.0)


def unit(name: str, saved: int, flops: int = 10**9) -> UnitCost:
    """A unit without weights that keeps its input of 10 KiB and `saved` bytes of every sample."""
    return unit_cost(name, input_bytes=10 * KIB, output_bytes=10 * KIB, saved=Size(0, saved), flops=flops)


def model(*saved_kib: int) -> ModelCosts:
    exit_ = replace(unit("exit", 0), output_bytes=0)
    units = tuple(replace(unit(f"u{index}", kib * KIB), exit=exit_) for index, kib in enumerate(saved_kib))
    return ModelCosts("hand", units, 10 * KIB, 2 * KIB, 1, BARE)


def block_needs(*saved_kib: int) -> int:
    """The budget for a block of these units with 8 samples a step and its inputs on disk: the first unit's input, and
    of every unit what it saves and its output."""
    return needed_bytes((80 + sum(8 * kib + 80 for kib in saved_kib)) * KIB)


def explained(costs: ModelCosts, budget: int, policy: Policy = Policy.PAPER, samples: int = 16) -> Explanation:
    return explain(costs, budget_bytes=budget, training=TRAINING, sample_count=samples, policy=policy)


def test_every_smaller_number_of_stages_with_the_smallest_budget_that_gives_it() -> None:
    costs = model(1000, 1000, 1000, 1000)
    found = explained(costs, block_needs(1000) + 9)
    assert len(found.plan.stages) == 4
    # Three stages need as much as two: a block of two units.
    assert [(each.budget_bytes, each.plan.blocks) for each in found.coarser] == [
        (block_needs(1000, 1000), "0-1 | 2-3"),
        (block_needs(1000, 1000, 1000, 1000), "0-3"),
    ]
    assert found.full_training_bytes == block_needs(1000, 1000, 1000, 1000)


def test_the_next_larger_and_the_next_smaller_budget() -> None:
    costs = model(1000, 1000, 1000, 1000)
    found = explained(costs, 21 * MIB)
    assert found.plan.blocks == "0-1 | 2-3"
    assert found.larger is not None
    assert (found.larger.budget_bytes, found.larger.plan.blocks) == (block_needs(*[1000] * 4), "0-3")
    assert found.smaller is not None
    assert found.least_bytes == block_needs(1000, 1000)
    assert (found.smaller.budget_bytes, found.smaller.plan.blocks) == (found.least_bytes - 1, "0 | 1 | 2 | 3")
    for each in (found.larger, found.smaller, *found.coarser):
        assert each.plan.budget_bytes == each.budget_bytes


def test_below_the_smallest_plan_there_is_none() -> None:
    found = explained(model(1000, 1000), block_needs(1000))
    assert (found.least_bytes, found.smaller) == (block_needs(1000), None)


def test_more_memory_than_helps_buys_nothing() -> None:
    found = explained(model(1000, 1000), 1 << 40)
    assert found.larger is None
    assert found.coarser == ()


def test_a_unit_that_is_left_out_comes_first() -> None:
    found = explained(model(9000, 1000), block_needs(1000))
    assert found.plan.blocks == "1 (untrained: 0)"
    assert found.larger is not None
    assert (found.larger.budget_bytes, found.larger.plan.blocks) == (block_needs(9000), "0 | 1")
    assert [each.plan.blocks for each in found.coarser] == ["0 | 1", "0-1"]


def test_micro_batches_buy_time() -> None:
    # One sample at a time takes (1 + 2/1) times the arithmetic, two (1 + 2/2): a third less.
    least = needed_bytes((10 + 2 * 1010) * KIB)
    found = explained(model(1000, 1000), least, Policy.AUTO)
    (stage,) = found.plan.stages
    assert (stage.micro_batch, stage.checkpoint) == (1, False)
    assert found.larger is not None
    assert found.larger.work < CLEARLY_LESS * found.work
    assert found.larger.budget_bytes < needed_bytes((20 + 4 * 1010) * KIB) + 1
    assert found.coarser == ()
    assert found.full_training_bytes == block_needs(1000, 1000)


def test_nothing_fits() -> None:
    with pytest.raises(PlanError, match="the smallest plan needs"):
        explained(model(1000), 1)


@settings(max_examples=60, deadline=None)
@given(models(Calibration()), st.floats(0, 1.1), st.sampled_from(Policy))
def test_thresholds_are_exact_to_the_byte(costs: ModelCosts, share: float, policy: Policy) -> None:
    def key(bytes_: int) -> tuple[int, float, int, float]:
        try:
            plan = make_plan(costs, budget_bytes=bytes_, training=TRAINING, sample_count=20, policy=policy)
        except PlanError:
            return (len(Ending), 0, 0, 0.0)
        rank = plan.ending, len(plan.untrained), len(plan.stages)
        return (*rank, estimated_work(costs, TRAINING, 20, plan))

    def better(one: tuple[int, float, int, float], other: tuple[int, float, int, float]) -> bool:
        return one[:3] < other[:3] or (one[:3] == other[:3] and one[3] < CLEARLY_LESS * other[3])

    least = smallest_peak(costs, TRAINING, 20, policy)
    budget = least + int(share * max(0, needed_bytes(full_training_peak(costs, TRAINING, 20).total) - least))
    chosen = key(budget)
    found = explained(costs, budget, policy, samples=20)
    assert found.work == chosen[3]
    if found.larger:
        assert found.larger.budget_bytes > budget
        assert better(key(found.larger.budget_bytes), chosen)
        assert not better(key(found.larger.budget_bytes - 1), chosen)
    else:
        assert not better(key(1 << 50), chosen)
    assert found.least_bytes <= budget
    assert not better(chosen, key(found.least_bytes))
    assert better(chosen, key(found.least_bytes - 1))
    assert (found.smaller is None) == (key(found.least_bytes - 1)[0] == len(Ending))
    for each in found.coarser:
        assert key(each.budget_bytes) == (Ending.LAST_UNIT, 0, len(each.plan.stages), each.work)
        assert key(each.budget_bytes - 1)[:3] > (Ending.LAST_UNIT, 0, len(each.plan.stages))
    assert found.coarser or chosen[:3] == (Ending.LAST_UNIT, 0, 1)
