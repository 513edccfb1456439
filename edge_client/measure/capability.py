"""What this device can train, measured on it: every unit of a model alone, and plans at a ladder of budgets.

Real training on images of noise, in the trainer that takes part in jobs, under the limit that it enforces there. So a
row that says "trained" is a proof for this device and not a forecast.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from edge_client.config import Config, MemoryConfig
from edge_client.measure.calibration import room_for_tracing
from edge_client.measure.trial import TrialModel, trial_request, try_training, write_noise
from edge_client.memory.probe import Memory, budget_from, measure
from edge_client.trainer.client import TrainerKeeper, TrainerProcess, torch_version
from edge_client.trainer.protocol import Done, Failed
from fedepth.budget import Budget
from fedepth.costs import Calibration
from fedepth.errors import PlanError, StateError
from fedepth.estimate.peak import needed_bytes
from fedepth.estimate.tracer.client import tracer
from fedepth.plan import Plan, Policy, Stage
from fedepth.planning.explain import ladder
from fedepth.planning.planner import full_training_peak, make_plan, unit_plan
from fedepth.sizes import format_size
from fedepth.task import ModelSpec, Outcome, StageResult, TrainingSpec

RUNGS = 6
_STEPS = 3
_FEWEST_SAMPLES = 256  # fewer take too short to be timed
_DESKTOP = Calibration()

OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class CapabilityRequest:
    """What to report on.

    Attributes:
        sample_count: images of noise to train on; decides on caches as in a job.
        budgets: the ladder in bytes; chosen between the smallest plan and full training if empty.
    """

    model: ModelSpec
    training: TrainingSpec
    policy: Policy
    sample_count: int
    budgets: tuple[int, ...] = ()


class Verdict(str, Enum):
    """What came of a row."""

    TRAINED = "trained"
    TOO_LARGE = "too_large"  # needs more than this device has free; not run
    NO_PLAN = "no_plan"  # nothing fits into the row's budget
    OVER_BUDGET = "over_budget"
    DIED = "trainer_died"
    FAILED = "failed"


@dataclass(frozen=True)
class Measured:
    """What training took: of several stages the largest peaks, and all seconds, the computation of inputs included.

    Attributes:
        seconds_per_1000_samples: for one pass over so many samples, all stages together; extrapolated.
    """

    rehearsed_peak_bytes: int
    measured_peak_bytes: int
    steps: int
    seconds: float
    seconds_per_step: float
    seconds_per_1000_samples: float


@dataclass(frozen=True)
class End:
    """What came of one training run. `message` says why it was not trained; what was, has been measured."""

    verdict: Verdict
    message: str = ""
    measured: Measured | None = None


@dataclass(frozen=True)
class UnitRow:
    """One unit trained alone, with the batch in one piece, within all that is free.

    Attributes:
        predicted_peak_bytes: before the margin.
        needed_bytes: with it.
    """

    unit: int
    name: str
    stage: Stage
    predicted_peak_bytes: int
    needed_bytes: int
    end: End


@dataclass(frozen=True)
class PlanRow:
    """The best plan for one budget, under that budget as its limit. Without a plan the sizes tell the smallest one's.

    Attributes:
        predicted_peak_bytes: before the margin; 0 without a plan.
        needed_bytes: with it.
    """

    budget_bytes: int
    plan: Plan | None
    predicted_peak_bytes: int
    needed_bytes: int
    end: End


@dataclass(frozen=True)
class Capability:
    """What this device can train.

    Attributes:
        device: what training might add when the report began.
        calibration: what the predictions count with.
        allocator: name and version of the trainer's memory allocator.
        busy: share of its cores that was busy when the report began, from the load of the last minute; times of a
            busy device say little.
        full_training_bytes: the budget that training all units at once with the batch in one piece needs.
    """

    model: str
    input_shape: tuple[int, ...]
    training: TrainingSpec
    policy: Policy
    sample_count: int
    device: Budget
    calibration: Calibration
    allocator: str
    torch: str
    busy: float
    full_training_bytes: int
    units: tuple[UnitRow, ...]
    plans: tuple[PlanRow, ...]


def default_samples(batch: int) -> int:
    """Enough for a few steps, and for a time that can be told."""
    return max(_STEPS * batch, _FEWEST_SAMPLES)


async def measure_capability(
    wanted: CapabilityRequest,
    config: Config,
    *,
    calibration: Calibration = _DESKTOP,
    busy: float = 0.0,
    on_progress: OnProgress = lambda _: None,
) -> Capability:
    """Traces the model and trains it row by row. Takes minutes for a large model; cancelling ends the trainer.

    Args:
        calibration: of this device; without one the prediction counts as for a desktop.
        busy: what `busy_share` said before anything was measured.
        on_progress: called with what is being done.

    Raises:
        ConfigError: there is no torch here.
        PlanError: too little memory is free to trace a model.
        ModelError: the model cannot be built, exported or cut.
        ChildError: no trainer starts here, or the model could not be traced.
        StateError: the state directory, where files lie meanwhile, cannot be written.
    """
    torch_version()
    with _scratch_folder(config.state_dir) as folder:
        on_progress("measuring what is free")
        await room_for_tracing(config.trainer, config.memory)
        on_progress(f"tracing {wanted.model.name}")
        graph, weights = folder / "graph.json", folder / "weights.safetensors"
        async with tracer() as trace:
            costs = await trace.trace(wanted.model, wanted.training, graph, weights)
        model = TrialModel(wanted.model, wanted.training, replace(costs, calibration=calibration), graph, weights)
        keeper = TrainerKeeper(config.trainer)
        bench = Bench(model, write_noise(folder / "data", wanted.model, wanted.sample_count), keeper, config.memory)
        try:
            return await measured_capability(wanted, bench, busy, on_progress)
        finally:
            await keeper.close()


class Bench:
    """Trains plans of one model, one after the other, in a trainer that stays warm while it can."""

    def __init__(
        self,
        model: TrialModel,
        data: Path,
        keeper: TrainerKeeper,
        memory: MemoryConfig,
        measure: Callable[[], Memory] = measure,
    ) -> None:
        """`data`: a folder with images; files of the training lie beside it for a while."""
        self.model = model
        self._data = data
        self._keeper = keeper
        self._memory = memory
        self._measure = measure

    async def trainer(self) -> TrainerProcess:
        """A warm one."""
        return await self._keeper.take()

    def free(self, trainer: TrainerProcess) -> Budget:
        """What training may add now; what the trainer holds counts as free."""
        return budget_from(self._measure(), trainer.start_bytes, self._memory, trainer.held_bytes)

    async def run(self, plan: Plan, most_bytes: int) -> End:
        """Trains under a limit of `most_bytes`, or of what is free where that is less."""
        trainer = await self.trainer()
        limit = min(most_bytes, self.free(trainer).budget_bytes)
        needed = needed_bytes(plan.predicted_peak_bytes)
        if needed > limit:
            return _too_large(needed, limit)
        folder = self._data.parent / "run"
        request = trial_request(self.model, plan, limit, self._data, folder, enforce=True)
        try:
            end = await try_training(trainer, request)
            if isinstance(end, Failed) and end.capped:
                end = await try_training(await self.trainer(), replace(request, release_freed=True))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(end, Done):
            return _trained(end.result.stages, limit)
        if end.outcome is Outcome.TRAINER_DIED:
            await self._keeper.drop()
        return _failed(end)


def busy_share() -> float:
    """The share of this device's cores that was busy in the last minute."""
    try:
        return min(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    except OSError:  # not every system says so
        return 0.0


async def measured_capability(
    wanted: CapabilityRequest, bench: Bench, busy: float, on_progress: OnProgress
) -> Capability:
    """The rows of a model that is traced already. Rows that go wrong say so; they do not end the report."""
    on_progress("starting the trainer")
    trainer = await bench.trainer()
    device = bench.free(trainer)
    costs = bench.model.costs
    full = full_training_peak(costs, wanted.training, wanted.sample_count)
    return Capability(
        model=wanted.model.name,
        input_shape=wanted.model.input_shape,
        training=wanted.training,
        policy=wanted.policy,
        sample_count=wanted.sample_count,
        device=device,
        calibration=costs.calibration,
        allocator=trainer.allocator,
        torch=torch_version(),
        busy=busy,
        full_training_bytes=needed_bytes(full.total),
        units=await _unit_rows(wanted, bench, device.budget_bytes, on_progress),
        plans=await _plan_rows(wanted, bench, device.budget_bytes, on_progress),
    )


async def _unit_rows(
    wanted: CapabilityRequest, bench: Bench, free_bytes: int, on_progress: OnProgress
) -> tuple[UnitRow, ...]:
    costs = bench.model.costs
    rows = []
    for index, unit in enumerate(costs.units):
        on_progress(f"unit {index} of 0-{len(costs.units) - 1}: {unit.name}")
        plan = unit_plan(
            costs, unit=index, training=wanted.training, sample_count=wanted.sample_count, policy=wanted.policy
        )
        end = await bench.run(plan, free_bytes)
        rows.append(UnitRow(index, unit.name, plan.stages[0], plan.predicted_peak_bytes, plan.budget_bytes, end))
    return tuple(rows)


async def _plan_rows(
    wanted: CapabilityRequest, bench: Bench, free_bytes: int, on_progress: OnProgress
) -> tuple[PlanRow, ...]:
    """From the smallest budget to the largest, so that a plan that several give is proved under the smallest."""
    on_progress("choosing budgets" if not wanted.budgets else "planning")
    budgets = sorted(set(wanted.budgets)) or _ladder(wanted, bench, free_bytes)
    rows: list[PlanRow] = []
    for number, budget_bytes in enumerate(budgets, 1):
        try:
            plan = make_plan(
                bench.model.costs,
                budget_bytes=budget_bytes,
                training=wanted.training,
                sample_count=wanted.sample_count,
                policy=wanted.policy,
            )
        except PlanError as error:
            message = f"the smallest plan needs {format_size(error.needed_bytes, round_up=True)}"
            rows.append(PlanRow(budget_bytes, None, 0, error.needed_bytes, End(Verdict.NO_PLAN, message)))
            continue
        on_progress(f"budget {number} of {len(budgets)}: {format_size(budget_bytes)}, {plan.blocks}")
        end = _known(rows, plan) or await bench.run(plan, budget_bytes)
        peak = plan.predicted_peak_bytes
        rows.append(PlanRow(budget_bytes, plan, peak, needed_bytes(peak), end))
    return tuple(rows)


def _ladder(wanted: CapabilityRequest, bench: Bench, free_bytes: int) -> list[int]:
    try:
        rungs = ladder(
            bench.model.costs,
            most_bytes=free_bytes,
            training=wanted.training,
            sample_count=wanted.sample_count,
            policy=wanted.policy,
            count=RUNGS,
        )
    except PlanError as error:
        return [error.needed_bytes]  # shown, as more than this device has
    return [rung.budget_bytes for rung in rungs]


def _known(rows: Sequence[PlanRow], plan: Plan) -> End | None:
    """How the same plan was trained under a smaller budget."""
    for row in rows:
        if row.end.verdict is Verdict.TRAINED and row.plan and row.plan.stages == plan.stages:
            return row.end
    return None


def _too_large(needed: int, free: int) -> End:
    return End(
        Verdict.TOO_LARGE, f"needs {format_size(needed, round_up=True)}, {format_size(max(0, free))} free; not run"
    )


def _trained(stages: Sequence[StageResult], limit_bytes: int) -> End:
    seconds = sum(stage.seconds for stage in stages)
    steps = sum(stage.steps for stage in stages)
    peak = max(stage.measured_peak_bytes for stage in stages)
    measured = Measured(
        rehearsed_peak_bytes=max(stage.rehearsed_peak_bytes for stage in stages),
        measured_peak_bytes=peak,
        steps=steps,
        seconds=seconds,
        seconds_per_step=seconds / steps,
        seconds_per_1000_samples=sum(1000 * stage.seconds / stage.samples_seen for stage in stages),
    )
    if peak > limit_bytes:
        message = f"took {format_size(peak - limit_bytes, round_up=True)} more than its limit"
        return End(Verdict.OVER_BUDGET, message, measured)
    return End(Verdict.TRAINED, measured=measured)


def _failed(end: Failed) -> End:
    if end.outcome is Outcome.DECLINED:
        return _too_large(end.needed_bytes, end.budget_bytes)
    verdicts = {Outcome.OVER_BUDGET: Verdict.OVER_BUDGET, Outcome.TRAINER_DIED: Verdict.DIED}
    return End(verdicts.get(end.outcome, Verdict.FAILED), end.message)


@contextmanager
def _scratch_folder(state: Path) -> Iterator[Path]:
    """In the state directory, which lies on a disk; the system's folder for temporary files may lie in memory."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="report-", dir=state)
    except OSError as error:
        raise StateError(f"{state} cannot be used as state directory: {error.strerror}; give --state DIR") from None
    with folder as path:
        yield Path(path).resolve()
