"""Drives a job: feeds what happens into the state machine of `rounds`, and does what comes out of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import structlog

from coordinator import rounds
from coordinator.config import JobConfig, model_spec, policy
from coordinator.events import Events, encode_event
from coordinator.intake import Intake
from coordinator.schedule import training_spec
from coordinator.store import Prepared, RoundRecord, Store, TaskRecord
from coordinator.worker import Models
from fedepth.errors import FedepthError, StateError, UpdateError
from fedepth.layout import ModelLayout
from fedepth.planning.planner import make_plan
from fedepth.task import DeviceReport, Failure, ModelCosts, Plan, Progress, Result, Task

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


async def prepare(config: JobConfig, store: Store, models: Models) -> Prepared:
    """Costs, layout and initial weights of the job's model, made now or in an earlier run.

    Raises:
        FedepthError: the model cannot be built, or the state is damaged.
    """
    training = training_spec(config, 1)
    await asyncio.to_thread(store.verify_latest)
    known = store.prepared()
    started = store.latest_round() is not None
    if known is not None and started and known.training == training:
        return known
    partial = store.directory / "weights" / "initial.partial"
    answer = await models.request(
        "prepare", model=model_spec(config), training=training, seed=config.job.seed, output=str(partial)
    )
    costs, layout = (
        msgspec.convert(answer["costs"], ModelCosts),
        msgspec.convert(answer["layout"], ModelLayout),
    )
    prepared = Prepared(costs, layout, training)
    store.record_prepared(prepared)
    if started:
        partial.unlink()  # only the costs were asked for: the weights of this job are trained ones
    else:
        record = await asyncio.to_thread(store.seal_weights, partial, 0, 0, 0)
        if record.digest != answer["digest"]:
            raise StateError(f"initial weights have sha256 {record.digest[:12]}…, the model worker said otherwise")
        store.record_round(record)
    return prepared


class Driver:
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
        self.told_finished: set[str] = set()
        self._models = models
        self._prepared = prepared
        self._clock = clock
        self._waiters: dict[str, _Waiter] = {}
        self._names = store.device_names()
        self._reports: dict[str, DeviceReport] = {}
        self._closing: rounds.CloseRound | None = None
        self._wake = asyncio.Event()
        self._weights = self._latest()
        self.state = self._restore()
        self.intake = Intake(store, prepared.layout, lambda task_id: rounds.accepts(self.state, task_id))

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
            for task in self.store.tasks_of(self._weights.round + 1)
        ]
        return rounds.restore(rules, self._weights.round, kept, self._clock())

    def _latest(self) -> RoundRecord:
        record = self.store.latest_round()
        if record is None:
            raise StateError(f"{self.store.directory} has no weights to begin with")
        return record

    # --- what devices do

    def plan_for(self, report: DeviceReport) -> Plan:
        """The plan of this device for the current round.

        Raises:
            PlanError: nothing fits its budget.
        """
        return make_plan(
            self._prepared.costs,
            budget_bytes=report.budget.budget_bytes,
            training=training_spec(self.config, self.state.round),
            sample_count=report.sample_count,
            policy=policy(self.config),
        )

    def see(self, report: DeviceReport) -> None:
        """Takes note of a device that called, whether or not it can take part."""
        if self._reports.get(report.device_id) is None:
            self.events.tell(
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
        self.apply(rounds.Waiting(report.device_id, self._clock()))
        return waiter.answer

    def stop_waiting(self, device_id: str, answer: asyncio.Future[Task | None]) -> None:
        """Takes a device out of line, unless a newer call of it stands there."""
        waiter = self._waiters.get(device_id)
        if waiter is not None and waiter.answer is answer:
            del self._waiters[device_id]
            self.apply(rounds.Left(device_id, self._clock()))

    def progressed(self, progress: Progress) -> bool:
        """Renews a lease; whether the task is still wanted."""
        task = rounds.find(self.state, progress.task_id)
        if task is None or task.device_id != progress.device_id:
            return False
        self.touch(progress.task_id)
        fields = {key: value for key, value in vars(progress).items() if key != "loss" or value == value}
        self.events.tell("progress", device=self._name(progress.device_id), **fields)
        return rounds.accepts(self.state, progress.task_id)

    def touch(self, task_id: str) -> None:
        """A sign of life of a task, such as a chunk of its upload."""
        self.apply(rounds.Progressed(task_id, self._clock()))

    async def commit(self, result: Result) -> int:
        """Records an update and returns its round.

        Raises:
            UpdateError: it is refused.
        """
        try:
            new = await self.intake.commit(result)
        except UpdateError as error:
            self.refuse(result.task_id, result.device_id, error)
            raise
        if new:
            self.events.tell(
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
            self.apply(rounds.Accepted(result.task_id, self._clock()))
        return result.round

    def refuse(self, task_id: str, device_id: str, error: UpdateError) -> None:
        """Tells and counts a refusal, and ends the task if it was its device's own."""
        task = rounds.find(self.state, task_id)
        owner = task is not None and task.device_id == device_id
        self.events.tell(
            "update_refused",
            device=self._name(device_id),
            device_id=device_id,
            task_id=task_id,
            reason=error.reason,
            message=str(error),
        )
        if owner and rounds.accepts(self.state, task_id):
            self.store.end_task(task_id, "refused", error.reason, str(error))
            self.apply(rounds.Failed(task_id, self._clock()))
        else:
            self.store.count_refusal(task_id, error.reason, str(error))

    def failed(self, failure: Failure) -> bool:
        """Ends a task without an update; whether it is still wanted, which it is not."""
        task = rounds.find(self.state, failure.task_id)
        if task is None or task.device_id != failure.device_id or failure.attempt != task.attempt:
            return False
        if rounds.accepts(self.state, failure.task_id):
            self.store.end_task(failure.task_id, "failed", failure.outcome.value, failure.message)
            self.events.tell("task_failed", device=self._name(failure.device_id), **vars(failure))
            self.apply(rounds.Failed(failure.task_id, self._clock()))
        return False

    # --- what follows

    def apply(self, event: rounds.Event) -> None:
        """Feeds one event to the state machine and acts on what comes out."""
        self.state, actions = rounds.step(self.state, event)
        for action in actions:
            self._act(action)

    def _act(self, action: rounds.Action) -> None:
        if isinstance(action, rounds.GiveTask):
            self._give(action)
        elif isinstance(action, rounds.StartRound):
            names = [self._name(device) for device in action.devices]
            self.events.tell("round_started", round=action.round, devices=names)
        elif isinstance(action, rounds.LoseTask):
            self.store.end_task(action.task_id, "lost", "lost", action.reason)
            self.events.tell(
                "task_failed",
                device=self._name(action.device_id),
                device_id=action.device_id,
                task_id=action.task_id,
                outcome="lost",
                message=action.reason,
            )
        elif isinstance(action, rounds.CloseRound):
            self._closing = action
            self._wake.set()
        elif isinstance(action, rounds.Log):
            self.events.tell("log", message=action.message)
        else:
            self._wake.set()

    def _give(self, action: rounds.GiveTask) -> None:
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
            costs=self._prepared.costs,
            plan=waiter.plan,
            weights_digest=self._weights.digest,
            weights_bytes=self._weights.size_bytes,
            deadline_ms=max(0, int((self.state.deadline - self._clock()) * 1000)),
        )
        self.events.tell(
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
            weights_bytes=self._weights.size_bytes,
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
            self.apply(rounds.Tick(self._clock()))
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

    async def _close(self, closing: rounds.CloseRound) -> None:
        results = self.store.updates_of(closing.round)
        partial = self.store.directory / "weights" / f"round-{closing.round:04d}.partial"
        base = self.store.weights_path(self._weights.round)
        updates = [(self.intake.paths(result), float(result.sample_count)) for result in results]
        await asyncio.to_thread(average_updates, base, updates, partial)
        samples = sum(result.sample_count for result in results)
        record = await asyncio.to_thread(self.store.seal_weights, partial, closing.round, len(results), samples)
        self.store.record_round(record)
        self._weights = record
        await asyncio.to_thread(self.store.drop_spools_before, closing.round + 1)
        self.intake.forget_round()
        self.events.tell("round_closed", round=closing.round, updates=len(results), samples=samples)
        every = self.config.export.every
        await self._evaluate()
        if closing.round >= self.config.job.rounds or (every and closing.round % every == 0):
            await self._export()
        self.apply(rounds.RoundDone(closing.round, self._clock()))
        if self.state.phase is rounds.Phase.FINISHED:
            await self._complete()

    async def _complete(self) -> None:
        """The job is finished; makes up what a crash may have kept from happening."""
        if self._weights.accuracy < 0:
            await self._evaluate()
        if not self._weights.export_path:
            await self._export()
        for device_id, waiter in list(self._waiters.items()):
            del self._waiters[device_id]
            if not waiter.answer.done():
                waiter.answer.set_result(None)
        self.events.tell("finished", rounds=self.config.job.rounds, accuracy=self._weights.accuracy)
        self.finished.set()

    async def _evaluate(self) -> None:
        weights = self._weights
        try:
            answer = await self._models.request(
                "evaluate",
                model=self.model,
                weights=str(self.store.weights_path(weights.round)),
                test_data=self.config.test.data,
            )
        except FedepthError as error:  # the round stands without its accuracy
            self.events.tell("log", message=f"round {weights.round} could not be evaluated: {error}")
            return
        self.store.set_evaluation(weights.round, answer["accuracy"], answer["loss"])
        self._weights = self._latest()
        self.events.tell("evaluated", round=weights.round, accuracy=answer["accuracy"], loss=answer["loss"])

    async def _export(self) -> None:
        weights = self._weights
        try:
            answer = await self._models.request("export", **export_fields(self.config, self.store, weights))
        except FedepthError as error:  # the weights stand; `fedepth-coordinator export` tries again
            self.events.tell("log", message=f"round {weights.round} could not be exported: {error}")
            return
        self.store.set_export(weights.round, answer["path"], answer["parity_max_abs"])
        self._weights = self._latest()
        self.events.tell(
            "exported",
            round=weights.round,
            path=answer["path"],
            parity_max_abs=answer["parity_max_abs"],
            samples=answer["samples"],
        )

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
            "weights_digest": self._weights.digest,
            "onnx_path": next((each.export_path for each in reversed(done) if each.export_path), ""),
        }

    def state_event(self) -> str:
        return encode_event("state", self.status())

    def unaware_devices(self) -> frozenset[str]:
        """Live devices that have not been told that the job is finished."""
        return rounds.live_devices(self.state, self._clock()) - self.told_finished

    def _name(self, device_id: str) -> str:
        return self._names.get(device_id, device_id)


def average_updates(base: Path, updates: Sequence[tuple[tuple[Path, ...], float]], output: Path) -> None:
    """Writes the mean of updates, each given by its parts and its weight, to `output`."""
    from fedepth.aggregation.mean import (  # numpy: only when there is something to average
        ClientUpdate,
        average,
    )

    average(base, [ClientUpdate(parts, weight) for parts, weight in updates], output)


def export_fields(config: JobConfig, store: Store, weights: RoundRecord, output: str = "") -> dict[str, Any]:
    """The request that exports a round's weights, to `output` or to their place in the state directory."""
    return {
        "model": model_spec(config),
        "weights": str(store.weights_path(weights.round)),
        "weights_digest": weights.digest,
        "job": config.job.name,
        "round": weights.round,
        "test_data": config.test.data,
        "output": output or str(store.export_path(weights.round)),
    }
