"""Plans that a fleet shares: rounded questions, one answer for all who ask the same, nothing in the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.plans import Plans, rounded_budget, rounded_samples
from fedepth.costs import Calibration, ModelCosts
from fedepth.errors import PlanError
from fedepth.estimate.peak import batches_per_epoch, effective_batch
from fedepth.models.traced import CostTables
from fedepth.plan import Plan, Policy
from fedepth.planning.planner import Planner
from fedepth.task import DeviceReport, TrainingSpec
from tests.unit_costs import model_costs, unit_cost

TRAINING = TrainingSpec(8, 1, "sgd", 0.1, 0.9, 0.0, 0.0, "none", 1)
MIB = 1 << 20


@given(st.integers(0, 1 << 50))
def test_a_budget_loses_at_most_one_percent(budget: int) -> None:
    assert 0.99 * budget <= rounded_budget(budget) <= budget


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


class Counted:
    """The planner, which counts its plans and tells where they are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.budgets: list[int] = []
        self.threads: set[int] = set()
        plan: Callable[[Planner, int], Plan] = Planner.plan

        def counted(planner: Planner, budget_bytes: int) -> Plan:
            self.budgets.append(budget_bytes)
            self.threads.add(threading.get_ident())
            return plan(planner, budget_bytes)

        monkeypatch.setattr(Planner, "plan", counted)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def test_many_who_ask_the_same_at_once_get_one_plan_from_another_thread(counted: Counted, kit: Any) -> None:
    async def main() -> None:
        plans = Plans(CostTables(kit.costs), Policy.AUTO)
        reports = [kit.report(f"d{number}", budget_bytes=100 * MIB + number) for number in range(50)]
        found = await asyncio.gather(*(plans.plan(report, TRAINING) for report in reports))
        assert set(found) == {found[0]}
        assert found[0].budget_bytes <= 100 * MIB
        # Rounds differ in learning rate and seed.
        assert await plans.plan(reports[0], replace(TRAINING, learning_rate=0.01, seed=9)) == found[0]

    asyncio.run(main())
    assert len(counted.budgets) == 1
    assert counted.threads.isdisjoint({threading.get_ident()})


@pytest.mark.parametrize(
    "other",
    [
        lambda report: (replace(report, sample_count=500), TRAINING),
        lambda report: (replace(report, calibration=Calibration(fixed_bytes=7)), TRAINING),
        lambda report: (report, replace(TRAINING, optimizer="adamw")),
        lambda report: (report, replace(TRAINING, batch=4)),
    ],
    ids=["samples", "calibration", "optimizer", "batch"],
)
def test_whatever_changes_a_plan_is_another_question(
    counted: Counted, kit: Any, other: Callable[[DeviceReport], tuple[DeviceReport, TrainingSpec]]
) -> None:
    async def main() -> None:
        plans = Plans(CostTables(kit.costs), Policy.AUTO)
        report = kit.report("a")
        await plans.plan(report, TRAINING)
        await plans.plan(*other(report))

    asyncio.run(main())
    assert len(counted.budgets) == 2


def test_that_nothing_fits_is_an_answer_too(counted: Counted, kit: Any) -> None:
    async def main() -> None:
        plans = Plans(CostTables(kit.costs), Policy.AUTO)
        for _ in range(2):
            with pytest.raises(PlanError, match="the smallest plan needs") as caught:
                await plans.plan(kit.report("a", budget_bytes=1000), TRAINING)
            assert caught.value.needed_bytes > 1000

    asyncio.run(main())
    assert len(counted.budgets) == 1


def test_a_device_that_hangs_up_takes_nobodys_answer_with_it(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    plan: Callable[[Planner, int], Plan] = Planner.plan

    def held(planner: Planner, budget_bytes: int) -> Plan:
        assert go_on.wait(10)
        return plan(planner, budget_bytes)

    monkeypatch.setattr(Planner, "plan", held)

    async def main() -> None:
        plans = Plans(CostTables(kit.costs), Policy.AUTO)
        first, second = (asyncio.ensure_future(plans.plan(kit.report(name), TRAINING)) for name in "ab")
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait({first})
        go_on.set()
        assert (await second).stages
        assert first.cancelled()

    asyncio.run(main())
