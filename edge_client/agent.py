"""The agent's loop: deliver what waits, measure, ask for work, do it, and go on whatever happens.

The agent runs for months. It never imports torch, never loses a trained update because the link is down, and
says what it waits for.
"""

from __future__ import annotations

import asyncio
import platform
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import structlog

from edge_client.backoff import Backoff, Clock, within
from edge_client.config import Config
from edge_client.memory.budget import Budgets
from edge_client.memory.probe import Memory, measure
from edge_client.outbox import Entry, Outbox
from edge_client.task_run import TaskRunner
from edge_client.trainer.client import TRAINER_ARGV, TrainerKeeper, torch_version
from edge_client.transport import (
    Accepted,
    Answer,
    Finished,
    Refused,
    Rejected,
    RetryLater,
    Transport,
    UnreachableError,
)
from fedepth import __version__
from fedepth.budget import Budget
from fedepth.costs import Calibration
from fedepth.data.scan import scan
from fedepth.errors import DataError, ProtocolError, TransportError
from fedepth.sizes import format_size
from fedepth.task import DeviceReport, Failure, Progress, Result, Task

POLL_S = 30.0
BEAT_S = 5.0
AFTER_FAILURE_S = 10.0  # a device that declines is not asked again in the same breath
LONGEST_AFTER_FAILURE_S = 3600.0
FINISHED_POLL_S = 60.0
_SHORTEST_PAUSE_S = 0.1
_log = structlog.get_logger()


