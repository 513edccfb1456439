"""A rehearsal: every stage of a plan for two optimizer steps, under its real limit, before anything is trained.

A plan that needs more than was predicted is found out here, in seconds, not after hours in its last stage; and where
going over ends in a death, the death costs nothing. Two steps, because optimizer state is whole from the second one on.
Nothing of it stays: weights are read anew afterwards.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedepth.data.read import Images
from fedepth.memory.meter import Meter
from fedepth.memory.predict import effective_batch
from fedepth.task import Stage, StageResult
from fedepth.training.depthwise import Hooks, Need, Rehearsed, train
from fedepth.training.work import Work

STEPS = 2



def rehearse(work: Work, meter: Meter, hooks: Hooks) -> Rehearsed:
    """What every stage needed, by its first and last unit. Caches in RAM have their full size.

    Raises:
        PlanError: nothing fits what is free now.
        OverBudgetError: a stage met its limit.
    """
    folder = work.cache / "rehearsal"
    folder.mkdir(parents=True, exist_ok=True)
    count = len(work.images)
    few = min(count, effective_batch(work.task.costs, work.task.training, count))
    training = replace(work.task.training, local_epochs=STEPS)
    rehearsed = train(
        replace(
            work,
            task=replace(work.task, training=training),
            images=FirstImages(work.images, few),
            rehearsing=True,
            cache_room=count - few,
            output=folder,
            cache=folder,
        ),
        meter,
        Unheard(hooks),
    )
    shutil.rmtree(folder)
    return {
        (stage.first, stage.last): Need(stage.measured_peak_bytes, cap)
        for stage, cap in zip(rehearsed.stages, rehearsed.caps, strict=True)
    }


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

    def read(self, indices: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        return self.images.read(indices)


@dataclass(frozen=True)
class Unheard:
    """Hooks that tell nobody. Without `measured` they grant any budget, else what it measures."""

    measured: Hooks | None = None

    def measure(self, stage: int, held_bytes: int) -> int:
        return 1 << 62 if self.measured is None else self.measured.measure(stage, held_bytes)

    def stage_started(self, index: int, count: int, stage: Stage) -> None: ...

    def progress(self, index: int, count: int, stage: Stage, epoch: int, loss: float) -> None: ...

    def waiting(self, index: int, stage: Stage, budget_bytes: int) -> None: ...

    def stage_done(self, result: StageResult) -> None: ...
