"""A rehearsal: every stage of a plan for one optimizer step, under its real limit, before anything is trained.

A plan that needs more than was predicted is found out here, in seconds, not after hours in its last stage; and where
going over ends in a death, the death costs nothing. Of a step whose gradients accumulate, two micro-batches are enough:
the first makes the sums, the second is the last and updates. Inputs are computed for one whole batch of those that are
computed at once. Nothing of it stays: weights are read anew afterwards.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedepth.data.read import Images
from fedepth.estimate.peak import effective_batch, logits_way
from fedepth.memory import allocator
from fedepth.memory.meter import Meter
from fedepth.plan import Stage
from fedepth.task import Distil, PartInfo, StageResult
from fedepth.training.context import TrainingContext
from fedepth.training.limits import Peaks
from fedepth.training.stages import Hooks, train


def rehearse(context: TrainingContext, meter: Meter, hooks: Hooks) -> Peaks:
    """The measured peak of every stage of the plan. Caches in RAM have their full size.

    Where less memory is free meanwhile than the plan needs, other stages are tried, with samples that are too few for
    them: their peaks are left out.

    Raises:
        PlanError: nothing fits what is free now.
        OverBudgetError: a stage met its limit.
    """
    folder = context.cache / "rehearsal"
    folder.mkdir(parents=True, exist_ok=True)
    count = len(context.images)
    batch = effective_batch(context.costs, context.task.training, count)
    few = min(count, max(_samples(stage, batch) for stage in context.plan.stages))
    built = min(count, max(_computed_at_once(context)))
    training = replace(context.task.training, local_epochs=1)
    shortened = replace(
        context,
        task=replace(context.task, training=training),
        images=FirstImages(context.images, max(few, built)),
        cache_room=count - max(few, built),
        first_samples=few,
        output=folder,
        cache=folder,
        must_stay_finite=False,
        peers_output=folder,
        left_out_output=folder,
    )
    # What is freed is released at once: the high-water mark is then that of the tensors, the need itself, and not what
    # an allocator happened to keep.
    with allocator.release_freed():
        rehearsed = train(shortened, meter, Unheard(hooks))
    shutil.rmtree(folder)
    peaks = (result.measured_peak_bytes for result in rehearsed.stages)
    tried = zip(rehearsed.plan.stages, peaks, strict=True)
    return {stage: peak for stage, peak in tried if stage in context.plan.stages}


def _computed_at_once(context: TrainingContext) -> Iterator[int]:
    """Samples whose inputs, or logits, are computed at once."""
    yield from (stage.build_batch for stage in context.plan.stages if stage.first > 0)
    training = context.task.training
    yield (
        0
        if training.distil is Distil.NONE
        else logits_way(context.costs, training, context.plan.stages[0], context.cached_samples)[0]
    )


def _samples(stage: Stage, batch: int) -> int:
    """Those of two micro-batches as `BlockTraining.step` cuts them, or of the whole batch where it has no more."""
    pieces = -(-batch // stage.micro_batch)
    return min(batch, min(pieces, 2) * -(-batch // pieces))


@dataclass(frozen=True)
class FirstImages:
    """The first `count` of some images."""

    images: Images
    count: int

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return self.images.labels[: self.count]

    def __len__(self) -> int:
        return self.count

    def read(self, indices: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return self.images.read(indices)


@dataclass(frozen=True)
class Unheard:
    """Hooks that report to nobody. Without `measured` they grant any budget, else what it measures."""

    measured: Hooks | None = None

    def measure(self, stage: int, held_bytes: int) -> int:
        return 1 << 62 if self.measured is None else self.measured.measure(stage, held_bytes)

    def stage_started(self, index: int, count: int, stage: Stage) -> None: ...

    def progress(self, index: int, count: int, stage: Stage, epoch: int, loss: float) -> None: ...

    def waiting(self, index: int, stage: Stage, budget_bytes: int) -> None: ...

    def stage_done(self, result: StageResult, part: PartInfo) -> None: ...
