"""The plans of a fleet: made outside the event loop, once for all devices that are alike (fedepth.planning.shared)."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from fedepth.errors import PlanError
from fedepth.models.traced import CostTables
from fedepth.plan import Plan, Policy
from fedepth.planning.shared import Question, SharedPlanner, question
from fedepth.task import DeviceReport, TrainingSpec

KEPT_PLANS = 4096


class Plans:
    """Plans by question, for one job. To be asked in one event loop."""

    def __init__(self, tables: CostTables, policy: Policy) -> None:
        self._tables = tables
        # One thread: planning is pure Python, of which only one runs at a time.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="planner")
        self._planner = SharedPlanner(tables, policy)
        self._answers: OrderedDict[Question, asyncio.Future[Plan | PlanError]] = OrderedDict()

    async def plan(self, report: DeviceReport, training: TrainingSpec) -> Plan:
        """The plan of a device. Whoever asks the same meanwhile waits for the same answer.

        Raises:
            PlanError: nothing fits its budget.
        """
        asked = question(
            self._tables.of(training), report.calibration, training, report.sample_count, report.budget.budget_bytes
        )
        answer = self._answers.get(asked)
        if answer is None:
            answer = asyncio.get_running_loop().run_in_executor(self._thread, self._planner.answer, asked)
            self._answers[asked] = answer
            if len(self._answers) > KEPT_PLANS:
                self._answers.popitem(last=False)
        else:
            self._answers.move_to_end(asked)
        try:
            found = await asyncio.shield(answer)  # a device that hangs up takes nobody's answer with it
        except Exception:
            self._answers.pop(asked, None)  # a mistake, and no answer to give again
            raise
        if isinstance(found, PlanError):
            raise PlanError(str(found), needed_bytes=found.needed_bytes, budget_bytes=found.budget_bytes)
        return found

    def close(self) -> None:
        """Lets the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)
