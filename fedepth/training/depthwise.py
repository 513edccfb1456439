"""Depth-wise training of one task (arXiv 2303.04887, sections 4.1 and 4.2).

For every stage: compute the block's inputs once from those of the stage before, train the block together with the head
for the job's local epochs, freeze it, write it out. Only the weights that a stage needs are in memory; everything else
of the model stays on the meta device and in the weights file.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from fedepth.errors import OverBudgetError, PlanError
from fedepth.memory import allocator
from fedepth.memory.device import held_bytes, peak_bytes, reset
from fedepth.memory.meter import DataLimit, Meter
from fedepth.memory.predict import may_keep_bytes, needed_bytes
from fedepth.models.split import Unit, release
from fedepth.planning.planner import make_plan
from fedepth.sizes import format_size
from fedepth.task import Plan, Stage, StageResult
from fedepth.training.cache import Cache
from fedepth.training.prefix import build_inputs
from fedepth.training.pressure import MicroBatch, building_fits
from fedepth.training.stage import BlockTraining
from fedepth.training.work import Work, load
from fedepth.weights import write_tensors

LOOK_S = 1.0  # how often a stage reports, and looks at what is free
LONGEST_PAUSE_S = 600.0
_UNBOUNDED = 1 << 50
BESIDE_HEAP_BYTES = 2 << 20  # compiled kernels, pages of libraries: they count, and no cap on the heap holds them
UNWRITTEN_BYTES = 16 << 20  # that kernels ask for and never write to; they count on the heap, and take no memory
_OUT_OF_MEMORY = re.compile(
    r"(can't allocate memory|cannot allocate|unable to allocate|bad_alloc|out of memory|could not (create|execute) a)",
    re.I,
)
_WANTED = re.compile(r"tried to allocate (\d+) bytes")


class Hooks(Protocol):
    """What the trainer asks and tells while it works."""

    def measure(self, stage: int, held_bytes: int) -> int:
        """The budget in bytes as it is now; `held_bytes` is what this process holds above its baseline."""

    def stage_started(self, index: int, count: int, stage: Stage) -> None: ...

    def progress(self, index: int, count: int, stage: Stage, epoch: int, loss: float) -> None: ...

    def waiting(self, index: int, stage: Stage, budget_bytes: int) -> None:
        """The stage pauses: not even its smallest micro-batch fits into what is free now."""

    def stage_done(self, result: StageResult, part: Path) -> None:
        """`part` holds the block as it stays: no later stage changes it."""


@dataclass(frozen=True)
class Trained:
    """What came of a task: the plan that was really trained, and one file per block and one for the head."""

    plan: Plan
    stages: tuple[StageResult, ...]
    parts: tuple[Path, ...]


Peaks = Mapping[Stage, int]


def fitted(work: Work, meter: Meter, hooks: Hooks) -> Work:
    """The same, with a smaller plan where less is free now than its plan needs.

    Raises:
        PlanError: nothing fits.
    """
    stages = _fit(work, list(work.plan.stages), [], hooks.measure(0, held_bytes(meter, work.device)))
    return replace(work, plan=_of_stages(work, stages))


def train(work: Work, meter: Meter, hooks: Hooks, rehearsed: Peaks | None = None) -> Trained:
    """Trains every stage inside the budget that is measured before it.

    Args:
        rehearsed: peaks of stages in their rehearsal. One that runs otherwise than it was rehearsed has none.

    Raises:
        PlanError: nothing fits; the blocks that are trained by then are worth nothing without those behind them.
        OverBudgetError: a stage met its limit.
    """
    split = work.split
    waiting = list(work.plan.stages)
    done: list[Stage] = []
    results: list[StageResult] = []
    parts: list[Path] = []
    cache: Cache | None = None
    labels = torch.from_numpy(np.asarray(work.images.labels, np.int64))[: work.first_samples or None]
    load(work, split.head, trainable=True)
    while waiting:
        budget = hooks.measure(len(done), held_bytes(meter, work.device))
        try:
            waiting = _fit(work, waiting, done, budget)
        except PlanError:
            if cache is not None:
                cache.close()
            raise
        stage = waiting.pop(0)
        rehearsed_bytes = (rehearsed or {}).get(stage, 0)
        count = len(done) + 1 + len(waiting)
        hooks.stage_started(len(done), count, stage)
        reset(meter, work.device)
        started = time.monotonic()
        with ExitStack() as limits:
            if work.enforce:
                limits.enter_context(
                    DataLimit(meter.baseline.data_bytes, budget, allocator.data_overhead_bytes(budget))
                )
            if not work.keeping:
                limits.enter_context(allocator.keeping_nothing())
            cap = limits.enter_context(_heap_cap(work, meter, rehearsed or {}, stage, budget))
            previous = done[-1] if done else None
            yield_memory = partial(_yield_memory, work, stage, meter, cap, hooks, len(done))
            try:
                between = _every(LOOK_S, partial(yield_memory, partial(_fits_while_building, work, stage, previous)))
                cache = build_inputs(work, stage, previous, cache, between)
                # What the inputs took says nothing of what training them takes, so this look is at what is expected.
                micro_batch = MicroBatch(work.task.costs, work.task.training, stage, work.cached_samples)
                yield_memory(micro_batch.fits, _expected(work, stage, rehearsed_bytes, budget))
                block = BlockTraining(work, stage, cache, labels, len(done), micro_batch, final=not waiting)
                check = partial(_check, meter, work, budget, len(done), stage)
                report = partial(hooks.progress, len(done), count, stage)
                losses = _epochs(work, block, meter, check, partial(yield_memory, micro_batch.fits), report)
            except BaseException as error:
                if cache is not None:
                    cache.close()  # a trainer lives on after a failed task, and must not keep its files open
                if isinstance(error, (RuntimeError, MemoryError)):
                    capped = work.keeping and cap.cap_bytes < _UNBOUNDED and allocator.can_be_capped()
                    raise _over_budget(error, len(done), stage, budget, meter, capped=capped) from error
                raise
            units = [split.units[unit] for unit in range(stage.first, stage.last + 1)]
            parts.append(_write(work, len(parts), units))
            work = work.with_part(parts[-1])
            for unit in units:
                release(unit)  # the next stage reads what it needs of them
        results.append(
            StageResult(
                first=stage.first,
                last=stage.last,
                micro_batch=block.smallest_micro_batch,
                predicted_peak_bytes=stage.predicted_peak_bytes,
                rehearsed_peak_bytes=rehearsed_bytes,
                measured_peak_bytes=peak_bytes(meter, work.device),
                measured_anonymous_bytes=meter.anonymous_peak_bytes,
                budget_bytes=budget,
                loss_first=losses[0],
                loss_last=losses[-1],
                steps=block.steps,
                samples_seen=block.samples_seen,
                seconds=time.monotonic() - started,
            )
        )
        hooks.stage_done(results[-1], parts[-1])
        done.append(stage)
    if cache is not None:
        cache.close()
    parts.append(_write(work, len(parts), [split.head]))
    release(split.head)
    return Trained(_of_stages(work, done), tuple(results), tuple(parts))


def _of_stages(work: Work, stages: Sequence[Stage]) -> Plan:
    """The task's plan with other stages."""
    plan = replace(work.plan, stages=tuple(stages))
    untrained = sorted({*range(len(work.split.units))} - {*plan.trained_units})
    return replace(plan, untrained=tuple(untrained))


