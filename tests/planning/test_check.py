"""Plans that came from elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedepth.costs import ModelCosts
from fedepth.errors import PlanError
from fedepth.plan import CachePlace, PeakComponents, Plan, Policy, Stage
from fedepth.planning.check import check_plan
from tests.unit_costs import unit_cost

EXIT = unit_cost("exit", parameter_bytes=4)
INSIDE, LAST = unit_cost("inside", exit_=None), unit_cost("last", exit_=EXIT)
COSTS = ModelCosts("toy", (LAST, INSIDE, LAST), 4, 1, 1)
NOTHING = PeakComponents(0, 0, 0, 0, 0, 0, 0)


def plan(first: int, last: int, **more: object) -> Plan:
    stage = Stage(first, last, 1, CachePlace.RAM, 1, NOTHING)
    return Plan((replace(stage, **more),), (), Policy.PAPER, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("good", [plan(0, 0), plan(0, 2), plan(2, 2)])
def test_a_block_may_end_where_there_is_an_exit(good: Plan) -> None:
    check_plan(COSTS, good)


@pytest.mark.parametrize(
    "bad",
    [
        plan(0, 1),
        plan(0, 3),
        plan(2, 1),
        plan(-1, 0),
        plan(0, 0, micro_batch=0),
        plan(0, 0, build_batch=0),
        plan(0, 0, frozen_suffix=True),  # its units were not traced frozen
        Plan((), (), Policy.PAPER, 1),
        Plan((*plan(0, 0).stages, *plan(0, 2).stages), (), Policy.PAPER, 1),
        Plan((*plan(2, 2).stages, *plan(0, 0).stages), (), Policy.PAPER, 1),
    ],
)
def test_anything_else_is_refused(bad: Plan) -> None:
    with pytest.raises(PlanError, match="cannot be trained in"):
        check_plan(COSTS, bad)
