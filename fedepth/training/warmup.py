"""The warm-up before a task's baseline: the task itself, every unit a stage of its own, on two samples.

It goes through the very code that training will go through, so that what torch and the C library load, map and keep at
first use counts as the trainer's start and not as the budget's. It leaves no weights behind.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

from fedepth.memory.meter import Meter
from fedepth.task import CachePlace, PeakComponents, Stage
from fedepth.training.depthwise import train
from fedepth.training.rehearsal import FirstImages, Unheard
from fedepth.training.work import Work

SAMPLES = 2
_UNKNOWN = PeakComponents(0, 0, 0, 0, 0, 0, 0)


def warm_up(work: Work) -> None:
    """Trains on the first two samples in a folder of its own, without a limit."""
    folder = work.cache / "warm-up"
    folder.mkdir(parents=True, exist_ok=True)
    places = list(CachePlace)
    stages = tuple(
        Stage(unit, unit, SAMPLES, places[unit % len(places)], SAMPLES, _UNKNOWN, checkpoint=unit % 2 == 1)
        for unit in range(len(work.split.units))
    )
    task = replace(work.task, training=replace(work.task.training, batch=SAMPLES, local_epochs=1))
    few = FirstImages(work.images, min(SAMPLES, len(work.images)))
    plan = replace(work.plan, stages=stages, untrained=())
    train(
        replace(work, task=task, plan=plan, images=few, output=folder, cache=folder, enforce=False), Meter(), Unheard()
    )
    shutil.rmtree(folder)
