"""A job in progress: feeds what happens into the state machine of `rounds`, and does what comes out of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from coordinator import rounds
from coordinator.global_model import GlobalModel
from coordinator.model_worker.client import Models
from coordinator.observe.events import Events, encode_event
from coordinator.plans import Plans
from coordinator.round_events import (
    Action,
    CloseRound,
    DeviceWaiting,
    Event,
    GiveTask,
    Left,
    Log,
    LoseTask,
    Progressed,
    RoundDone,
    StartRound,
    TaskFailed,
    Tick,
    UpdateRecorded,
)
from coordinator.store.records import Prepared, Store, TaskRecord
from coordinator.uploads import Uploads
from fedepth.errors import UpdateError
from fedepth.job import JobConfig, model_spec, policy, training_spec
from fedepth.models.traced import read_costs
from fedepth.plan import Plan
from fedepth.task import DeviceReport, Failure, Progress, Result, Task

TICK_S = 0.2

_STANDINGS = {
    "given": rounds.Standing.OPEN,
    "lost": rounds.Standing.EXPIRED,
    "accepted": rounds.Standing.ACCEPTED,
    "failed": rounds.Standing.FAILED,
    "refused": rounds.Standing.FAILED,
}

_log = structlog.get_logger()


@dataclass
class _Waiter:
    """A device that waits in a call for a task, and the plan that was made for it."""

    report: DeviceReport
    plan: Plan
    answer: asyncio.Future[Task | None]  # None: nothing to do, the job is finished or the call is superseded


class Job:
    """One job in progress. Everything runs in one event loop; what takes long, in a thread or the worker."""

    def __init__(
        self,
        config: JobConfig,
        store: Store,
        models: Models,
        prepared: Prepared,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.store = store
        self.events = Events()
        self.model = model_spec(config)
        self.finished = asyncio.Event()
        self.informed: set[str] = set()
        self.plans = Plans(read_costs(store.files.graph()), policy(config))
        self._prepared = prepared
        self._clock = clock
        self._waiters: dict[str, _Waiter] = {}
        self._names = store.device_names()
        self._reports: dict[str, DeviceReport] = {}
        self._closing: CloseRound | None = None
        self._wake = asyncio.Event()
        self.weights = GlobalModel(config, store, models, self.events)
        self.state = self._restore()
        self.uploads = Uploads(store, prepared.layout, lambda task_id: rounds.accepts(self.state, task_id))

    def _restore(self) -> rounds.State:
        job = self.config.job
        rules = rounds.Rules(
            rounds=job.rounds,
            devices_per_round=job.devices_per_round,
            quorum=job.needed,
            gather_s=job.gather_s,
            deadline_s=job.round_deadline_s,
            lease_s=job.lease_s,
            seed=job.seed,
            task_prefix=self.store.run_id,
        )
        kept = [
            rounds.Assignment(task.task_id, task.device_id, task.attempt, _STANDINGS[task.status])
            for task in self.store.tasks_of(self.weights.record.round + 1)
        ]
        return rounds.restore(rules, self.weights.record.round, kept, self._clock())

    # --- what devices do

    async def plan_for(self, report: DeviceReport) -> Plan:
        """The plan of this device for the current round.

        Raises:
            PlanError: nothing fits its budget.
        """
        return await self.plans.plan(report, training_spec(self.config, self.state.round))

    def see(self, report: DeviceReport) -> None:
        """Takes note of a device that called, whether or not it can take part."""
        if self._reports.get(report.device_id) is None:
            self.events.send(
                "device_seen",
                device=report.name,
                device_id=report.device_id,
                samples=report.sample_count,
                budget=report.budget.budget_bytes,
                hardware=report.hardware,
            )
        if self._reports.get(report.device_id) != report:
            self.store.see_device(report)
        self._reports[report.device_id] = report
        self._names[report.device_id] = report.name

    def start_waiting(self, report: DeviceReport, plan: Plan) -> asyncio.Future[Task | None]:
        """Puts a device in line. The future ends with its task, or with None if there is none to wait for."""
        older = self._waiters.pop(report.device_id, None)
        if older is not None and not older.answer.done():
            older.answer.set_result(None)
        waiter = _Waiter(report, plan, asyncio.get_running_loop().create_future())
        self._waiters[report.device_id] = waiter
        self.apply(DeviceWaiting(report.device_id, self._clock()))
        return waiter.answer

    def stop_waiting(self, device_id: str, answer: asyncio.Future[Task | None]) -> None:
        """Takes a device out of line, unless a newer call of it stands there."""
        waiter = self._waiters.get(device_id)
        if waiter is not None and waiter.answer is answer:
            del self._waiters[device_id]
            self.apply(Left(device_id, self._clock()))

    def progressed(self, progress: Progress) -> bool:
        """Renews a lease; whether the task is still wanted."""
        task = rounds.find(self.state, progress.task_id)
        if task is None or task.device_id != progress.device_id:
            return False
        self.touch(progress.task_id)
        fields = {key: value for key, value in vars(progress).items() if key != "loss" or value == value}
        self.events.send("progress", device=self._name(progress.device_id), **fields)
        return rounds.accepts(self.state, progress.task_id)

    def touch(self, task_id: str) -> None:
        """A sign of life of a task, such as a chunk of its upload."""
        self.apply(Progressed(task_id, self._clock()))

    async def commit(self, result: Result) -> int:
        """Records an update and returns its round.

        Raises:
            UpdateError: it is refused.
            ProtocolError: a part has to be sent again.
        """
        try:
            new = await self.uploads.commit(result)
        except UpdateError as error:
            self.refuse(result.task_id, result.device_id, error)
            raise
        if new:
            self.events.send(
                "update_accepted",
                device=self._name(result.device_id),
                device_id=result.device_id,
                task_id=result.task_id,
                round=result.round,
                bytes=sum(part.size_bytes for part in result.parts),
                samples=result.sample_count,
                seconds=result.seconds,
                stages=result.stages,
            )
            self.apply(UpdateRecorded(result.task_id, self._clock()))
        return result.round

    def refuse(self, task_id: str, device_id: str, error: UpdateError) -> None:
        """Reports and counts a refusal, and ends the task if it was its device's own."""
        task = rounds.find(self.state, task_id)
        owner = task is not None and task.device_id == device_id
        self.events.send(
            "update_refused",
            device=self._name(device_id),
            device_id=device_id,
            task_id=task_id,
            reason=error.reason,
            message=str(error),
        )
        if owner and rounds.accepts(self.state, task_id):
            self.store.end_task(task_id, "refused", error.reason, str(error))
            self.apply(TaskFailed(task_id, self._clock()))
        else:
            self.store.count_refusal(task_id, error.reason, str(error))

    def failed(self, failure: Failure) -> bool:
        """Ends a task without an update; whether it is still wanted, which it is not."""
        task = rounds.find(self.state, failure.task_id)
        if task is None or task.device_id != failure.device_id or failure.attempt != task.attempt:
            return False
        if rounds.accepts(self.state, failure.task_id):
            self.store.end_task(failure.task_id, "failed", failure.outcome.value, failure.message)
            self.events.send("task_failed", device=self._name(failure.device_id), **vars(failure))
            self.apply(TaskFailed(failure.task_id, self._clock()))
        return False

    def file_of(self, digest: str) -> tuple[Path, int] | None:
        """The file with this digest that devices may fetch, and its size: weights of a round, or the graph."""
        if digest == self._prepared.graph_digest:
            return self.store.files.graph(), self._prepared.graph_bytes
        record = self.store.find_weights(digest)
        return None if record is None else (self.store.files.weights(record.round), record.size_bytes)

    # --- what follows

    def apply(self, event: Event) -> None:
        """Feeds one event to the state machine and acts on what comes out."""
        self.state, actions = rounds.step(self.state, event)
        for action in actions:
            self._act(action)

    def _act(self, action: Action) -> None:
        if isinstance(action, GiveTask):
            self._give(action)
        elif isinstance(action, StartRound):
            names = [self._name(device) for device in action.devices]
            self.events.send("round_started", round=action.round, devices=names)
        elif isinstance(action, LoseTask):
            self.store.end_task(action.task_id, "lost", "lost", action.reason)
            self.events.send(
                "task_failed",
                device=self._name(action.device_id),
                device_id=action.device_id,
                task_id=action.task_id,
                outcome="lost",
                message=action.reason,
            )
        elif isinstance(action, CloseRound):
            self._closing = action
            self._wake.set()
        elif isinstance(action, Log):
            self.events.send("log", message=action.message)
        else:
            self._wake.set()

    def _give(self, action: GiveTask) -> None:
        waiter = self._waiters.pop(action.device_id)
        record = TaskRecord(
            action.task_id,
            action.round,
            action.device_id,
            action.attempt,
            "given",
            waiter.plan,
            waiter.report.sample_count,
        )
        self.store.record_task(record)
        task = Task(
            task_id=action.task_id,
            attempt=action.attempt,
            job=self.config.job.name,
            round=action.round,
            model=self.model,
            training=training_spec(self.config, action.round),
            policy=policy(self.config),
            graph_digest=self._prepared.graph_digest,
            graph_bytes=self._prepared.graph_bytes,
            plan=waiter.plan,
            weights_digest=self.weights.record.digest,
            weights_bytes=self.weights.record.size_bytes,
            deadline_ms=max(0, int((self.state.deadline - self._clock()) * 1000)),
        )
        self.events.send(
            "task_given",
            device=waiter.report.name,
            device_id=action.device_id,
            task_id=action.task_id,
            attempt=action.attempt,
            round=action.round,
            blocks=waiter.plan.blocks,
            predicted_peak=waiter.plan.predicted_peak_bytes,
            available=waiter.report.budget.available_bytes,
            budget=waiter.report.budget.budget_bytes,
            weights_bytes=self.weights.record.size_bytes,
        )
        if not waiter.answer.done():
            waiter.answer.set_result(task)

    async def run(self) -> None:
        """Lets time pass, and closes rounds, until it is cancelled.

        Raises:
            FedepthError: a round could not be averaged or recorded. The state is sound; start again.
        """
        if self.state.phase is rounds.Phase.FINISHED:
            await self._complete()
        while True:
            self.apply(Tick(self._clock()))
            if self._closing is not None:
                closing, self._closing = self._closing, None
                await self._close(closing)
            self._wake.clear()
            if self._closing is None:
                await self._sleep()

    async def _sleep(self) -> None:
        waker = asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait({waker}, timeout=TICK_S)
        finally:
            waker.cancel()

    async def _close(self, closing: CloseRound) -> None:
        results = self.store.updates_of(closing.round)
        updates = [(self.uploads.paths(result), float(result.sample_count)) for result in results]
        await self.weights.average(closing.round, updates, sum(result.sample_count for result in results))
        await asyncio.to_thread(self.store.drop_spools_before, closing.round + 1)
        self.uploads.forget_round()
        await self.weights.evaluate()
        every = self.config.export.every
        if closing.round >= self.config.job.rounds or (every and closing.round % every == 0):
            await self.weights.export()
        self.apply(RoundDone(closing.round, self._clock()))
        if self.state.phase is rounds.Phase.FINISHED:
            await self._complete()

    async def _complete(self) -> None:
        """The job is finished; makes up what a crash may have kept from happening."""
        if self.weights.record.accuracy < 0:
            await self.weights.evaluate()
        if not self.weights.record.export_path:
            await self.weights.export()
        for device_id, waiter in list(self._waiters.items()):
            del self._waiters[device_id]
            if not waiter.answer.done():
                waiter.answer.set_result(None)
        self.events.send("finished", rounds=self.config.job.rounds, accuracy=self.weights.record.accuracy)
        self.finished.set()

    # --- for people

    def status(self) -> dict[str, Any]:
        """The job as it stands."""
        done = self.store.rounds()
        return {
            "job": self.config.job.name,
            "phase": self.state.phase.value,
            "round": self.state.round,
            "rounds": self.config.job.rounds,
            "devices": len(rounds.live_devices(self.state, self._clock())),
            "accuracy": next((each.accuracy for each in reversed(done) if each.accuracy >= 0), -1.0),
            "weights_digest": self.weights.record.digest,
            "onnx_path": next((each.export_path for each in reversed(done) if each.export_path), ""),
        }

    def state_event(self) -> str:
        return encode_event("state", self.status())

    def unaware_devices(self) -> frozenset[str]:
        """Live devices that do not know yet that the job is finished."""
        return rounds.live_devices(self.state, self._clock()) - self.informed

    def _name(self, device_id: str) -> str:
        return self._names.get(device_id, device_id)
