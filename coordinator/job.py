"""One job: what devices do goes in, the state machine decides, and what follows is recorded, applied and told.

The order is the point (see `apply`): a change is recorded, then the new state is taken over, then whoever waits or
watches is told. Nothing that tells can fail. What cannot be recorded has not happened: a device is asked to come back,
and what the job itself was to do is tried again until it succeeds.

The event loop decides, and waits for nobody: whatever touches the record, a file or a bucket runs in a thread. One
change is made at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fedepth_wire.chunks import Source
from fedepth_wire.task_messages import model_source

from coordinator.course import Course
from coordinator.fleet import Fleet
from coordinator.global_model import GlobalModel
from coordinator.model_worker.client import Models
from coordinator.observe.events import Events, encode_event
from coordinator.plans import Plans
from coordinator.security.limits import UNKNOWN_TASKS, Limits
from coordinator.store.records import EndedTask, Prepared, Store, TaskRecord
from coordinator.uploads import Uploads, late
from fedepth.aggregation.rules import Norms
from fedepth.errors import UnavailableError, UpdateError
from fedepth.job import model_spec, policy, training_spec
from fedepth.job_sections import JobConfig
from fedepth.models.traced import read_costs
from fedepth.plan import Plan
from fedepth.printable import shortened
from fedepth.rounds import machine
from fedepth.rounds.events import (
    Action,
    Asked,
    EndTask,
    Event,
    GiveTask,
    Log,
    Progressed,
    StartRound,
    TaskFailed,
    Tick,
)
from fedepth.rounds.machine import Phase
from fedepth.rounds.presence import Presence
from fedepth.sizes import format_size
from fedepth.task import DeviceReport, Failure, Outcome, Progress, Result, Task

_MOST_SHOWN = 80  # characters of a name
SPARE_BYTES = 64 << 20  # of the disk, for the record and what else is written

_STANDINGS = {
    "given": machine.Standing.OPEN,
    "accepted": machine.Standing.OPEN,  # that its update is recorded is known from the update
    "lost": machine.Standing.EXPIRED,
    "failed": machine.Standing.FAILED,
    "refused": machine.Standing.FAILED,
}
# What a device would run into again with the same task, whatever else it does.
_FINAL = {Outcome.DIVERGED, Outcome.MODEL}

T = TypeVar("T")


@dataclass
class _Waiter:
    """A device that waits in a call for a task, and the plan that was made for it."""

    report: DeviceReport
    plan: Plan
    answer: asyncio.Future[Task | None]  # None: nothing to do, the job is finished or the call is superseded


@dataclass(frozen=True)
class _Commit:
    """An update that is being admitted."""

    result: Result
    work: asyncio.Task[int]


class Job:
    """One job in progress. Everything is decided in one event loop. It is made in a thread: it reads the record."""

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
        store.answer_promptly()
        self.events = Events()
        self.model = model_spec(config)
        self.model_source = model_source(self.model)
        self.fleet = Fleet(store, self.events, config.limits.devices, clock, self.model)
        self.finished = asyncio.Event()
        self.informed: set[str] = set()
        self.plans = Plans(read_costs(store.files.graph()), policy(config))
        self._prepared = prepared
        self._clock = clock
        self._waiters: dict[str, _Waiter] = {}
        self._run_id = store.run_id
        self._doubtful = False  # something may be recorded of which we were told that it could not be
        self._commits: dict[str, _Commit] = {}  # by task
        self._limits = Limits[object]()
        self._turn = asyncio.Lock()  # held from a decision until it is recorded and taken over
        self._begun: set[asyncio.Task[Any]] = set()  # what goes on when whoever asked for it has gone
        self._course = Course(self)
        self.weights = GlobalModel(config, store, models, self.events, prepared.layout.parameters)
        self.presence = Presence(config.job.lease_s)
        self._recorded = set(store.accepted_ids(self.weights.record.round + 1))
        self.facts = machine.Facts(self._recorded, self.presence)
        self.state = self._restored()
        self.uploads = Uploads(
            store,
            prepared.layout,
            self.accepts,
            self.check_room,
            self._record_update,
            self.weights.path,
            partial(training_spec, config),
            config.guard.learn_norms and config.privacy is None,  # under which nothing may depend on other updates
        )

    def _restored(self) -> machine.State:
        job, finished = self.config.job, self.weights.record.round
        rules = machine.Rules(
            rounds=job.rounds,
            devices_per_round=job.devices_per_round,
            quorum=job.needed,
            gather_s=job.gather_s,
            deadline_s=job.round_deadline_s,
            lease_s=job.lease_s,
            seed=job.seed,
            task_prefix=self._run_id,
        )
        kept = self._assignments(finished + 1)
        return machine.restore(rules, finished, kept, self._clock(), self.weights.why_paused())

    @property
    def graph_digest(self) -> str:
        """sha256 (hex) of the traced model."""
        return self._prepared.graph_digest

    def now(self) -> float:
        """Seconds that never jump."""
        return self._clock()

    def accepts(self, task_id: str) -> bool:
        """Whether an update for this task would count now."""
        return machine.accepts(self.state, self.facts, task_id)

    # --- what devices do

    async def plan_for(self, report: DeviceReport) -> Plan:
        """The plan of this device for the current round.

        Raises:
            PlanError: nothing fits its budget.
        """
        return await self.plans.plan(report, training_spec(self.config, self.state.round))

    async def start_waiting(self, report: DeviceReport, plan: Plan) -> asyncio.Future[Task | None]:
        """Puts a device in line. The future ends with its task, or with None if there is none to wait for.

        Raises:
            UnavailableError: no task is given now, since what comes of it could not be stored.
        """
        missing = self.config.job.devices_per_round - len(self._recorded)
        await asyncio.to_thread(self.check_room, missing * self._prepared.layout.size_bytes)
        older = self._waiters.pop(report.device_id, None)
        if older is not None and not older.answer.done():
            older.answer.set_result(None)
        waiter = _Waiter(report, plan, asyncio.get_running_loop().create_future())
        self._waiters[report.device_id] = waiter
        self.presence.wait(report.device_id, self._clock())
        try:
            await self._follow(Asked(report.device_id, self._clock()))
        except BaseException:  # a device that hangs up, too
            self.stop_waiting(report.device_id, waiter.answer)
            raise
        return waiter.answer

    def stop_waiting(self, device_id: str, answer: asyncio.Future[Task | None]) -> None:
        """Takes a device out of line, unless a newer call of it stands there."""
        waiter = self._waiters.get(device_id)
        if waiter is not None and waiter.answer is answer:
            del self._waiters[device_id]
            self.presence.leave(device_id, self._clock())

    def check_room(self, wanted_bytes: int) -> None:
        """Looks whether the disk takes so much, and another round's weights. To be called in a thread.

        Raises:
            UnavailableError: it does not.
        """
        needed = wanted_bytes + 2 * self.weights.record.size_bytes + SPARE_BYTES
        free = self.store.files.free_bytes()
        if free < needed:
            raise UnavailableError(
                f"the coordinator's disk has {format_size(free)} left, {format_size(needed)} are needed; "
                "its operator must free some space there"
            )

    def why_wait(self) -> str:
        """What a device that gets no task waits for."""
        state = self.state
        if state.phase is Phase.PAUSED:
            return f"the job is paused: {state.why}"
        if state.phase is Phase.GATHERING:
            return machine.waits_for(state, self.facts, self._clock(), least=1)  # the one that asks
        if state.phase is Phase.TRAINING:
            return f"round {state.round} is in progress"
        return f"round {state.round} is being closed"

    def rejected(self, report: DeviceReport, why: str, reason: str = "") -> None:
        """Notes a device that asked and cannot take part as it is."""
        name, device_id = shortened(report.name, _MOST_SHOWN), shortened(report.device_id, _MOST_SHOWN)
        key = f"{device_id} {reason}" if reason == "clone" else device_id  # the other one with this id may take part
        if self.presence.reject(key, f"{name}: {shortened(why)}", self._clock()):
            self.events.send("device_rejected", device=name, device_id=device_id, message=why)

    async def progressed(self, progress: Progress) -> bool:
        """Renews a lease; whether the task is still wanted."""
        task = self.state.tasks.get(progress.task_id)
        if task is None or task.device_id != progress.device_id:
            return False
        await self.touch(progress.task_id)
        fields = {key: value for key, value in vars(progress).items() if key != "loss" or value == value}
        self.events.send("progress", device=self.fleet.name(progress.device_id), **fields)
        return self.accepts(progress.task_id)

    async def touch(self, task_id: str) -> None:
        """A sign of life of a task, such as a chunk of its upload."""
        task = self.state.tasks.get(task_id)
        if task is not None:
            self.presence.see(task.device_id, self._clock())
            if task.standing is machine.Standing.EXPIRED:
                await self._follow(Progressed(task_id, self._clock()))

    async def commit(self, result: Result) -> int:
        """Records an update and returns its round.

        A device that goes away ends its call and not the work: of each task one update at a time is admitted, and
        whoever asks for the same joins.

        Raises:
            UpdateError: it is refused.
            ProtocolError: a part has to be sent again.
            UnavailableError: it cannot be recorded now; the same call may work later.
        """
        task_id = result.task_id
        while (commit := self._commits.get(task_id)) is not None and commit.result != result:
            await asyncio.wait({commit.work})
        if commit is None:
            commit = self._commits[task_id] = _Commit(result, asyncio.create_task(self._commit(result)))
            commit.work.add_done_callback(lambda work: self._commits.pop(task_id))
        return await asyncio.shield(commit.work)

    async def finish_work(self) -> None:
        """Waits until no update is being admitted and no change recorded; what comes meanwhile, too."""
        while begun := {*self._begun, *(commit.work for commit in self._commits.values())}:
            await asyncio.wait(begun)

    async def _commit(self, result: Result) -> int:
        try:
            new = await self.uploads.commit(result)
        except UpdateError as error:
            await self.refuse(result.task_id, result.attempt, result.device_id, error)
            raise
        except (UnavailableError, OSError) as error:
            self._course.tell_trouble(error)
            self._doubtful = True  # the record may have it, and only the word of it be lost
            self.suspect(self.weights.record.digest)  # updates are compared with them
            raise
        self._note_recorded(result)
        if new:
            self.events.send(
                "update_accepted",
                device=self.fleet.name(result.device_id),
                device_id=result.device_id,
                task_id=result.task_id,
                round=result.round,
                bytes=sum(part.size_bytes for part in result.parts),
                samples=result.sample_count,
                seconds=result.seconds,
                stages=result.stages,
            )
        await self._follow(Tick(self._clock()))
        return result.round

    async def _record_update(self, result: Result, norms: Norms) -> None:
        """Records an update that is welcome. Until its round knows of it, nothing else is decided: the round cannot
        close before.

        Raises:
            UpdateError: it is late.
            UnavailableError: it cannot be recorded now.
        """
        async with self._turn:
            if not self.accepts(result.task_id):
                raise late(result.task_id)
            self._doubtful, before = True, self._doubtful
            await self.store.short(self.store.record_update, result, norms)
            self._doubtful = before
            self._note_recorded(result)

    def _note_recorded(self, result: Result) -> None:
        if result.task_id in self.state.tasks:
            self._recorded.add(result.task_id)

    async def refuse(self, task_id: str, attempt: int, device_id: str, error: UpdateError) -> None:
        """Reports and counts a refusal, and ends the task if it was its device's own, of the attempt in work.

        Raises:
            UnavailableError: that cannot be recorded now.
        """
        await self._to_its_end(self._refuse(task_id, attempt, device_id, error))

    async def _refuse(self, task_id: str, attempt: int, device_id: str, error: UpdateError) -> None:
        # Of tasks that never were a device can name any number, and each would take the turn, the record and the log.
        unknown = task_id not in self.state.tasks
        if unknown and self._limits.take(device_id, self.fleet.name(device_id), UNKNOWN_TASKS):
            return
        async with self._turn:
            task = self.state.tasks.get(task_id)
            if task is not None and (task.device_id, task.attempt) == (device_id, attempt) and self.accepts(task_id):
                await self._step(TaskFailed(task_id, self._clock(), "refused", error.reason, str(error)))
            else:
                await self.store.short(self.store.count_refusal, error.reason, str(error), task_id)
        self.events.send(
            "update_refused",
            device=self.fleet.name(device_id),
            device_id=device_id,
            task_id=task_id,
            reason=error.reason,
            message=str(error),
        )

    async def failed(self, failure: Failure) -> bool:
        """Ends a task without an update; whether it is still wanted, which it is not.

        Raises:
            UnavailableError: that cannot be recorded now.
        """
        return await self._to_its_end(self._failed(failure))

    async def _failed(self, failure: Failure) -> bool:
        async with self._turn:
            task = self.state.tasks.get(failure.task_id)
            if task is None or task.device_id != failure.device_id or failure.attempt != task.attempt:
                return False
            if self.accepts(failure.task_id):
                final = failure.outcome in _FINAL
                reason = failure.outcome.value
                await self._step(TaskFailed(failure.task_id, self._clock(), "failed", reason, failure.message, final))
                self.events.send("task_failed", device=self.fleet.name(failure.device_id), **vars(failure))
            return False

    async def file_of(self, digest: str) -> Source | None:
        """The file with this digest that devices may fetch: weights of a round or their index, the graph,
        or the model."""
        if digest == self._prepared.graph_digest:
            return Source(self.store.files.graph(), self._prepared.graph_bytes, digest)
        for source in (self.model_source, self.weights.find_index(digest)):
            if source is not None and source.digest == digest:
                return source
        record = await self.store.short(self.store.find_weights, digest)
        if record is None:
            return None
        return Source(self.store.files.weights(record.round, digest), record.size_bytes, digest)

    def owner_of(self, task_id: str) -> str:
        """The device that a task of the round in work was given to; "" for any other."""
        task = self.state.tasks.get(task_id)
        return "" if task is None else task.device_id

    def suspect(self, digest: str) -> None:
        """Notes that the file with this digest could not be sent."""
        self._course.suspect(digest)

    # --- what follows

    async def apply(self, event: Event) -> None:
        """Feeds one event to the state machine: records what comes out, then takes it over, then tells of it.

        Raises:
            UnavailableError: it cannot be recorded, and has not happened.
        """
        await self._to_its_end(self._apply(event))

    async def _to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Waits for a change, which goes on if whoever waits is cancelled: none is left half done."""
        task = asyncio.create_task(work)
        self._begun.add(task)
        task.add_done_callback(self._begun.discard)
        return await asyncio.shield(task)

    async def _apply(self, event: Event) -> None:
        async with self._turn:
            await self._step(event)

    async def _step(self, event: Event) -> None:
        """As `apply`; whoever calls has the turn."""
        if self._doubtful:
            await self._read_again()
        if isinstance(event, Asked) and event.device_id not in self._waiters:
            event = Tick(event.now)  # it has hung up while it waited for its turn
        state, actions = machine.step(self.state, event, self.facts)
        if self._fixes_statistics(state.round) is not self._fixes_statistics(self.state.round):
            self._have_planned_anew()
            state, actions = machine.step(self.state, event, self.facts)
        given = {action.task_id: self._waiters[action.device_id] for action in actions if isinstance(action, GiveTask)}
        handed = [self._task_record(action) for action in actions if isinstance(action, GiveTask)]
        ended = [
            EndedTask(action.task_id, action.status, action.reason, action.message)
            for action in actions
            if isinstance(action, EndTask)
        ]
        if handed:
            await asyncio.to_thread(self.check_room, 0)
        if handed or ended:
            self._doubtful = True  # until it has worked: the record may have it, and only the word of it be lost
            await self.store.short(self.store.record_step, handed, ended)
            self._doubtful = False
        if state.round != self.state.round:
            self._recorded.clear()
        if state.phase is not self.state.phase:
            self._course.wake()
        self.state = state
        for action in actions:
            if isinstance(action, GiveTask):
                self._hand_out(action, given[action.task_id])
            else:
                self._tell(action)

    def _fixes_statistics(self, number: int) -> bool:
        return training_spec(self.config, number).fixed_statistics

    def _have_planned_anew(self) -> None:
        """Lets those in line ask again: their plans are for what units cost in the round before."""
        for device_id, waiter in list(self._waiters.items()):
            self.stop_waiting(device_id, waiter.answer)
            if not waiter.answer.done():
                waiter.answer.set_result(None)

    async def _read_again(self) -> None:
        """Takes the round over from the record, after a write of which nobody knows what became."""
        number = self.state.round
        await self.store.short(self.store.check_hold)  # which waits for it
        recorded = await self.store.short(self.store.accepted_ids, number)
        tasks = await self.store.short(self._assignments, number)
        self._recorded.clear()
        self._recorded.update(recorded)
        self.state = machine.taken_over(self.state, tasks, self._clock())
        self._doubtful = False

    def _assignments(self, number: int) -> list[machine.Assignment]:
        return [
            machine.Assignment(task.task_id, task.device_id, task.attempt, _STANDINGS[task.status])
            for task in self.store.tasks_of(number)
        ]

    async def _follow(self, event: Event) -> None:
        """An event that nobody waits for. Where it cannot be recorded, the next tick finds the same to do."""
        try:
            await self.apply(event)
        except UnavailableError as error:
            self._course.tell_trouble(error)

    def _task_record(self, action: GiveTask) -> TaskRecord:
        waiter = self._waiters[action.device_id]
        samples = waiter.report.sample_count
        return TaskRecord(action.task_id, action.round, action.device_id, action.attempt, "given", waiter.plan, samples)

    def _tell(self, action: Action) -> None:
        if isinstance(action, StartRound):
            names = [self.fleet.name(device) for device in action.devices]
            self.events.send("round_started", round=action.round, devices=names)
        elif isinstance(action, EndTask) and action.status == "lost":
            self.events.send(
                "task_failed",
                device=self.fleet.name(action.device_id),
                device_id=action.device_id,
                task_id=action.task_id,
                outcome="lost",
                message=action.message,
            )
        elif isinstance(action, Log):
            self.events.send("log", message=action.message)

    def _hand_out(self, action: GiveTask, waiter: _Waiter) -> None:
        """Answers with a task that is recorded now: the call that it was planned for, or a newer one of that device.
        One that has hung up meanwhile asks again, and is given the task once more."""
        now = self._waiters.pop(action.device_id, waiter)
        self.presence.leave(action.device_id, self._clock())
        weights, index = self.weights.record, self.weights.index
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
            weights_digest=weights.digest,
            weights_bytes=weights.size_bytes,
            run_id=self._run_id,
            index_digest=index.digest if index else "",
            index_bytes=index.size_bytes if index else 0,
        )
        if not now.answer.done():
            now.answer.set_result(task)
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
            weights_bytes=weights.size_bytes,
        )

    async def run(self) -> None:
        """Lets time pass, and closes rounds, until it is cancelled.

        Raises:
            JobError: no device can train this job.
            FedepthError: a round could not be averaged or recorded, for good. The state is sound; start again.
        """
        await self._course.run()

    def finish(self) -> None:
        """Lets everybody know that the job is over."""
        for device_id, waiter in list(self._waiters.items()):
            del self._waiters[device_id]
            if not waiter.answer.done():
                waiter.answer.set_result(None)
        self.finished.set()
        self.events.send("finished", rounds=self.config.job.rounds, accuracy=self.weights.record.accuracy)

    # --- for people

    async def status(self) -> dict[str, Any]:
        """The job as it stands."""
        latest = await self.store.short(self.store.summary)
        return {
            "job": self.config.job.name,
            "phase": self.state.phase.value,
            "round": self.state.round,
            "rounds": self.config.job.rounds,
            "devices": len(self._live()),
            "accuracy": -1.0 if latest.accuracy is None else latest.accuracy,
            "weights_digest": self.weights.record.digest,
            "onnx_path": latest.export_path,
            "message": self.state.why or self.weights.long_work.describe() or self._why_nothing_happens(),
            "epsilon": latest.epsilon or 0.0,
            "delta": (latest.delta or 0.0) if latest.epsilon else 0.0,
            "not_private": latest.not_private,
            "unpublished": latest.unpublished,
        }

    def _why_nothing_happens(self) -> str:
        if self.state.phase is not Phase.GATHERING:
            return ""
        return machine.waits_for(self.state, self.facts, self._clock())

    async def state_event(self) -> str:
        return encode_event("state", await self.status())

    def unaware_devices(self) -> frozenset[str]:
        """Live devices that do not know yet that the job is finished."""
        return self._live() - self.informed

    def _live(self) -> frozenset[str]:
        working = {task.device_id for task in self.state.tasks.values() if task.standing is machine.Standing.OPEN}
        return frozenset(self.presence.live(self._clock())) | working
