"""One task on this device: check it, fetch its weights, plan for what is free now, train, keep the update."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import structlog

from edge_client.backoff import Backoff, DiskWait
from edge_client.call_errors import TemporaryError
from edge_client.config import Config
from edge_client.early_upload import EarlyUpload
from edge_client.memory.budget import Budgets
from edge_client.outbox import Outbox, trained_result
from edge_client.progress import ProgressReporter
from edge_client.samples import Samples
from edge_client.trainer.client import TrainerKeeper, TrainerProcess
from edge_client.trainer.protocol import RESULT, Done, Failed, Measure, Rehearsing, StageDone, TrainRequest
from edge_client.transport import Transport
from fedepth.budget import Budget
from fedepth.costs import Calibration, ModelCosts
from fedepth.errors import (
    ChildError,
    DataError,
    DiskError,
    FedepthError,
    ModelError,
    OverBudgetError,
    PlanError,
    ProtocolError,
)
from fedepth.estimate.peak import needed_bytes
from fedepth.files import disk_errors
from fedepth.layout import Encoding
from fedepth.models.traced import read_costs
from fedepth.peers import Peers, peers_folder
from fedepth.plan import Plan, Stage
from fedepth.planning.check import check_plan
from fedepth.planning.planner import make_plan, smallest_peak
from fedepth.planning.smaller import SMALLER_PLANS, smaller_limit
from fedepth.residuals import Residuals, residuals_folder
from fedepth.sizes import format_size
from fedepth.task import Failure, Outcome, Progress, Result, Task

FETCHES = 3  # of a file that comes damaged
DISK_WAITS = 10  # of DISK_PAUSE_S each
CHECKS = 2  # of the data, in one task
_PLANS_REMEMBERED = 64
_log = structlog.get_logger()

_OUTCOMES: tuple[tuple[type[FedepthError], Outcome], ...] = (
    (DataError, Outcome.DATA),
    (ModelError, Outcome.MODEL),
    (PlanError, Outcome.DECLINED),
    (OverBudgetError, Outcome.OVER_BUDGET),
    (ChildError, Outcome.TRAINER_DIED),
    (DiskError, Outcome.DECLINED),
)


class TaskRunner:
    """Carries out tasks, one at a time. Cancelling `run` ends the trainer.

    Attributes:
        is_storing: the task is trained, and lies where it was trained until the disk takes it. Cancelled by then, it
            is found there by the next agent.
        room_bytes: what the last task has found missing on the disk; 0 if nothing was, or nobody knows how much.
    """

    def __init__(
        self,
        config: Config,
        samples: Samples,
        device_id: str,
        transport: Transport,
        keeper: TrainerKeeper,
        budgets: Budgets,
        outbox: Outbox,
        residuals: Residuals,
        backoff: Backoff,
        disk: DiskWait,
        report: Callable[[Progress], None],
        calibration: Calibration,
    ) -> None:
        self._config = config
        self._samples = samples
        self._calibration = calibration
        self._device_id = device_id
        self._transport = transport
        self._keeper = keeper
        self._budgets = budgets
        self._outbox = outbox
        self._backoff = backoff
        self._disk = disk
        self._report = report
        self.is_storing = False
        self.room_bytes = 0
        # The last plans that met the cap on their heap, unless they release at once.
        self._released: deque[tuple[Stage, ...]] = deque(maxlen=_PLANS_REMEMBERED)
        self._peers = Peers(config.state_dir)
        self._residuals = residuals
        self._folder = config.state_dir / "work"
        self._left = sorted(self._folder.glob("*"))  # by an agent that was stopped or killed, or by us

    def recover(self) -> bool:
        """Stores what was trained and could not be stored any more; deletes what else is left of tasks.

        Returns whether there was something to store.

        Raises:
            DiskError: it cannot be stored now.
        """
        found = False
        while self._left:
            folder = self._left[-1]
            found |= self._outbox.recover(_output(folder))
            if not _output(folder).exists():  # the update is kept, so what came with it counts
                self._peers.keep(_peers(folder))
                self._residuals.keep(_residuals(folder))
            _discard(self._left.pop())
        return found

    async def run(self, task: Task, planned_samples: int) -> Result | Failure:
        """The task, to its end. A result lies in the outbox already.

        Args:
            planned_samples: how many the coordinator was told of. It made its plan for so many, and takes no update of
                more, so that what has come since waits for the next task.
        """
        folder = self._folder / f"{task.task_id}-{task.attempt}"
        reporter = ProgressReporter(task, self._device_id, self._report)
        reporter.activity("downloading")
        try:
            done = await self._trained_with_room(task, folder, planned_samples, reporter)
            self._keeper.rest()
            await self._store(done.result, _output(folder), reporter)
            self._keep_own(folder)
        except FedepthError as error:
            return _failure(task, self._device_id, error)
        else:
            self._budgets.succeeded()
            return done.result
        finally:
            self._keeper.rest()
            left = not _output(folder).exists() and (_peers(folder).exists() or _residuals(folder).exists())
            if left or self.is_storing or (_output(folder) / RESULT).exists():
                self._left.append(folder)  # for `recover`
            else:
                _discard(folder)

    async def _trained_with_room(
        self, task: Task, folder: Path, planned_samples: int, reporter: ProgressReporter
    ) -> Done:
        """`_trained_on_sound_files`, again while the disk does not take what it writes.

        A task that has waited long is given back: another device can train it meanwhile.
        """
        self.room_bytes = 0
        for wait in itertools.count(1):
            try:
                done = await self._trained_on_sound_files(task, folder, planned_samples, reporter)
            except DiskError as error:
                self.room_bytes = error.needed_bytes
                if wait > DISK_WAITS:
                    raise
                reporter.activity("waiting for the disk")
                await self._disk.pause("a task waits for the disk", error)
            else:
                self._disk.reset()
                return done
        raise AssertionError("not reached")

    async def _trained_on_sound_files(
        self, task: Task, folder: Path, planned_samples: int, reporter: ProgressReporter
    ) -> Done:
        """Trains. Where a file turns out to be damaged, all are decoded, and training begins anew without those that
        are damaged; what is reported is what was trained on."""
        checks = 0
        while True:
            try:
                return await self._trained(task, folder, planned_samples, reporter)
            except _TrainerFailed as error:
                checks += 1
                if not error.end.damaged or checks > CHECKS:
                    raise
                _log.warning("a file turned out to be damaged; checking all of them", message=error.end.message)
            await self._keeper.drop()  # its memory may be needed to decode them
            reporter.activity("checking the data")
            await self._samples.look(decode=True)

    async def _trained(self, task: Task, folder: Path, planned_samples: int, reporter: ProgressReporter) -> Done:
        with disk_errors("the task cannot be worked on", folder):
            summary = await self._samples.for_task(task)
            graph = await self._fetched(self._transport.fetch_graph, task)
            costs = (await asyncio.to_thread(read_costs, graph)).of(task.training)
            check_plan(costs, task.plan)
            weights = await self._fetched(self._transport.fetch_weights, task)
            peers = await asyncio.to_thread(self._peers.of, task)
            left_out = await asyncio.to_thread(self._residuals.of, task)
            reporter.activity("starting the trainer")
            request = TrainRequest(
                task=task,
                plan=task.plan,
                budget=self._budgets.budget(self._keeper.held_bytes, self._keeper.baseline_bytes),
                graph=str(graph.resolve()),
                calibration=self._calibration,
                weights=str(weights.resolve()),
                data=str(self._config.data_dir.resolve()),
                output=str(_output(folder).resolve()),
                cache=str((folder / "cache").resolve()),
                device_id=self._device_id,
                enforce=self._config.trainer.enforce,
                most_samples=planned_samples,
                damage=tuple(self._samples.damage.keys),
                peers=tuple(str(path.resolve()) if path else "" for path in peers),
                peers_output=str(peers_folder(_peers(folder), task).resolve()),
                left_out=tuple(str(path.resolve()) for path in left_out),
                left_out_output=_left_out_output(folder, task),
            )
            samples = min(summary.sample_count, planned_samples)
            costs = replace(costs, calibration=self._calibration)
            return await self._train(request, costs, samples, reporter, keep_plan=samples == planned_samples)

    async def _store(self, result: Result, parts: Path, reporter: ProgressReporter) -> None:
        """Hands the update to the outbox; waits while the disk does not take it, since it is not trained again."""
        self.is_storing = True
        while True:
            try:
                self._outbox.put(result, parts)
            except DiskError as error:
                reporter.activity("waiting for the disk")
                await self._disk.pause("a trained update cannot be stored yet; it waits where it was trained", error)
            except FedepthError:  # what the trainer promised is not there
                self.is_storing = False
                raise
            else:
                self.is_storing = False
                return

    def _keep_own(self, folder: Path) -> None:
        """What stays of a task, after its update is kept. What the disk does not take now, `recover` takes over."""
        for what, keep, left in (
            ("peers", self._peers.keep, _peers(folder)),
            ("residuals", self._residuals.keep, _residuals(folder)),
        ):
            try:
                keep(left)
            except DiskError as error:
                _log.warning(f"{what} cannot be kept yet", error=str(error))

    async def _fetched(self, fetch: Callable[[Task], Awaitable[Path]], task: Task) -> Path:
        """Retries while the coordinator is away or busy; what has arrived so far is kept."""
        damaged = 0
        while True:
            try:
                path = await fetch(task)
            except TemporaryError as error:
                await self._backoff.pause(error)
            except ProtocolError as error:
                damaged += 1
                if damaged == FETCHES:
                    raise
                _log.warning("a file came damaged; fetching it again", error=str(error))
            else:
                self._backoff.reset()
                return path

    async def _train(
        self, request: TrainRequest, costs: ModelCosts, samples: int, reporter: ProgressReporter, *, keep_plan: bool
    ) -> Done:
        """Trains with smaller and smaller plans until one stays inside its budget."""
        limit: int | None = None
        deaths = smaller = 0
        while True:
            for own in filter(None, (request.peers_output, request.left_out_output)):
                shutil.rmtree(own, ignore_errors=True)  # first: without its output they would be kept
            for folder in (request.output, request.cache):
                shutil.rmtree(folder, ignore_errors=True)
                Path(folder).mkdir(parents=True)
            try:
                trainer = await self._keeper.take()
                self._budgets.learn_start(trainer.start_bytes)
                budget = self._budgets.budget(trainer.held_bytes, trainer.baseline_bytes)
                plan = await self._plan(request.task, costs, budget, samples, limit, keep_plan)
                release_freed = plan.stages in self._released
                end = await self._train_once(
                    trainer, replace(request, plan=plan, budget=budget, release_freed=release_freed), reporter
                )
            except ChildError as error:
                await self._keeper.drop()
                trained = trained_result(Path(request.output))
                if trained is not None:
                    _log.warning("the trainer died after its last act; what it trained is there", error=str(error))
                    return Done(trained)
                if error.returncode is not None:  # a trainer that writes nonsense has not met its memory's end
                    self._budgets.died()
                deaths += 1
                _log.error("the trainer died", error=str(error), deaths=deaths, task=request.task.task_id)
                if deaths == 2:
                    raise
                continue
            if isinstance(end, Done):
                return end
            if end.disk:
                raise DiskError(end.message, needed_bytes=end.disk_bytes)
            if end.outcome is not Outcome.OVER_BUDGET:
                if (end.outcome is Outcome.DIVERGED or end.peers) and plan.models > 1 and any(request.peers):
                    # Whatever they hold, they cost no more than themselves: the update may be sound without them.
                    self._peers.drop(f"training failed with them, and begins again with new ones: {end.message}")
                    request = replace(request, peers=("",) * len(request.peers))
                    continue
                raise _TrainerFailed(end)
            if end.capped and not release_freed:
                _log.warning(
                    "a stage met the cap on its heap; trying the same plan, releasing freed pages at once",
                    message=end.message,
                )
                self._released.append(plan.stages)
                continue
            smaller += 1
            task = request.task
            least = smallest_peak(costs, task.training, samples, task.policy)
            limit = smaller_limit(plan, end.miss_bytes, least, smaller)
            _log.warning(
                "a stage went over its budget",
                message=end.message,
                stage=end.stage,
                miss=format_size(end.miss_bytes),
                next_plan_at_most=format_size(limit),
                try_number=smaller,
            )
            if smaller > SMALLER_PLANS:
                raise OverBudgetError(
                    f"{SMALLER_PLANS} smaller plans went over their budget too; the last: {end.message}",
                    stage=end.stage,
                    miss_bytes=end.miss_bytes,
                )

    async def _plan(
        self, task: Task, costs: ModelCosts, budget: Budget, samples: int, limit: int | None, keep: bool
    ) -> Plan:
        """The coordinator's plan if it still holds, or one for what is free now.

        Raises:
            PlanError: nothing fits what is free.
            OverBudgetError: nothing fits below `limit`, which plans that went over have set.
        """
        free = budget.budget_bytes
        enough = free >= max(task.plan.budget_bytes, needed_bytes(task.plan.predicted_peak_bytes))
        if enough and keep and limit is None:
            return task.plan
        allowed = free if limit is None else min(free, limit)
        try:
            # In a thread: a deep model takes a second on a small board, and the lease must be renewed.
            plan = await asyncio.to_thread(
                make_plan,
                costs,
                budget_bytes=allowed,
                training=task.training,
                sample_count=samples,
                policy=task.policy,
            )
        except PlanError as error:
            if limit is None or limit > free:
                raise
            raise _NothingSmaller(error) from None
        _log.info(
            "planned again on the device",
            blocks=plan.blocks,
            predicted_peak=format_size(plan.predicted_peak_bytes),
            budget=format_size(allowed),
            was_made_for=format_size(task.plan.budget_bytes),
        )
        return plan

    async def _train_once(
        self, trainer: TrainerProcess, request: TrainRequest, reporter: ProgressReporter
    ) -> Done | Failed:
        """One request to the trainer, with its events sent on. A death in the rehearsal means: over budget."""
        rehearsing = False
        early = EarlyUpload(self._transport, request.task, self._device_id, request.plan, Path(request.output))
        try:
            async with early:
                async for event in trainer.train(request):
                    rehearsing = isinstance(event, Rehearsing) or (rehearsing and isinstance(event, Measure))
                    if isinstance(event, Measure):
                        # The trainer counts from its baseline on; the budget needs all that it holds.
                        held = event.baseline_anonymous_bytes + event.held_bytes
                        await trainer.answer(self._budgets.budget(held, event.baseline_bytes))
                    elif isinstance(event, (Done, Failed)):
                        return event
                    else:
                        reporter.send(event)
                    if isinstance(event, StageDone):
                        early.add(event.part)
        except asyncio.CancelledError:
            await self._keeper.drop()  # which is how a training ends before its time
            raise
        except ChildError as error:
            if not rehearsing or error.returncode is None:  # it has hung, or writes nonsense, whatever its plan needs
                raise
            await self._keeper.drop()
            return Failed(Outcome.OVER_BUDGET, f"the trainer died in its rehearsal: {error}")
        raise ChildError("the trainer ended its events without done or failed")


def _output(folder: Path) -> Path:
    """Where the trainer puts the parts of a task whose folder this is."""
    return folder / "output"


def _discard(folder: Path) -> None:
    """Deletes a task's folder. What goes with its update goes first: an output that is missing means that the update is
    kept, and whoever is killed in between would have it count."""
    for each in (_peers(folder), _residuals(folder), folder):
        shutil.rmtree(each, ignore_errors=True)


def _peers(folder: Path) -> Path:
    """Where its peers lie until its update is kept."""
    return folder / "peers"


def _residuals(folder: Path) -> Path:
    """Where what it leaves out lies until its update is kept."""
    return folder / "residuals"


def _left_out_output(folder: Path, task: Task) -> str:
    """Where the trainer puts what its encoding leaves out; "" where that is not kept."""
    if task.training.encoding is not Encoding.INT8:
        return ""
    return str(residuals_folder(_residuals(folder), task).resolve())


class _TrainerFailed(FedepthError):
    """The trainer gave up and said why."""

    def __init__(self, end: Failed) -> None:
        super().__init__(end.message)
        self.end = end


class _NothingSmaller(OverBudgetError):
    """Plans went over their budget until none smaller was left."""

    def __init__(self, error: PlanError) -> None:
        super().__init__(f"went over its budget, and {error}", stage=0, miss_bytes=0)
        self.needed_bytes = error.needed_bytes
        self.budget_bytes = error.budget_bytes


def _failure(task: Task, device_id: str, error: FedepthError) -> Failure:
    if isinstance(error, _TrainerFailed):
        end = error.end
        outcome, needed, budget = end.outcome, end.needed_bytes, end.budget_bytes
    else:
        outcome = next((name for kind, name in _OUTCOMES if isinstance(error, kind)), Outcome.ERROR)
        needed = error.needed_bytes if isinstance(error, (PlanError, _NothingSmaller)) else 0
        budget = error.budget_bytes if isinstance(error, (PlanError, _NothingSmaller)) else 0
    return Failure(task.task_id, task.attempt, device_id, outcome, str(error), needed, budget)
