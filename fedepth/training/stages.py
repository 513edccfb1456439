"""Depth-wise training of one task (arXiv 2303.04887, sections 4.1 and 4.2).

For every stage: compute the block's inputs once from those of the stage before, train the block together with its exit
for the job's local epochs, freeze it, write it out. Only the weights that a stage needs are in memory; everything else
of the model stays in the weights file.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from fedepth.errors import DivergedError, OverBudgetError, PlanError
from fedepth.estimate.peak import needed_bytes
from fedepth.memory import allocator
from fedepth.memory.device import bounded, held_bytes, host_overhead_bytes, peak_bytes, reset
from fedepth.memory.meter import DataLimit, Meter
from fedepth.plan import CacheType, Ending, Plan, Stage
from fedepth.planning.planner import make_plan
from fedepth.sizes import format_size
from fedepth.task import Distil, PartInfo, StageResult, TrainingSpec
from fedepth.training.block import BlockTraining
from fedepth.training.cache import Cache
from fedepth.training.context import TrainingContext
from fedepth.training.limits import (
    UNBOUNDED,
    Peaks,
    check_first_step,
    expected_bytes,
    heap_cap,
    over_budget,
    releases,
    unwritten_bytes,
    whole_heap,
)
from fedepth.training.parts import carry_left_out, write_part, write_peers
from fedepth.training.peers import begin_peers
from fedepth.training.prefix import build_inputs, global_logits
from fedepth.training.pressure import MicroBatch, building_fits

_WITH_HEAD = tuple(ending for ending in Ending if ending is not Ending.FROZEN_HEAD)
LOOK_S = 1.0  # how often a stage reports, and looks at what is free
LONGEST_PAUSE_S = 600.0


class Hooks(Protocol):
    """What the trainer asks and tells while it works."""

    def measure(self, stage: int, held_bytes: int) -> int:
        """The budget in bytes as it is now; `held_bytes` is what this process holds above its baseline."""

    def stage_started(self, index: int, count: int, stage: Stage) -> None: ...

    def progress(self, index: int, count: int, stage: Stage, epoch: int, loss: float) -> None: ...

    def waiting(self, index: int, stage: Stage, budget_bytes: int) -> None:
        """The stage pauses: not even its smallest micro-batch fits into what is free now."""

    def stage_done(self, result: StageResult, part: PartInfo) -> None:
        """`part` holds the block as it stays: no later stage changes it."""


@dataclass(frozen=True)
class Trained:
    """What came of a task: the plan that was really trained, and one file per block and one for the head.

    Attributes:
        parts: the files.
        infos: what is in the same place of `parts`, as it goes to the coordinator.
    """

    plan: Plan
    stages: tuple[StageResult, ...]
    parts: tuple[Path, ...]
    infos: tuple[PartInfo, ...]


def fitted(context: TrainingContext, meter: Meter, hooks: Hooks) -> TrainingContext:
    """The same, with a smaller plan where less is free now than its plan needs.

    Raises:
        PlanError: nothing fits.
    """
    stages, models = _fit(
        context, list(context.plan.stages), [], context.plan.models, _budget_bytes(context, meter, hooks, 0)
    )
    return replace(context, plan=_of_stages(context, stages, models))


def train(context: TrainingContext, meter: Meter, hooks: Hooks, rehearsed: Peaks | None = None) -> Trained:
    """Trains every stage inside the budget that is measured before it.

    Args:
        rehearsed: peaks of stages in their rehearsal. One that runs otherwise than it was rehearsed has none.

    Raises:
        PlanError: nothing fits; the blocks that are trained by then are worth nothing without those behind them.
        OverBudgetError: a stage met its limit.
        DivergedError: the loss or the weights are not finite any more.
        DiskError: a part cannot be written.
    """
    with ExitStack() as opened:
        return _train(context, meter, hooks, rehearsed or {}, opened)


def _train(context: TrainingContext, meter: Meter, hooks: Hooks, rehearsed: Peaks, opened: ExitStack) -> Trained:
    """The same; what has to last for all stages is closed with `opened`."""
    model = context.model
    waiting, models = list(context.plan.stages), context.plan.models
    done: list[Stage] = []
    results: list[StageResult] = []
    parts: list[Path] = []
    infos: list[PartInfo] = []
    cache: Cache | None = None
    distilled: Cache | None = None
    labels = torch.from_numpy(np.asarray(context.images.labels, np.int64))[: context.first_samples or None]
    while waiting:
        budget = _budget_bytes(context, meter, hooks, len(done))
        try:
            waiting, models = _fit(context, waiting, done, models, budget)
        except PlanError:
            if cache is not None:
                cache.close()
            raise
        plan = _of_stages(context, [*done, *waiting], models)
        stage = waiting.pop(0)
        rehearsed_bytes = rehearsed.get(stage, 0)
        count = len(done) + 1 + len(waiting)
        hooks.stage_started(len(done), count, stage)
        reset(meter, context.device)  # after the plan is settled, so that the peak is this stage's alone
        started = time.monotonic()
        with ExitStack() as limits:
            if context.enforce:
                overhead = host_overhead_bytes(budget, context.device) + unwritten_bytes(context, stage)
                limits.enter_context(DataLimit(meter.baseline.data_bytes, budget, overhead))
            if releases(context, stage):
                limits.enter_context(allocator.release_freed())
            cap = limits.enter_context(heap_cap(context, meter, rehearsed, stage, budget))
            previous = done[-1] if done else None
            yield_memory = partial(_yield_memory, context, stage, models, meter, cap, hooks, len(done))
            try:
                between = _every(LOOK_S, partial(yield_memory, partial(_fits_while_building, context, stage, previous)))
                cache = build_inputs(context, stage, previous, cache, between)
                if context.task.training.distil is Distil.GLOBAL and distilled is None:
                    distilled = opened.enter_context(closing(global_logits(context, stage, cache, between)))
                # What the inputs took says nothing of what training them takes, so this look is at what is expected.
                micro_batch = MicroBatch(context.costs, context.task.training, stage, context.cached_samples, models)
                yield_memory(micro_batch.fits, expected_bytes(context, stage, rehearsed_bytes, budget))
                begin = partial(
                    BlockTraining,
                    stage=stage,
                    inputs=cache,
                    labels=labels,
                    index=len(done),
                    micro_batch=micro_batch,
                    trains_head=plan.trains_head,
                    distilled=distilled,
                )
                block = begin(context)
                block.peers = begin_peers(context, models - 1, begin)
                check = partial(check_first_step, meter, context, budget, len(done), stage)
                report = partial(hooks.progress, len(done), count, stage)
                losses = _epochs(context, stage, block, meter, check, partial(yield_memory, micro_batch.fits), report)
                units = list(model.units[stage.first : stage.last + 1])
                exit_ = model.exit(stage.last, frozen_suffix=stage.frozen_suffix)
                if exit_ is not model.head:  # which later stages may go on training
                    units.append(exit_)
                part = write_part(context, units, block.steps, len(parts))
                write_peers(context, block)
            except BaseException as error:
                if cache is not None:
                    cache.close()  # a trainer lives on after a failed task, and must not keep its files open
                if isinstance(error, (RuntimeError, MemoryError)):
                    capped = not releases(context, stage) and cap.cap_bytes < UNBOUNDED and allocator.can_be_capped()
                    # Its tensors are gone by now; the high-water mark still tells what it held then.
                    peak = peak_bytes(meter, context.device)
                    raise over_budget(error, len(done), stage, budget, peak, capped=capped) from error
                raise
            parts.append(part[0])
            infos.append(part[1])
            context = context.with_part(parts[-1])
            for unit in units:
                unit.release()  # the next stage reads what it needs of them
        results.append(
            StageResult(
                first=stage.first,
                last=stage.last,
                micro_batch=block.smallest_micro_batch,
                predicted_peak_bytes=stage.predicted_peak_bytes,
                rehearsed_peak_bytes=rehearsed_bytes,
                measured_peak_bytes=peak_bytes(meter, context.device),
                measured_anonymous_bytes=meter.anonymous_peak_bytes,
                budget_bytes=budget,
                loss_first=losses[0],
                loss_last=losses[-1],
                steps=block.steps,
                samples_seen=block.samples_seen,
                seconds=time.monotonic() - started,
                models=models,
            )
        )
        hooks.stage_done(results[-1], infos[-1])
        done.append(stage)
    if cache is not None:
        cache.close()
    if plan.trains_head and exit_ is model.head:  # not where a warm-up, which ends anywhere, has auxiliary heads
        path, info = write_part(context, [model.head], block.steps, len(parts))
        parts.append(path)
        infos.append(info)
    carry_left_out(context, parts)
    model.head.release()
    return Trained(plan, tuple(results), tuple(parts), tuple(infos))


def _budget_bytes(context: TrainingContext, meter: Meter, hooks: Hooks, index: int) -> int:
    """What a stage may take as of now, of the host's memory and of the GPU's, whose allocator is held to it."""
    budget = hooks.measure(index, held_bytes(meter, context.device))
    return bounded(budget, meter, context.device, enforce=context.enforce)


def _of_stages(context: TrainingContext, stages: Sequence[Stage], models: int) -> Plan:
    """The task's plan with other stages."""
    plan = replace(context.plan, stages=tuple(stages), models=models)
    untrained = sorted({*context.plan.trained_units, *context.plan.untrained} - {*plan.trained_units})
    return replace(plan, untrained=tuple(untrained))


