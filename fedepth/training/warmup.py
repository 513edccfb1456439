"""The warm-up before a task's baseline: the units of its plan, each a stage of its own, on two samples.

It goes through the very code that training will go through, so that what torch and the C library load, map and keep at
first use counts as the trainer's start and not as the budget's. It leaves no weights behind.

There is no baseline yet that a limit could count from. What bounds a warm-up is that every block of the plan holds more
than one of its units does alone, with at most as many samples.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection
from dataclasses import replace

import torch

from fedepth.memory import allocator
from fedepth.memory.device import new_meter
from fedepth.plan import CachePlace, PeakComponents, Stage
from fedepth.training.context import TrainingContext
from fedepth.training.objective import any_exit
from fedepth.training.rehearsal import FirstImages, Unheard
from fedepth.training.stages import train

SAMPLES = 2
_LOOKED_AT_BYTES = 32 << 20  # of address space; none of it is written to
_UNKNOWN = PeakComponents(0, 0, 0, 0, 0, 0, 0)


def warm_up(context: TrainingContext, units: Collection[int]) -> None:
    """Trains these units of the plan on the first two samples, in a folder of its own."""
    folder = context.cache / "warm-up"
    folder.mkdir(parents=True, exist_ok=True)
    # Every second unit with a cache on disk and checkpointing: the code of both ways is loaded before the baseline.
    places = list(CachePlace)
    samples = min(SAMPLES, *(stage.micro_batch for stage in context.plan.stages))
    stages = tuple(
        Stage(unit, unit, samples, places[unit % 2], samples, _UNKNOWN, checkpoint=unit % 2 == 1, build_streamed=True)
        for unit in sorted(units)
    )
    task = replace(context.task, training=replace(context.task.training, batch=samples, local_epochs=1))
    few = FirstImages(context.images, min(samples, len(context.images)))
    # With a second model where there will be some: what compares them is code that one never runs (2 MiB of pages).
    plan = replace(context.plan, stages=stages, untrained=(), models=min(2, context.plan.models))
    train(
        replace(
            context,
            exit=any_exit,
            task=task,
            plan=plan,
            images=few,
            output=folder,
            cache=folder,
            enforce=False,
            must_stay_finite=False,
            peers=(),
            peers_output=None,
            left_out={},
            left_out_output=folder,
        ),
        new_meter(context.device),
        Unheard(),
    )
    shutil.rmtree(folder)


def start(device: torch.device) -> None:
    """One forward and backward pass, so that what torch loads at first use counts as the trainer's start.

    Wide enough for the kernels that wide layers take: their code and tables, 2 MiB of the library's pages, would come
    on top of the first stage that has such layers. Large enough for every thread to have its part: each keeps buffers
    of its own.
    """
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(16, 16, 3),
        torch.nn.Conv2d(16, 64, 3, stride=2, padding=1),
        torch.nn.Conv2d(64, 64, 3, padding=1),
    ).to(device)
    images = torch.rand(32, 16, 40, 40, device=device).contiguous(memory_format=torch.channels_last)
    torch.autograd.backward(layers(images).sum())
    if not allocator.look_at_tensors(lambda: torch.empty(_LOOKED_AT_BYTES, dtype=torch.uint8), _LOOKED_AT_BYTES):
        print("torch has an allocator of its own for tensors: RLIMIT_DATA alone holds training", file=sys.stderr)
