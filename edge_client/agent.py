"""The agent's loop: deliver what waits, measure, ask for work, do it, and go on whatever happens.

The agent runs for months. It never imports torch, never loses a trained update because the link is down, and
says what it waits for.
"""

from __future__ import annotations

import asyncio
import platform
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog
from fedepth_wire.times import POLL_S

from edge_client.backoff import Backoff, Clock, DiskWait, Reminder
from edge_client.config import Config
from edge_client.data_check.client import check_files, check_rows
from edge_client.delivery import Delivery
from edge_client.lease import Lease
from edge_client.memory.budget import Budgets
from edge_client.memory.probe import Memory, measure
from edge_client.outbox import Outbox
from edge_client.samples import CheckFiles, CheckRows, Samples
from edge_client.task_run import TaskRunner
from edge_client.trainer.client import TRAINER_ARGV, TrainerKeeper, torch_version
from edge_client.transport import (
    Answer,
    Finished,
    Rejected,
    RetryLater,
    Survey,
    Transport,
)
from fedepth import __version__
from fedepth.budget import Budget
from fedepth.costs import Calibration
from fedepth.data.scan import DataSummary
from fedepth.errors import ChildError, DataError, DiskError, ProtocolError, TransportError
from fedepth.layout import Encoding
from fedepth.plan import MOST_MODELS
from fedepth.residuals import Residuals
from fedepth.sizes import format_size
from fedepth.task import SETTINGS, DeviceReport, Failure, Outcome, Progress, Result, Task

LOOK_S = 60.0  # how often data is looked at while the coordinator rejects it
AFTER_FAILURE_S = 10.0  # a device that declines is not asked again in the same breath
LONGEST_AFTER_FAILURE_S = 3600.0
FINISHED_POLL_S = 60.0
SURVEY_PAUSE_S = 30.0  # before what cannot be counted is tried again
LEAST_ROOM_BYTES = 64 << 20
_SHORTEST_PAUSE_S = 0.1
# The same task would end the same way again: whether it is worth another attempt is for the coordinator to say.
_DETERMINISTIC = (Outcome.DIVERGED, Outcome.MODEL, Outcome.DATA)
_log = structlog.get_logger()


@dataclass(frozen=True)
class Surroundings:
    """What tests replace: the trainer's command line, the checks of data, memory, time, and where progress is shown."""

    trainer_argv: Sequence[str] = TRAINER_ARGV
    check_files: CheckFiles = check_files
    check_rows: CheckRows = check_rows
    measure: Callable[[], Memory] = measure
    clock: Clock = field(default_factory=Clock)
    on_progress: Callable[[Progress | None], None] = lambda progress: None


