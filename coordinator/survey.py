"""Before the first task: devices are asked what their rows have in the columns of the job's table.

Each that calls tells counts, means and sums of squares of its own rows (fedepth.data.column_sums), nothing else. Once
as many have as one round takes, and nobody new has come for `gather_s`, mean and deviation over all of them hold for
the whole job: every model of it is trained on numbers that are scaled by them, and is exported with them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import structlog
from fedepth_wire.convert import to_message
from fedepth_wire.times import REJECTED_RETRY_S
from fedepth_wire.v1 import federation_pb2 as pb

from coordinator.admission import check_report
from coordinator.store.records import Store
from fedepth.data.column_sums import ColumnSums, Statistics, statistics_of
from fedepth.data.row_files import asked_of
from fedepth.errors import UnavailableError
from fedepth.job import model_spec
from fedepth.job_sections import MOST_FLOAT, JobConfig
from fedepth.task import DeviceReport

PHASE = "asking for statistics"
RETRY_MS = 2_000
_BUSY_S = 5.0  # until what could not be recorded is tried again

_log = structlog.get_logger()


class Survey:
    """Collects the sums of devices. What has come is not recorded before there is enough: devices tell it again."""

    def __init__(self, config: JobConfig, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._store = store
        self._clock = clock
        self._model = model_spec(config)
        table = self._model.table
        assert table is not None, "only tables are asked about"
        self._columns = table.numeric
        self._asked = asked_of(self._model)
        self._sums: dict[str, ColumnSums] = {}
        self._came_at = clock()
        self._more = asyncio.Event()

    @property
    def classes(self) -> Sequence[str]:
        """Of the job."""
        return self._model.classes

    @property
    def missing(self) -> int:
        """How many devices have to tell their sums yet."""
        return max(0, self._config.job.devices_per_round - len(self._sums))

    def answer(self, report: DeviceReport) -> pb.NextTaskReply:
        """What a device that asks for work is told."""
        problem = check_report(report, self._model.classes, self._config.limits, self._model.first_label)
        if not problem and report.columns is not None:
            problem = self._objection(report.columns, report.sample_count)
        if problem:
            rejected = pb.Rejected(message=problem, retry_after_ms=round(REJECTED_RETRY_S * 1000))
            return pb.NextTaskReply(rejected=rejected)
        if report.columns is None or report.columns.asked != self._asked:
            survey = pb.Survey(job=self._config.job.name, model=to_message(self._model, pb.ModelSpec))
            return pb.NextTaskReply(survey=survey)
        self._take(report, report.columns)
        return pb.NextTaskReply(retry=pb.RetryLater(retry_after_ms=RETRY_MS, reason=self.why_wait()))

    def why_wait(self) -> str:
        """What is waited for, for people."""
        number = self._config.job.devices_per_round
        if self.missing:
            return f"{PHASE} of columns: waiting for {self.missing} more of {number} devices"
        return f"{PHASE} of columns: {len(self._sums)} devices have told theirs"

    def status(self) -> dict[str, Any]:
        """The job as it stands, as `Job.status` has it."""
        section = self._config.job
        return {
            "job": section.name,
            "phase": PHASE,
            "rounds": section.rounds,
            "devices": len(self._sums),
            "accuracy": -1.0,
            "message": self.why_wait(),
        }

    async def statistics(self) -> Statistics:
        """What the devices have, once enough of them have told it; recorded.

        Raises:
            DataError: nobody has a number in one of the columns.
        """
        while self.missing or (wait := self._config.job.gather_s - (self._clock() - self._came_at)) > 0:
            self._more.clear()
            more = asyncio.ensure_future(self._more.wait())
            try:
                await asyncio.wait({more}, timeout=None if self.missing else wait)
            finally:
                more.cancel()
        # In an order that does not depend on who was first, which the last digits would.
        found = statistics_of([self._sums[device] for device in sorted(self._sums)], self._columns)
        while True:
            try:
                await self._store.short(self._store.record_statistics, found)
            except UnavailableError as error:
                _log.error("the statistics of the columns cannot be recorded yet", error=str(error))
                await asyncio.sleep(_BUSY_S)
            else:
                _log.info("statistics of columns", devices=found.devices, columns=len(self._columns))
                return found

    def _take(self, report: DeviceReport, sums: ColumnSums) -> None:
        known = self._sums.get(report.device_id)
        if known is None and len(self._sums) >= self._config.limits.devices:
            return
        if known is None:
            self._came_at = self._clock()
            _log.info("a device told its columns", device=report.name, rows=max(sums.counts, default=0))
        self._sums[report.device_id] = sums
        self._more.set()

    def _objection(self, sums: ColumnSums, samples: int) -> str:
        """Why sums cannot be what a device has counted; "" if they can be."""
        if sums.asked != self._asked:
            return ""  # of another job: it is asked again
        number = len(self._columns)
        if not len(sums.counts) == len(sums.means) == len(sums.squares) == number:
            return f"the device tells sums of {len(sums.counts)} columns, the job has {number}"
        return _odd_sums(self._columns, sums, samples)


def _odd_sums(columns: Sequence[str], sums: ColumnSums, samples: int) -> str:
    for column, count, mean, squares in zip(columns, sums.counts, sums.means, sums.squares, strict=True):
        if count > samples:
            return f"the device tells {count} numbers in the column {column!r}, and has {samples} samples"
        if not abs(mean) <= MOST_FLOAT or not 0 <= squares <= 4.0 * count * MOST_FLOAT**2:  # nor NaN
            return f"the device tells the mean {mean} and the squares {squares} of the column {column!r}"
    return ""
