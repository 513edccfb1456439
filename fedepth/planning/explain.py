"""Why a plan is what it is: what a coarser one would need, and what more or less memory would buy. Pure; no torch.

The planner is asked again at other budgets. That takes few questions, because more memory never gives a worse plan
and a plan stays the best one down to the budget that it needs itself: one answer holds for a whole range of budgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from fedepth.costs import ModelCosts
from fedepth.errors import PlanError
from fedepth.estimate.peak import needed_bytes
from fedepth.plan import Ending, Plan, Policy
from fedepth.planning.planner import Planner, estimated_work, full_training_peak
from fedepth.task import TrainingSpec

CLEARLY_LESS = 0.9  # of the estimated work; finer differences are within what the estimate can tell
_UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Alternative:
    """Another budget and what it gives.

    Attributes:
        budget_bytes: the budget.
        plan: the plan that it gives.
        work: estimated floating point operations of that plan in one round. Comparable only between plans of one job
            that train the same units.
    """

    budget_bytes: int
    plan: Plan
    work: float


@dataclass(frozen=True)
class Explanation:
    """A plan among its neighbours.

    Attributes:
        plan: the plan for the budget.
        work: estimated floating point operations of it in one round.
        full_training_bytes: the budget that training all units at once with the job's batch in one piece needs.
        coarser: plans that train every unit, in fewer stages if the chosen one does so too: each at the smallest
            budget that gives it, the number of stages falling to one. A number that no budget gives is left out.
        larger: the smallest larger budget with a better plan: without a frozen suffix, then fewer units untrained, then
            fewer stages, then more models, then clearly less work; None where no amount of memory gives one.
        least_bytes: the smallest budget whose plan is as good.
        smaller: the largest budget with a worse plan, one byte less than that; None where nothing fits.
    """

    plan: Plan
    work: float
    full_training_bytes: int
    coarser: tuple[Alternative, ...]
    larger: Alternative | None
    least_bytes: int
    smaller: Alternative | None


def explain(
    costs: ModelCosts, *, budget_bytes: int, training: TrainingSpec, sample_count: int, policy: Policy
) -> Explanation:
    """The plan for a budget, with what it would take to get another one; arguments as for `make_plan`.

    Raises:
        PlanError: not even one unit can be trained; carries what the smallest plan needs.
    """
    planner = _Answers(costs, training, sample_count, policy)
    plan = planner.plan(budget_bytes)
    most = planner.ask(_UNLIMITED) or plan  # where any plan fits, one fits there
    work = planner.work(plan)

    def better(other: Plan) -> bool:
        return _better(planner.alternative(0, other), planner.alternative(0, plan))

    def as_good(other: Plan) -> bool:
        return not _better(planner.alternative(0, plan), planner.alternative(0, other))

    def in_at_most(stages: int) -> Callable[[Plan], bool]:
        return lambda other: _rank(other)[:3] <= (Ending.LAST_UNIT, 0, stages)

    coarser: list[Alternative] = []
    stages = len(costs.units) if plan.untrained else len(plan.stages) - 1
    while stages:
        coarser.append(planner.smallest(in_at_most(stages)))
        stages = len(coarser[-1].plan.stages) - 1
    least = planner.smallest(as_good).budget_bytes
    worse = planner.ask(least - 1)
    return Explanation(
        plan=plan,
        work=work,
        full_training_bytes=needed_bytes(full_training_peak(costs, training, sample_count).total),
        coarser=tuple(coarser),
        larger=planner.smallest(better) if better(most) else None,
        least_bytes=least,
        smaller=planner.alternative(least - 1, worse) if worse else None,
    )


def ladder(
    costs: ModelCosts, *, most_bytes: int, training: TrainingSpec, sample_count: int, policy: Policy, count: int
) -> tuple[Alternative, ...]:
    """At most `count` budgets to compare, ascending, each the smallest one that gives its plan.

    They lie in about equal proportions between what the smallest plan needs and what full training needs, or
    `most_bytes` where that is less; each is clearly better than the one before, except for the last one, which is the
    best there is. Other arguments as for `make_plan`.

    Raises:
        PlanError: nothing fits into `most_bytes`; carries what the smallest plan needs.
    """
    full_bytes = needed_bytes(full_training_peak(costs, training, sample_count).total)
    planner = _Answers(costs, training, sample_count, policy)
    least_bytes = planner.least_bytes
    top_bytes = min(most_bytes, max(full_bytes, least_bytes))
    planner.plan(top_bytes)  # raises where even the smallest plan is too large
    rungs: list[Alternative] = []
    for step in range(count):
        share = step / (count - 1) if count > 1 else 1.0
        # Exactly the top at the end, whatever a power's rounding would make of it.
        wanted_bytes = top_bytes if share == 1.0 else math.ceil(least_bytes * (top_bytes / least_bytes) ** share)
        plan = planner.ask(wanted_bytes)
        if plan is None:
            continue
        rung = planner.alternative(needed_bytes(plan.predicted_peak_bytes), plan)
        if not rungs or (share == 1.0 and rung.budget_bytes > rungs[-1].budget_bytes) or _better(rung, rungs[-1]):
            rungs.append(rung)
    return tuple(rungs)


def _better(other: Alternative, than: Alternative) -> bool:
    """A better rank, or else clearly less work."""
    if _rank(other.plan) != _rank(than.plan):
        return _rank(other.plan) < _rank(than.plan)
    return other.work < CLEARLY_LESS * than.work


def _rank(plan: Plan) -> tuple[Ending, int, int, int]:
    """What the planner looks at before the time: where the last block leads, then units left untrained, then stages,
    then models, of which more are better."""
    return plan.ending, len(plan.untrained), len(plan.stages), -plan.models


@dataclass(frozen=True)
class _Answer:
    """The best plan for every budget from `least_bytes` to `most_bytes`, both included."""

    least_bytes: int
    most_bytes: int
    plan: Plan | None


class _Answers:
    """The planner for one job, with a memory for its answers."""

    def __init__(self, costs: ModelCosts, training: TrainingSpec, sample_count: int, policy: Policy) -> None:
        self._planner = Planner(costs, training, sample_count, policy)
        self._work = partial(estimated_work, costs, training, sample_count)
        self._answers: list[_Answer] = []

    @property
    def least_bytes(self) -> int:
        """The smallest budget for which there is a plan."""
        return self._planner.least_bytes()

    def plan(self, budget_bytes: int) -> Plan:
        """The best plan.

        Raises:
            PlanError: there is none.
        """
        plan = self._planner.plan(budget_bytes)
        self._answers.append(_Answer(needed_bytes(plan.predicted_peak_bytes), budget_bytes, plan))
        return plan

    def ask(self, budget_bytes: int) -> Plan | None:
        """The best plan; its `budget_bytes` may be a larger one that gives the same."""
        for answer in self._answers:
            if answer.least_bytes <= budget_bytes <= answer.most_bytes:
                return answer.plan
        try:
            return self.plan(budget_bytes)
        except PlanError:
            self._answers.append(_Answer(0, budget_bytes, None))
            return None

    def alternative(self, budget_bytes: int, plan: Plan) -> Alternative:
        return Alternative(budget_bytes, replace(plan, budget_bytes=budget_bytes), self.work(plan))

    def work(self, plan: Plan) -> float:
        return self._work(plan)

    def smallest(self, wanted: Callable[[Plan], bool]) -> Alternative:
        """The smallest budget whose plan is wanted; a known one is, and with more memory it stays so."""
        self.ask(0)
        halve = True
        while True:
            good = [(known.least_bytes, known.plan) for known in self._answers if known.plan and wanted(known.plan)]
            bad = [known.most_bytes for known in self._answers if not (known.plan and wanted(known.plan))]
            least, plan = min(good, key=lambda each: each[0])
            if least - max(bad) <= 1:
                return self.alternative(least, plan)
            # One byte below a wanted plan lies either the end of the search or the next wanted plan.
            self.ask((max(bad) + least) // 2 if halve else least - 1)
            halve = not halve