def _heap_cap(work: Work, meter: Meter, rehearsed: Peaks, stage: Stage, budget: int) -> allocator.HeapCap:
    """What the plan's worst stage needed in its rehearsal, and a little for pages that are worth keeping.

    At most the budget, and all of it where the stage was not rehearsed. Stages that need less than the worst keep what
    they like up to its need.
    """
    cap = _whole_heap(work, budget)
    if work.keeping and stage in rehearsed and allocator.can_be_capped():
        need = max(rehearsed.values())
        cap = min(cap, need + may_keep_bytes(need))
    # What lies beside the heap is off every cap, also off one that is lowered later.
    return allocator.HeapCap(meter.baseline.heap_bytes - meter.beside_heap_bytes, cap)


def _expected(work: Work, stage: Stage, rehearsed_bytes: int, budget: int) -> int:
    """What a stage is going to take: with the pages that it keeps, and no more than the budget that it is held to."""
    if not rehearsed_bytes:
        return needed_bytes(stage.predicted_peak_bytes)
    kept = may_keep_bytes(rehearsed_bytes) if work.keeping else 0
    return min(budget, rehearsed_bytes + kept)


def _whole_heap(work: Work, budget: int) -> int:
    """What the heap may come to in a budget. Where nothing is kept it follows what is in use, and may have asked for
    more than was ever written to; the first step is held against the budget then."""
    if not work.enforce:
        return _UNBOUNDED
    return budget - BESIDE_HEAP_BYTES if work.keeping else budget + UNWRITTEN_BYTES


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator has refused; torch and oneDNN have no type for that."""
    return isinstance(error, MemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


def _fit(work: Work, waiting: list[Stage], done: list[Stage], budget: int) -> list[Stage]:
    """The stages still to train, planned anew if memory has shrunk below what they need.

    Raises:
        PlanError: no plan for all that is left fits. A block that was trained while the units behind it were not is
            harmful, so nothing of the task is delivered then.
    """
    if max(needed_bytes(stage.predicted_peak_bytes) for stage in waiting) <= budget:
        return waiting
    plan = make_plan(
        work.task.costs,
        budget_bytes=budget,
        training=work.task.training,
        sample_count=work.cached_samples,
        policy=work.task.policy,
        done=done[-1] if done else None,
    )
    return list(plan.stages)


def _epochs(
    work: Work,
    block: BlockTraining,
    meter: Meter,
    check: Callable[[], None],
    yield_memory: Callable[[], None],
    report: Callable[[int, float], None],
) -> list[float]:
    """Trains a block for all epochs; returns the mean loss of each."""
    spec = work.task.training
    losses: list[float] = []
    epoch, total, batches = 0, 0.0, 0

    def tell_and_look() -> None:
        report(epoch, total / batches)
        yield_memory()

    look = _every(LOOK_S, tell_and_look)
    for epoch in range(spec.local_epochs):
        total, batches = 0.0, 0
        for indices in block.epoch_batches():
            total += block.step(indices)
            batches += 1
            meter.sample()
            if block.steps == 1 and work.enforce:
                check()
            look()
        losses.append(total / batches)
        report(epoch + 1, losses[-1])
    block.close()
    return losses


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
    work: Work,
    stage: Stage,
    meter: Meter,
    cap: allocator.HeapCap,
    hooks: Hooks,
    index: int,
    fits: Callable[[int | None], bool],
    expected_bytes: int = 0,
) -> None:
    """Fits the stage to what is free now, between two steps; waits while nothing of it fits.

    While the peak that was measured stays inside, the stage runs as it was planned: only what really does not fit is
    worth a change, and the change ends when memory comes back.

    Args:
        fits: makes the stage fit into a budget and says whether it does; None gives it its own way back.
        expected_bytes: what it will take as planned, where its peak does not tell that yet.

    Raises:
        OverBudgetError: memory did not come back.
    """
    if not work.enforce:
        return
    waited = 0.0
    while True:
        budget = hooks.measure(index, held_bytes(meter, work.device))
        if max(peak_bytes(meter, work.device), expected_bytes) <= budget:
            cap.resize(_UNBOUNDED)
            fits(None)
            return
        cap.resize(_whole_heap(work, budget))
        if fits(budget):
            return
        hooks.waiting(index, stage, budget)
        if waited >= LONGEST_PAUSE_S:
            raise OverBudgetError(
                f"stage {index} (units {stage.first}-{stage.last}) paused for {waited:.0f} s because only "
                f"{format_size(budget)} were free for it; others on this device hold the memory",
                stage=index,
                miss_bytes=max(0, stage.predicted_peak_bytes - budget),
            )
        time.sleep(LOOK_S)
        waited += LOOK_S


def _fits_while_building(work: Work, stage: Stage, previous: Stage | None, budget: int | None) -> bool:
    """Without what was kept of freed memory; nothing of it can be smaller."""
    if budget is None:
        return True
    return building_fits(work.task.costs, work.task.training, stage, previous, work.cached_samples, budget)


def _write(work: Work, number: int, units: list[Unit]) -> Path:
    """The tensors of `units` as one immutable part, one tensor at a time."""
    path = work.output / f"part-{number:04d}.safetensors"
    tensors = {name: tensor for unit in units for name, tensor in (*unit.parameters(), *unit.buffers())}
    infos = {name: work.weights.info(name) for name in tensors}
    write_tensors(path, infos, lambda name: (tensors[name].detach().cpu().contiguous().numpy(),))
    return path


def _check(meter: Meter, work: Work, budget: int, index: int, stage: Stage) -> None:
    peak = peak_bytes(meter, work.device)
    if peak > budget:
        raise OverBudgetError(
            f"stage {index} (units {stage.first}-{stage.last}) took {format_size(peak)} in its first step, "
            f"predicted were {format_size(stage.predicted_peak_bytes)}, the budget is {format_size(budget)}",
            stage=index,
            miss_bytes=peak - budget,
        )


def _over_budget(
    error: BaseException, index: int, stage: Stage, budget: int, meter: Meter, *, capped: bool
) -> BaseException:
    """An allocator's error as OverBudgetError; any other error as it is.

    Args:
        capped: a cap on the heap held, which counts what is asked for, and not what is written to.
    """
    if not is_out_of_memory(error):
        return error
    text = str(error)
    wanted = _WANTED.search(text)
    # The stage's tensors are gone by now; the high-water mark still tells what it held when the request failed.
    needed = meter.peak_bytes + (int(wanted.group(1)) if wanted else 0)
    met = "the cap on its heap" if capped else "its limit"
    return OverBudgetError(
        f"stage {index} (units {stage.first}-{stage.last}, micro-batch {stage.micro_batch}) met {met} in "
        f"a budget of {format_size(budget)}: {text.splitlines()[0] if text else type(error).__name__}",
        stage=index,
        miss_bytes=max(0, needed - budget),
        capped=capped,
    )
