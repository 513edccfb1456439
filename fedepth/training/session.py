"""One task on one device: warm up, rehearse, train. A trainer calls it, or a simulation; both hear of it by hooks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch

from fedepth.costs import Calibration
from fedepth.data.read import Images, open_images
from fedepth.data.row_files import find_rows, fingerprint
from fedepth.errors import ModelError, StateError
from fedepth.estimate.peak import FLOAT_BYTES
from fedepth.memory import allocator
from fedepth.memory.device import new_meter
from fedepth.memory.meter import Baseline, Meter
from fedepth.models.run import Model
from fedepth.models.traced import TracedModel, read_traced
from fedepth.plan import Plan, Stage
from fedepth.planning.check import check_plan
from fedepth.task import Heads, ModelSpec, PartInfo, Result, StageResult, Task
from fedepth.training.context import TrainingContext
from fedepth.training.limits import Peaks
from fedepth.training.rehearsal import FirstImages, rehearse
from fedepth.training.stages import Hooks, fitted, train
from fedepth.training.warmup import warm_up
from fedepth.weights import Reader, open_weights

_MOST_REHEARSED = 64  # plans of tiers and numbers of samples, which take turns in a simulation


@dataclass(frozen=True)
class Assignment:
    """One task to train, and the files that it needs.

    Attributes:
        plan: the task's plan, or a smaller one where memory has shrunk.
        graph: the traced model of the job (fedepth.models.traced).
        calibration: of this device.
        weights: the global weights.
        data: a folder with images to train on, or files with rows, see `open_images`.
        output: where the parts of the update go.
        cache: where cached inputs go that do not lie in RAM.
        enforce: set RLIMIT_DATA, and stop a stage whose first step goes over the budget.
        most_samples: train on the first so many of the data, which may have grown since; 0 for all.
        release_freed: stages give back what they free at once, as in their rehearsals; else they keep a little of it,
            for speed.
        damage: keys of image files to leave out (fedepth.data.damage).
        images: what to train on, where that is open already; else it is opened from `data`.
        rehearse: try every stage for one step first. A simulation that enforces no budget has no use for it.
        peers: files of the device's other models (fedepth.training.peers), by slot; None for one to begin anew.
        peers_output: where they go, as they are after the task; None if nobody keeps them.
        left_out: files with what the encoding has left out of updates before (fedepth.residuals).
        left_out_output: where files with what is left out after the task go; None if nobody keeps them.
    """

    task: Task
    plan: Plan
    graph: Path
    calibration: Calibration
    weights: Path
    data: Path
    output: Path
    cache: Path
    device_id: str
    enforce: bool
    most_samples: int = 0
    release_freed: bool = False
    damage: frozenset[int] = frozenset()
    images: Images | None = None
    rehearse: bool = True
    peers: tuple[Path | None, ...] = ()
    peers_output: Path | None = None
    left_out: tuple[Path, ...] = ()
    left_out_output: Path | None = None


class SessionHooks(Hooks, Protocol):
    """What a session asks and tells while it works."""

    def begin(self, epochs: int, baseline: Baseline) -> None:
        """The warm-up is over: a task of so many local epochs, whose peaks are counted from this baseline."""

    def rehearsing(self) -> None:
        """Every stage is tried for one step before the first is trained."""


@dataclass(frozen=True)
class Granted:
    """Hooks of a session whose budget does not change while it trains."""

    budget_bytes: int

    def begin(self, epochs: int, baseline: Baseline) -> None: ...

    def rehearsing(self) -> None: ...

    def measure(self, stage: int, held_bytes: int) -> int:
        return self.budget_bytes

    def stage_started(self, index: int, count: int, stage: Stage) -> None: ...

    def progress(self, index: int, count: int, stage: Stage, epoch: int, loss: float) -> None: ...

    def waiting(self, index: int, stage: Stage, budget_bytes: int) -> None: ...

    def stage_done(self, result: StageResult, part: PartInfo) -> None: ...


@dataclass
class Known:
    """What this process has been through.

    Attributes:
        warm: units it has warmed up for, by the file of their model, whether its statistics are fixed, and whether
            for several models.
        rehearsed: what it has rehearsed, with the peaks; the last so many.
        traced: models that are read already, by their files. A simulation keeps its one; a device has no memory for it.
        rows: samples of the last files with rows, in a file without a name, by what they were made of.
    """

    warm: dict[tuple[Path, bool, bool], set[int]] = field(default_factory=dict)
    rehearsed: dict[tuple[object, ...], Peaks] = field(default_factory=dict)
    traced: dict[Path, TracedModel] = field(default_factory=dict)
    rows: dict[tuple[int, ModelSpec], Images] = field(default_factory=dict)


def run(assignment: Assignment, hooks: SessionHooks, device: torch.device, known: Known) -> Result:
    """One task, from warm-up to its parts on disk. What `known` holds already is not done again, and is added to.

    Raises:
        DataError: the images cannot be read, or do not fit the model.
        ModelError: the graph is damaged, is for other inputs or classes, or asks for an operator that is not run here.
        PlanError: nothing fits what is free now.
        OverBudgetError: a stage met its limit.
        DivergedError: the loss or the weights are not finite any more.
        StateError: the weights file is not one, or a disk cannot be written.
    """
    started = time.monotonic()
    task, plan = assignment.task, assignment.plan
    traced = (known.traced.get(assignment.graph) or read_traced(assignment.graph)).in_training(task.training)
    model = Model(traced.graph)
    check_plan(traced.costs, plan)
    # A model that pools its maps would train on images of any size, and on labels of fewer classes, without a word.
    graphs = traced.graph.input_shape, traced.costs.logit_bytes // FLOAT_BYTES
    tasks = task.model.input_shape, len(task.model.classes)
    if graphs != tasks:
        raise ModelError(
            f"the model's graph is for inputs of shape {graphs[0]} and {graphs[1]} classes, and the task for inputs of "
            f"shape {tasks[0]} and {tasks[1]} classes; prepare the model for what it is trained on"
        )
    if bool(traced.graph.auxiliary) != (task.training.heads is Heads.AUXILIARY):
        raise ModelError(
            f"the task asks for {task.training.heads.value} heads, and the model's graph has "
            f"{'some' if traced.graph.auxiliary else 'no'} auxiliary ones; restart the coordinator"
        )
    for folder in (assignment.output, assignment.cache, assignment.peers_output, assignment.left_out_output):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    images = _opened(assignment, traced.tokenizer, known) if assignment.images is None else assignment.images
    if 0 < assignment.most_samples < len(images):
        images = FirstImages(images, assignment.most_samples)
    with open_weights(assignment.weights) as weights:
        context = TrainingContext(
            task=task,
            plan=plan,
            model=model,
            costs=replace(traced.costs, calibration=assignment.calibration),
            weights=weights,
            images=images,
            output=assignment.output,
            cache=assignment.cache,
            device_id=assignment.device_id,
            device=device,
            channels_last=traced.graph.channels_last and device.type == "cpu",
            enforce=assignment.enforce,
            release_freed=assignment.release_freed,
            peers=assignment.peers,
            peers_output=assignment.peers_output,
            left_out=_left_out(weights, assignment.left_out),
            left_out_output=assignment.left_out_output,
        )
        warm = known.warm.setdefault((assignment.graph, task.training.fixed_statistics, plan.models > 1), set())
        if not warm.issuperset(plan.trained_units):
            warm_up(context, set(plan.trained_units) - warm)
            warm.update(plan.trained_units)
        meter = new_meter(device)
        hooks.begin(task.training.local_epochs, meter.baseline)
        context = fitted(context, meter, hooks)
        peaks = _rehearsed(context, meter, hooks, known) if assignment.rehearse else {}
        trained = train(context, meter, hooks, peaks)
    return Result(
        task_id=task.task_id,
        attempt=task.attempt,
        device_id=assignment.device_id,
        round=task.round,
        sample_count=len(images),
        plan=trained.plan,
        trained_units=trained.plan.trained_units,
        stages=trained.stages,
        parts=trained.infos,
        seconds=time.monotonic() - started,
        allocator=allocator.name(),
        baseline_bytes=meter.baseline.resident_bytes,
        weights_digest=task.weights_digest,
    )


def _left_out(weights: Reader, paths: tuple[Path, ...]) -> dict[str, Reader]:
    """What encodings have left out before, by tensor.

    Raises:
        StateError: a file is damaged, or of another model.
    """
    found = {}
    for path in paths:
        reader = open_weights(path)
        for name in reader.names:
            if name not in weights.names or reader.info(name) != weights.info(name):
                raise StateError(f"{path} holds another model than the one of this task; delete it")
            found[name] = reader
    return found


def _opened(assignment: Assignment, tokenizer: str, known: Known) -> Images:
    """The data of a task. Rows are kept for the tasks to come, since it takes long to read them."""
    spec = assignment.task.model

    def opened() -> Images:
        return open_images(
            assignment.data, spec, "train", scratch=assignment.cache, damage=assignment.damage, tokenizer=tokenizer
        )

    if spec.columns is None:
        return opened()
    key = (fingerprint(find_rows(assignment.data, "train")), spec)
    if key not in known.rows:
        known.rows = {}  # those of before go first
        known.rows = {key: opened()}
    return known.rows[key]


def _rehearsed(context: TrainingContext, meter: Meter, hooks: SessionHooks, known: Known) -> Peaks:
    """The peaks of the plan's stages in their rehearsal: in this one, or in one of a task before that was alike."""
    # Rounds differ in learning rate and seed, which change nothing about memory.
    alike = replace(context.task.training, learning_rate=0.0, seed=0)
    key = (
        context.task.graph_digest,
        alike,
        context.plan.stages,
        context.plan.models,
        len(context.images),
        context.enforce,
    )
    if key not in known.rehearsed:
        hooks.rehearsing()
        if len(known.rehearsed) >= _MOST_REHEARSED:
            known.rehearsed.pop(next(iter(known.rehearsed)))
        known.rehearsed[key] = rehearse(context, meter, hooks)
    peaks = known.rehearsed[key]
    if peaks.keys() != set(context.plan.stages):
        known.rehearsed.pop(key)  # memory fell short meanwhile; the next task rehearses again
    return peaks
