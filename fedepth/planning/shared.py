"""Plans that devices share which are alike, in a fleet or in a simulation of one.

Devices poll for hours, and their free memory differs by a little each time. Budgets are therefore rounded down, and
numbers of samples up, in steps that cost at most 1 %: what fits then fits before. What changes from round to round
without a word in any plan, the learning rate and the seed, is no part of the question.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from fedepth.costs import Calibration, ModelCosts
from fedepth.errors import PlanError
from fedepth.models.traced import CostTables
from fedepth.plan import Plan, Policy
from fedepth.planning.planner import Planner
from fedepth.task import TrainingSpec

KEPT_PLANNERS = 8  # each remembers what it found out about blocks, some MiB for a hundred units
_LEADING_BITS = 8  # a number that keeps so many loses less than 1 / 128


def rounded_budget(budget_bytes: int) -> int:
    """The budget, less than 1 % smaller."""
    shift = max(0, budget_bytes.bit_length() - _LEADING_BITS)
    return budget_bytes >> shift << shift


def rounded_samples(costs: ModelCosts, training: TrainingSpec, sample_count: int) -> int:
    """The number of samples, less than 1 % larger, and with as many optimizer steps an epoch.

    More steps would be smaller ones, for which a plan could be too large. Where BatchNorm cannot take single samples,
    which micro-batches are allowed depends on the very number, and it stays.
    """
    if costs.smallest_micro_batch > 1:
        return sample_count
    shift = max(0, sample_count.bit_length() - _LEADING_BITS)
    steps = -(-sample_count // training.batch)
    return min(-(-sample_count >> shift) << shift, steps * training.batch)


def kept_budget(budget_bytes: int) -> int:
    """The smallest budget from this one on that `rounded_budget` leaves as it is."""
    shift = max(0, budget_bytes.bit_length() - _LEADING_BITS)
    return -(-budget_bytes >> shift) << shift


@dataclass(frozen=True)
class Question:
    """All that a plan depends on, rounded."""

    calibration: Calibration
    training: TrainingSpec
    sample_count: int
    budget_bytes: int


def question(
    costs: ModelCosts, calibration: Calibration, training: TrainingSpec, sample_count: int, budget_bytes: int
) -> Question:
    """What is asked for a device with this budget and so many samples."""
    return Question(
        calibration,
        replace(training, learning_rate=0.0, seed=0),
        rounded_samples(costs, training, sample_count),
        rounded_budget(budget_bytes),
    )


class SharedPlanner:
    """Answers questions about one model; what it finds out for one is of use to those that differ in the budget."""

    def __init__(self, tables: CostTables, policy: Policy) -> None:
        self._tables = tables
        self._policy = policy
        self._planner = lru_cache(maxsize=KEPT_PLANNERS)(self._new_planner)

    def answer(self, question: Question) -> Plan | PlanError:
        """The plan, or why there is none: an answer to be kept, like any other."""
        try:
            planner = self._planner(question.calibration, question.training, question.sample_count)
            return planner.plan(question.budget_bytes)
        except PlanError as error:
            return error

    def _new_planner(self, calibration: Calibration, training: TrainingSpec, sample_count: int) -> Planner:
        costs = replace(self._tables.of(training), calibration=calibration)
        return Planner(costs, training, sample_count, self._policy)
