"""The plans of a fleet: made outside the event loop, once for all devices that are alike.

Devices poll for hours, and their free memory differs by a little each time. Budgets are therefore rounded down, and
numbers of samples up, in steps that cost at most 1 %: what fits then fits before. What changes from round to round
without a word in any plan, the learning rate and the seed, is no part of the question.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

from fedepth.costs import Calibration, ModelCosts
from fedepth.errors import PlanError
from fedepth.models.traced import CostTables
from fedepth.plan import Plan, Policy
from fedepth.planning.planner import Planner
from fedepth.task import DeviceReport, TrainingSpec

KEPT_PLANS = 4096
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


@dataclass(frozen=True)
class _Question:
    """All that a plan depends on, rounded."""

    calibration: Calibration
    training: TrainingSpec
    sample_count: int
    budget_bytes: int


class Plans:
    """Plans by question, for one job. To be asked in one event loop."""

    def __init__(self, tables: CostTables, policy: Policy) -> None:
        self._tables = tables
        self._policy = policy
        # One thread: planning is pure Python, of which only one runs at a time.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="planner")
        self._planner = lru_cache(maxsize=KEPT_PLANNERS)(self._new_planner)
        self._answers: OrderedDict[_Question, asyncio.Future[Plan | PlanError]] = OrderedDict()

    async def plan(self, report: DeviceReport, training: TrainingSpec) -> Plan:
        """The plan of a device. Whoever asks the same meanwhile waits for the same answer.

        Raises:
            PlanError: nothing fits its budget.
        """
        training = replace(training, learning_rate=0.0, seed=0)
        question = _Question(
            report.calibration,
            training,
            rounded_samples(self._tables.of(training), training, report.sample_count),
            rounded_budget(report.budget.budget_bytes),
        )
        answer = self._answers.get(question)
        if answer is None:
            answer = asyncio.get_running_loop().run_in_executor(self._thread, self._answer, question)
            self._answers[question] = answer
            if len(self._answers) > KEPT_PLANS:
                self._answers.popitem(last=False)
        else:
            self._answers.move_to_end(question)
        try:
            found = await asyncio.shield(answer)  # a device that hangs up takes nobody's answer with it
        except Exception:
            self._answers.pop(question, None)  # a mistake, and no answer to give again
            raise
        if isinstance(found, PlanError):
            raise PlanError(str(found), needed_bytes=found.needed_bytes, budget_bytes=found.budget_bytes)
        return found

    def close(self) -> None:
        """Lets the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _answer(self, question: _Question) -> Plan | PlanError:
        try:
            planner = self._planner(question.calibration, question.training, question.sample_count)
            return planner.plan(question.budget_bytes)
        except PlanError as error:
            return error

    def _new_planner(self, calibration: Calibration, training: TrainingSpec, sample_count: int) -> Planner:
        costs = replace(self._tables.of(training), calibration=calibration)
        return Planner(costs, training, sample_count, self._policy)
