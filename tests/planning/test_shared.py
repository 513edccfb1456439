"""Plans that devices share which are alike: rounded questions."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from fedepth.costs import ModelCosts
from fedepth.estimate.peak import batches_per_epoch, effective_batch
from fedepth.planning.shared import kept_budget, rounded_budget, rounded_samples
from fedepth.task import TrainingSpec
from tests.unit_costs import model_costs, unit_cost

TRAINING = TrainingSpec(8, 1, "sgd", 0.1, 0.9, 0.0, 0.0, "none", 1)
MIB = 1 << 20


@given(st.integers(0, 1 << 50))
def test_a_budget_loses_at_most_one_percent(budget: int) -> None:
    assert 0.99 * budget <= rounded_budget(budget) <= budget


@given(st.integers(0, 1 << 50))
def test_a_kept_budget_is_the_next_that_is_not_rounded(budget: int) -> None:
    kept = kept_budget(budget)
    assert budget <= kept <= 1.01 * budget
    assert rounded_budget(kept) == kept
    assert kept == budget or rounded_budget(kept - 1) < budget


def test_a_fleet_has_few_budgets() -> None:
    assert len({rounded_budget(budget) for budget in range(100 * MIB, 200 * MIB, 10_007)}) == 128


@given(st.integers(1, 1 << 30), st.integers(1, 4096))
def test_samples_grow_by_at_most_one_percent_and_never_make_a_step_smaller(count: int, batch: int) -> None:
    costs, training = _costs(1), replace(TRAINING, batch=batch)
    rounded = rounded_samples(costs, training, count)
    assert count <= rounded <= 1.01 * count
    assert batches_per_epoch(costs, training, rounded) == batches_per_epoch(costs, training, count)
    assert effective_batch(costs, training, rounded) >= effective_batch(costs, training, count)


def test_samples_stay_where_batch_norm_cannot_take_single_ones() -> None:
    assert rounded_samples(_costs(2), replace(TRAINING, batch=400), 301) == 301


def _costs(smallest_micro_batch: int) -> ModelCosts:
    costs = model_costs(unit_cost(exit_=unit_cost()), input_bytes=1, raw_input_bytes=1)
    return replace(costs, smallest_micro_batch=smallest_micro_batch)
