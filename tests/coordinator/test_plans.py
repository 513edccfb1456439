"""Plans that a fleet shares: one answer for all who ask the same, nothing in the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from coordinator.plans import Plans
from fedepth.costs import Calibration
from fedepth.errors import PlanError
from fedepth.models.traced import CostTables
from fedepth.plan import Plan, Policy
from fedepth.planning.planner import Planner
from fedepth.task import DeviceReport, TrainingSpec

TRAINING = TrainingSpec(8, 1, "sgd", 0.1, 0.9, 0.0, 0.0, "none", 1)
MIB = 1 << 20


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
