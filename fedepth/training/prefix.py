"""The inputs of a stage, computed once: augmented views before the first unit, activations behind frozen ones after."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedepth.data.transforms import augment, views_rng
from fedepth.models.split import Unit, release
from fedepth.task import Stage
from fedepth.training.cache import Cache, open_cache
from fedepth.training.work import Work, load, to_device


def build_inputs(work: Work, stage: Stage, previous: Stage | None, source: Cache | None) -> Cache:
    """Fills the cache of `stage` from the one of the stage before, and closes that.

    Args:
        previous: the stage that `source` holds the inputs of; None if `stage` is the first.
    """
    count, batch = len(work.images), stage.build_batch
    raw = stage.first == 0
    target = open_cache(
        stage.cache,
        work.cache / f"inputs-{stage.first}",
        count + work.cache_room,
        work.split.input_shapes[stage.first],
        None if raw else work.task.training.cache_type,
    )
    start = previous.first if previous else 0
    units = [work.split.units[index] for index in range(start, stage.first)]
    for unit in units:
        load(work, unit, trainable=False)
        unit.train(False)  # BatchNorm of frozen units uses its running statistics
    try:
        _fill(work, target, units, source, batch, first=start)
    except BaseException:
        target.close()
        raise
    for unit in units:
        release(unit)
    if source is not None:
        source.close()
    return target


def _fill(work: Work, target: Cache, units: Sequence[Unit], source: Cache | None, batch: int, *, first: int) -> None:
    """`first`: the unit whose inputs lie in `source`, or 0."""
    rng = views_rng(work.task.training.seed, work.task.round, work.device_id)
    count = len(work.images)
    with torch.no_grad():
        for begin in range(0, count, batch):
            indices = np.arange(begin, min(begin + batch, count))
            if source is None:
                views = augment(work.images.read(indices), work.task.training.augmentation, rng)
                x = torch.from_numpy(views)
            else:
                x = source.read(torch.from_numpy(indices))
            if units:
                x = to_device(work, x, from_pixels=first == 0)
                for unit in units:
                    x = unit(x)
                x = x.cpu()
            target.write(begin, x)
            del x