class Agent:
    """One device. Run it under an identity.StateLock."""

    def __init__(
        self,
        config: Config,
        device_id: str,
        transport: Transport,
        calibration: Calibration | None = None,
        *,
        exit_when_done: bool = False,
        samples: Samples | None = None,
        surroundings: Surroundings | None = None,
    ) -> None:
        around = surroundings or Surroundings()
        state = config.state_dir
        self._config = config
        self._device_id = device_id
        self._transport = transport
        self._calibration = calibration or Calibration()
        self._exit_when_done = exit_when_done
        self._around = around
        self._outbox = Outbox(state)
        self._keeper = TrainerKeeper(config.trainer, around.trainer_argv)
        self._budgets = Budgets(state, config.memory, torch_version(), around.measure)
        self._backoff = Backoff(transport.address, config.retry, around.clock, device_id)
        self._disk = DiskWait(around.clock, config.retry.remind_s)
        self._nothing_to_do, self._rejection, self._uncounted = (
            Reminder(around.clock, config.retry.remind_s) for _ in range(3)
        )
        self._lease = Lease(transport, around.on_progress, device_id)
        residuals = Residuals(config.state_dir)
        self._delivery = Delivery(device_id, self._outbox, residuals, transport, self._backoff, self._lease)
        self._samples = samples or Samples(config, around.check_files, around.check_rows)
        self._runner = TaskRunner(
            config,
            self._samples,
            device_id,
            transport,
            self._keeper,
            self._budgets,
            self._outbox,
            residuals,
            self._backoff,
            self._disk,
            self._lease.note,
            self._calibration,
        )
        self._instance = secrets.token_hex(8)
        self._failed = ("", 0)  # what the last task failed of, and how often in a row
        self._hopeless: Failure | None = None  # the last failure that is deterministic
        self._room_bytes = LEAST_ROOM_BYTES  # what a task and its update may take
        self._told_finished = False

    async def run(self) -> None:
        """Works until the job is done (with `exit_when_done`) or until it is cancelled.

        Raises:
            DataError, DiskError: the data directory cannot be used at the start.
            ChildError: the trainer, or the check of the data, cannot be started at all.
        """
        try:
            await self._samples.look()
            self._memory = self._around.measure()
            for note in self._memory.notes:
                _log.warning("memory", note=note)
            await self._learn_start()
            _log.info(
                "agent ready",
                device=self._device_id,
                coordinator=self._transport.address,
                samples=self._samples.count,
                budget=format_size(self._budget().budget_bytes),
            )
            while await self._step():
                pass
        finally:
            await self._keeper.close()
            await self._transport.close()

    async def _step(self) -> bool:
        """One round of the loop; False when the agent should end."""
        try:
            await self._delivery.send_all()
            if await asyncio.to_thread(self._runner.recover):
                return True  # it comes before another task, too
            await asyncio.to_thread(self._outbox.check_room, self._room_bytes)
            self._disk.reset()
            answer = await self._transport.next_task(self._report(), POLL_S)
        except DiskError as error:
            await self._disk.pause("asking for no task: what is trained could not be stored", error)
            return True
        except (TransportError, ProtocolError) as error:
            await self._backoff.pause(error)
            return True
        self._backoff.reset()
        return await self._act(answer)

    async def _act(self, answer: Answer) -> bool:
        if not isinstance(answer, Rejected):
            self._rejection.over()
        if isinstance(answer, Task):
            self._told_finished = False
            self._nothing_to_do.over()
            await self._take_on(answer)
            models = min(max(1, answer.training.mutual), MOST_MODELS) + (answer.training.encoding is Encoding.INT8)
            self._room_bytes = max(LEAST_ROOM_BYTES, models * answer.weights_bytes, self._runner.room_bytes)
        elif isinstance(answer, RetryLater):
            if answer.reason and self._nothing_to_do.due(answer.reason):
                _log.info("nothing to do now", reason=answer.reason)
            await self._around.clock.sleep(max(_SHORTEST_PAUSE_S, answer.after_s))
        elif isinstance(answer, Survey):
            await self._look_at_columns(answer)
        elif isinstance(answer, Finished):
            if not self._told_finished:
                _log.info("job finished", job=answer.job, rounds=answer.rounds)
                self._told_finished = True
            if self._exit_when_done:
                return False
            await self._around.clock.sleep(FINISHED_POLL_S)
        else:
            await self._rejected(answer)
        return True

    async def _look_at_columns(self, survey: Survey) -> None:
        """Goes through the rows for a job that has not begun; the next report has what is in its columns."""
        try:
            await self._samples.for_survey(survey.model)
        except (DataError, DiskError, ChildError) as error:
            if self._uncounted.due(str(error)):
                _log.error("the job asks for columns that cannot be counted", job=survey.job, error=str(error))
            await self._pause_unless_data_changes(SURVEY_PAUSE_S, self._samples.summary)
        else:
            self._uncounted.over()
            _log.info("the job has asked what is in its columns", job=survey.job)

    async def _rejected(self, answer: Rejected) -> None:
        pause = max(1.0, answer.after_s)
        if self._rejection.due(answer.message):
            remedy = {}
            if answer.reason == "clone":
                file = self._config.state_dir / "device-id"
                remedy = {"remedy": f"if this device is a copy of another, delete {file} to join as a new device"}
            _log.error("the coordinator rejected this device", message=answer.message, next_try_s=pause, **remedy)
        self._samples.forget_job()
        await self._pause_unless_data_changes(pause, self._samples.summary)

    async def _pause_unless_data_changes(self, pause: float, before: DataSummary) -> bool:
        """Sleeps so long, or until there is other data, which may have been what was wrong. Whether there is."""
        while pause > 0:
            await self._around.clock.sleep(min(pause, LOOK_S))
            pause -= LOOK_S
            await self._count_again()
            if self._samples.differs(before):
                _log.info(
                    "the training samples have changed; asking again",
                    before=before.sample_count,
                    now=self._samples.count,
                )
                return True
        return False

    async def _take_on(self, task: Task) -> None:
        """Works on a task, unless it is trained already, or is known to fail."""
        failure = self._hopeless
        if failure is not None and (failure.task_id, failure.attempt) == (task.task_id, task.attempt):
            await self._finish(failure)
            return
        try:
            kept = await asyncio.to_thread(self._outbox.find, task.task_id, task.weights_digest)
        except DiskError as error:
            await self._disk.pause("a task is left alone: whether it is trained already cannot be read", error)
            return
        if kept is None:
            await self._work(task)
            return
        _log.warning(
            "this task is trained already; delivering its update instead of training again",
            task=task.task_id,
            attempt=task.attempt,
            trained_attempt=kept.result.attempt,
        )
        try:
            refused = await self._delivery.send(kept)
        except (TransportError, ProtocolError, DiskError):
            return  # the update stays, so that the next step meets the same error, and says so
        if refused:
            what = f"the update of attempt {kept.result.attempt} was refused ({refused.reason}): {refused.message}"
            await self._finish(Failure(task.task_id, task.attempt, self._device_id, Outcome.ERROR, what))

    async def _work(self, task: Task) -> None:
        _log.info(
            "task received",
            task=task.task_id,
            attempt=task.attempt,
            round=task.round,
            model=task.model.name,
            blocks=task.plan.blocks,
            predicted_peak=format_size(task.plan.predicted_peak_bytes),
        )
        self._lease.note(Progress(task.task_id, task.attempt, self._device_id, "downloading"))
        async with self._lease.renewed() as beat:
            work = asyncio.create_task(self._runner.run(task, self._samples.count_for(task.model.classes)))
            try:
                await asyncio.wait({work, beat}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    beat.result()
                    _log.warning("the coordinator no longer waits for this task", task=task.task_id)
                    if not self._runner.is_storing:
                        return
                    await asyncio.wait({work})  # whether a trained update is still wanted, the delivery will tell
                end = work.result()
            finally:
                work.cancel()
                await asyncio.wait({work})  # until it has cleaned up
        await self._finish(end)

    async def _count_again(self) -> None:
        try:
            await self._samples.look()
        except (DataError, DiskError, ChildError) as error:
            if self._uncounted.due(str(error)):
                _log.error("the training samples cannot be counted; using the last count", error=str(error))
        else:
            self._uncounted.over()

    async def _finish(self, end: Result | Failure) -> None:
        before = self._samples.summary
        await self._count_again()  # the next task is asked for with what is there by then
        if isinstance(end, Result):
            self._failed = ("", 0)
            _log.info("task trained", task=end.task_id, blocks=end.plan.blocks, seconds=round(end.seconds, 1))
            return
        if end.outcome in _DETERMINISTIC:
            self._hopeless = end
        _log.error("task ended without an update", task=end.task_id, outcome=end.outcome.value, message=end.message)
        await self._delivery.report_failure(end)
        await self._pause_after(f"{end.outcome.value}: {end.message}", before if end.outcome is Outcome.DATA else None)

    async def _pause_after(self, failure: str, data: DataSummary | None) -> None:
        """Before the next task is asked for. What fails again in the same words is likely to fail always: the pause
        doubles each time, and ends early where what failed was to use `data` and there is other data by now."""
        last, times = self._failed
        self._failed = (failure, times + 1 if failure == last else 1)
        pause = min(AFTER_FAILURE_S * 2.0 ** (self._failed[1] - 1), LONGEST_AFTER_FAILURE_S)
        if self._failed[1] > 1:
            _log.warning("the same failure again", times=self._failed[1], next_task_in_s=pause)
        if data is None:
            await self._around.clock.sleep(pause)
        elif await self._pause_unless_data_changes(pause, data):
            self._failed, self._hopeless = ("", 0), None

    async def _learn_start(self) -> None:
        """Starts a first trainer: a budget without its start in it would promise too much."""
        if self._budgets.start_bytes is None:
            _log.info("starting the trainer once, to measure what its start costs")
            trainer = await self._keeper.take()
            self._budgets.learn_start(trainer.start_bytes)
            self._keeper.rest()

    def _budget(self) -> Budget:
        return self._budgets.budget(self._keeper.held_bytes, self._keeper.baseline_bytes)

    def _report(self) -> DeviceReport:
        memory, folders = self._memory, self._samples.folders
        return DeviceReport(
            device_id=self._device_id,
            name=self._config.name or socket.gethostname(),
            budget=self._budget(),
            sample_count=self._samples.count,
            class_counts=self._samples.summary.class_counts,
            class_names=self._samples.class_names,
            hardware=f"{memory.board or platform.system()} ({platform.machine()})",
            accelerator=", ".join(memory.cuda) or (memory.board if memory.unified else ""),
            software=f"Python {platform.python_version()}, torch {torch_version()}",
            fedepth_version=__version__,
            calibration=self._calibration,
            instance=self._instance,
            hostname=socket.gethostname(),
            settings=SETTINGS,
            folder_names=tuple(folders),
            folder_counts=tuple(folders.values()),
            columns=self._samples.columns,
        )