@dataclass(frozen=True)
class Surroundings:
    """What tests replace: the trainer's command line, memory, time, and where progress is shown."""

    trainer_argv: Sequence[str] = TRAINER_ARGV
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
        self._runner = TaskRunner(
            config,
            device_id,
            transport,
            self._keeper,
            self._budgets,
            self._outbox,
            self._backoff,
            self._note,
            self._calibration,
        )
        self._progress = Progress("", 0, device_id, "")
        self._nudge = asyncio.Event()
        self._failed = ("", 0)  # what the last task failed of, and how often in a row
        self._told_finished = False

    async def run(self) -> None:
        """Works until the job is done (with `exit_when_done`) or until it is cancelled.

        Raises:
            DataError: the data directory cannot be used at the start.
            ChildError: the trainer cannot be started at all.
        """
        try:
            self._count_samples()
            self._memory = self._around.measure()
            for note in self._memory.notes:
                _log.warning("memory", note=note)
            await self._learn_start()
            _log.info(
                "agent ready",
                device=self._device_id,
                coordinator=self._transport.address,
                samples=self._samples,
                budget=format_size(self._budget().budget_bytes),
            )
            while await self._step():
                pass
        finally:
            await self._keeper.drop()
            await self._transport.close()

    async def _step(self) -> bool:
        """One round of the loop; False when the agent should end."""
        try:
            await self._deliver_all()
            answer = await self._transport.next_task(self._report(), POLL_S)
        except (TransportError, ProtocolError) as error:
            await self._backoff.pause(error)
            return True
        self._backoff.reset()
        return await self._act(answer)

    async def _act(self, answer: Answer) -> bool:
        if isinstance(answer, Task):
            self._told_finished = False
            await self._work(answer)
        elif isinstance(answer, RetryLater):
            await self._around.clock.sleep(max(_SHORTEST_PAUSE_S, answer.after_s))
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

    async def _rejected(self, answer: Rejected) -> None:
        pause = max(1.0, answer.after_s)
        _log.error("the coordinator rejected this device", message=answer.message, next_try_s=pause)
        await self._around.clock.sleep(pause)

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
        self._note(Progress(task.task_id, task.attempt, self._device_id, "downloading"))
        work = asyncio.create_task(self._runner.run(task, self._samples))
        beat = asyncio.create_task(self._beat())
        try:
            await asyncio.wait({work, beat}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                beat.result()
                _log.warning("the coordinator no longer waits for this task", task=task.task_id)
                return
            end = work.result()
        finally:
            await _end(work, beat)
            self._around.on_progress(None)
        await self._finish(end)

    def _count_samples(self) -> None:
        summary = scan(self._config.data_dir, None)
        self._samples, self._class_counts = summary.sample_count, summary.class_counts

    async def _finish(self, end: Result | Failure) -> None:
        try:
            await asyncio.to_thread(self._count_samples)  # the next task is asked for with what is there by then
        except (DataError, OSError) as error:
            _log.error("the training samples cannot be counted; using the last count", error=str(error))
        if isinstance(end, Result):
            self._failed = ("", 0)
            _log.info("task trained", task=end.task_id, blocks=end.plan.blocks, seconds=round(end.seconds, 1))
            return
        _log.error("task ended without an update", task=end.task_id, outcome=end.outcome.value, message=end.message)
        try:
            await self._transport.report_failure(end)
        except (TransportError, ProtocolError) as error:
            # The task's lease runs out, so the coordinator learns it all the same, only later.
            _log.warning("the failure could not be reported", error=str(error))
        await self._pause_after(f"{end.outcome.value}: {end.message}")

    async def _pause_after(self, failure: str) -> None:
        """Before the next task is asked for. What fails again in the same words is likely to fail always: the pause
        doubles each time."""
        last, times = self._failed
        self._failed = (failure, times + 1 if failure == last else 1)
        pause = min(AFTER_FAILURE_S * 2.0 ** (self._failed[1] - 1), LONGEST_AFTER_FAILURE_S)
        if self._failed[1] > 1:
            _log.warning("the same failure again", times=self._failed[1], next_task_in_s=pause)
        await self._around.clock.sleep(pause)

    async def _deliver_all(self) -> None:
        """Sends every kept update, oldest first.

        Raises:
            UnreachableError: the coordinator is away; what is not acknowledged stays.
        """
        for entry in await asyncio.to_thread(self._outbox.entries):
            try:
                answer = await self._deliver(entry)
            except UnreachableError:
                raise
            except (TransportError, ProtocolError) as error:
                # One update that cannot be sent must not hold up the others, nor the device.
                _log.error(
                    "an update could not be delivered; it is kept",
                    task=entry.result.task_id,
                    error=str(error),
                )
                continue
            self._backoff.reset()
            if isinstance(answer, Accepted):
                _log.info("update accepted", task=entry.result.task_id, round=answer.round)
            else:
                _log.error(
                    "update refused; it is dropped",
                    task=entry.result.task_id,
                    reason=answer.reason,
                    message=answer.message,
                )
            self._outbox.remove(entry)

    async def _deliver(self, entry: Entry) -> Accepted | Refused:
        result = entry.result
        self._note(Progress(result.task_id, result.attempt, self._device_id, "uploading"))
        # Whether it is still wanted is for CommitUpdate to say: only that answer is final.
        beat = asyncio.create_task(self._beat())
        try:
            return await self._transport.deliver(entry)
        finally:
            await _end(beat)
            self._around.on_progress(None)

    async def _beat(self) -> None:
        """Renews the lease at every change and every BEAT_S; ends when the task is not wanted any more."""
        moved_before = self._transport.moved_bytes
        while True:
            self._nudge.clear()
            progress = replace(self._progress, bytes_moved=self._transport.moved_bytes - moved_before)
            try:
                if not await self._transport.report_progress(progress):
                    return
            except (TransportError, ProtocolError) as error:
                _log.debug("progress could not be reported", error=str(error))
            try:
                await within(BEAT_S, self._nudge.wait())
            except asyncio.TimeoutError:
                continue

    def _note(self, progress: Progress) -> None:
        """Takes over where the work is. A new activity or stage is told at once."""
        before = self._progress
        self._progress = progress
        self._around.on_progress(progress)
        if (before.task_id, before.activity, before.stage, before.stage_count) != (
            progress.task_id,
            progress.activity,
            progress.stage,
            progress.stage_count,
        ):
            self._nudge.set()

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
        memory = self._memory
        return DeviceReport(
            device_id=self._device_id,
            name=self._config.name or socket.gethostname(),
            budget=self._budget(),
            sample_count=self._samples,
            class_counts=self._class_counts,
            hardware=f"{memory.board or platform.system()} ({platform.machine()})",
            accelerator=", ".join(memory.cuda) or (memory.board if memory.unified else ""),
            software=f"Python {platform.python_version()}, torch {torch_version()}",
            fedepth_version=__version__,
            calibration=self._calibration,
        )


async def _end(*tasks: asyncio.Task[Result | Failure] | asyncio.Task[None]) -> None:
    """Cancels what still runs, and waits until it has cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