def _fit(
    context: TrainingContext, waiting: list[Stage], done: list[Stage], models: int, budget: int
) -> tuple[list[Stage], int]:
    """The stages still to train and how many models, planned anew if memory has shrunk below what they need.

    Raises:
        PlanError: no plan for all that is left fits. Once a block is trained, the head that blocks share stays what it
            was for that: trained, or at its global value.
    """
    if max(needed_bytes(stage.predicted_peak_bytes) for stage in waiting) <= budget:
        return waiting, models
    before = _of_stages(context, [*done, *waiting], models)
    kept = done and not context.model.auxiliary
    plan = make_plan(
        context.costs,
        budget_bytes=budget,
        training=context.task.training,
        sample_count=context.cached_samples,
        policy=context.task.policy,
        done=done[-1] if done else None,
        endings=tuple(Ending) if not kept else _WITH_HEAD if before.trains_head else (Ending.FROZEN_HEAD,),
    )
    return list(plan.stages), plan.models


def _epochs(
    context: TrainingContext,
    stage: Stage,
    block: BlockTraining,
    meter: Meter,
    check: Callable[[], None],
    yield_memory: Callable[[], None],
    report: Callable[[int, float], None],
) -> list[float]:
    """Trains a block for all epochs; returns the mean loss of each.

    Raises:
        DivergedError: the loss of a step is not finite.
    """
    spec = context.task.training
    losses: list[float] = []
    epoch, total, batches = 0, 0.0, 0

    def report_and_look() -> None:
        report(epoch, total / batches)
        yield_memory()

    look = _every(LOOK_S, report_and_look)
    for epoch in range(spec.local_epochs):
        total, batches = 0.0, 0
        for indices in block.epoch_batches():
            loss = block.step(indices)
            if context.must_stay_finite and not math.isfinite(loss):
                raise _diverged(spec, stage, block, indices)
            total += loss
            batches += 1
            meter.sample()
            if block.steps == 1 and context.enforce:
                check()
            look()
        losses.append(total / batches)
        report(epoch + 1, losses[-1])
    block.close()
    return losses


def _diverged(spec: TrainingSpec, stage: Stage, block: BlockTraining, indices: torch.Tensor) -> DivergedError:
    """Why the loss of the last step, on the samples at `indices`, is not finite."""
    rate = f"at learning rate {spec.learning_rate:g}"
    if spec.cache_type is CacheType.FLOAT32 or block.has_finite_inputs(indices):
        return DivergedError(f"loss is not finite after step {block.steps} {rate}; lower training.learning_rate")
    return DivergedError(
        f"the inputs of units {stage.block} are too large for {spec.cache_type.value} after training {rate}; set "
        f"training.cache_type to {CacheType.FLOAT32.value}, or lower training.learning_rate"
    )


def _every(seconds: float, call: Callable[[], None]) -> Callable[[], None]:
    """The same, but what comes sooner after the last call does nothing."""
    last = time.monotonic()

    def sometimes() -> None:
        nonlocal last
        if time.monotonic() - last > seconds:
            call()
            last = time.monotonic()

    return sometimes


def _yield_memory(
    context: TrainingContext,
    stage: Stage,
    models: int,
    meter: Meter,
    cap: allocator.HeapCap,
    hooks: Hooks,
    index: int,
    fits: Callable[[int | None], bool],
    expected_bytes: int = 0,
) -> None:
    """Fits the stage to what is free now, between two steps; waits while nothing of it fits.

    While the peak that was measured stays inside, the stage runs as it was planned: only what really does not fit is
    worth a change, and the change ends when memory comes back. For several models nobody waits: one of them is trained
    instead.

    Args:
        fits: makes the stage fit into a budget and says whether it does; None gives it its own way back.
        expected_bytes: what it will take as planned, where its peak does not tell that yet.

    Raises:
        OverBudgetError: memory did not come back.
    """
    if not context.enforce:
        return
    waited = 0.0
    while True:
        budget = _budget_bytes(context, meter, hooks, index)
        if max(peak_bytes(meter, context.device), expected_bytes) <= budget:
            cap.resize(UNBOUNDED)
            fits(None)
            return
        cap.resize(whole_heap(context, stage, budget))
        if fits(budget):
            return
        if models > 1:
            raise OverBudgetError(
                f"stage {index} (units {stage.first}-{stage.last}) trains {models} models, for which "
                f"{format_size(budget)} is not enough any more; fewer are trained",
                stage=index,
                miss_bytes=max(0, stage.predicted_peak_bytes - budget),
            )
        hooks.waiting(index, stage, budget)
        if waited >= LONGEST_PAUSE_S:
            raise OverBudgetError(
                f"stage {index} (units {stage.first}-{stage.last}) gave up after pausing for {waited:.0f} s: only "
                f"{format_size(budget)} was free for it; stop other programs on this device that hold memory",
                stage=index,
                miss_bytes=max(0, stage.predicted_peak_bytes - budget),
            )
        time.sleep(LOOK_S)
        waited += LOOK_S


def _fits_while_building(context: TrainingContext, stage: Stage, previous: Stage | None, budget: int | None) -> bool:
    """Without what was kept of freed memory; nothing of it can be smaller."""
    if budget is None:
        return True
    return building_fits(context.costs, context.task.training, stage, previous, context.cached_samples, budget)
