"""The inputs of a stage, computed once: samples as they are stored before the first unit, activations behind frozen
ones after. And what the global model says of them, for tasks that distil from it.

Of augmented samples, what is computed follows from one view of each, the task's first (fedepth.training.views). Only a
stage that begins with the first unit sees others, since it computes nothing before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fedepth.estimate.peak import logits_way
from fedepth.estimate.teachers import logits_place
from fedepth.models.run import DTYPES, RunnableUnit
from fedepth.plan import CachePlace, CacheType, Stage
from fedepth.training.cache import Cache, RowFormat, filling_order, open_cache
from fedepth.training.context import TrainingContext, load, to_device
from fedepth.training.views import views


def build_inputs(
    context: TrainingContext, stage: Stage, previous: Stage | None, source: Cache | None, between: Callable[[], None]
) -> Cache:
    """Fills the cache of `stage` from the one of the stage before, and closes that.

    Args:
        previous: the stage that `source` holds the inputs of; None if `stage` is the first.
        between: called after every batch; may wait.
    """
    start = previous.first if previous else 0
    ends = [*range(start + 1, stage.first), stage.first] if stage.build_streamed else [stage.first]
    given = source
    for end in ends:
        try:
            target = _open(context, stage, end, given)
            units = context.model.units[start:end]
            _pass(context, target, units, given, stage.build_batch, between, from_data=start == 0)
        finally:
            if given is not None:
                given.close()
        given, start = target, end
    return target


def global_logits(context: TrainingContext, stage: Stage, source: Cache, between: Callable[[], None]) -> Cache:
    """The logits of the global weights for all samples, float32, in evaluation mode.

    Args:
        stage: the first of its task.
        source: its inputs, which are the samples that the task trains on, or follow from their first views by the
            global weights. It stays as it is.
        between: called after every batch; may wait.
    """
    count, training = context.cached_samples, context.task.training
    samples, streamed = logits_way(context.costs, training, stage, count)
    units = [*context.model.units[stage.first :], context.model.head]
    pieces = [[unit] for unit in units] if streamed else [units]
    given = source
    for number, piece in enumerate(pieces):
        if number == len(pieces) - 1:
            rows = RowFormat((len(context.task.model.classes),), CacheType.FLOAT32)
            target = open_cache(logits_place(context.costs, count), context.cache, count, rows)
        else:
            rows = RowFormat(units[number + 1].unit.input_shape, CacheType.FLOAT32, context.channels_last)
            # The stage's own inputs are not written over: it has yet to train on them.
            before = given if number else None
            target = open_cache(CachePlace.DISK, context.cache, count, rows, before)
        try:
            _pass(context, target, piece, given, samples, between, from_data=stage.first == number == 0)
        finally:
            if given is not source:
                given.close()
        given = target
    return given


def _open(context: TrainingContext, stage: Stage, unit: int, source: Cache | None) -> Cache:
    """An empty cache of the inputs of `unit`: the stage's own, or one on the way to it."""
    count, shape = context.cached_samples, context.model.graph.units[unit].input_shape
    if unit == stage.first:
        rows = RowFormat(shape, context.task.training.cache_type, context.channels_last)
        if unit == 0:
            spec = context.task.model
            rows = RowFormat(spec.sample_shape, None, stored=DTYPES[spec.sample_type])
        return open_cache(stage.cache, context.cache, count, rows, source)
    # In full precision: the job's cache type rounds once a stage, however it is built.
    rows = RowFormat(shape, CacheType.FLOAT32, context.channels_last)
    return open_cache(CachePlace.DISK, context.cache, count, rows, source)


def _pass(
    context: TrainingContext,
    target: Cache,
    units: Sequence[RunnableUnit],
    source: Cache | None,
    batch: int,
    between: Callable[[], None],
    *,
    from_data: bool,
) -> None:
    """Loads the units and runs them over all samples; `source` holds the inputs of the first of them."""
    try:
        for unit in units:
            load(context, unit, trainable=False)
            unit.training = False  # BatchNorm of frozen units uses its running statistics
        _fill(context, target, units, source, batch, between, from_data=from_data)
    except BaseException:
        target.close()
        raise
    finally:
        for unit in units:
            unit.release()


def _fill(
    context: TrainingContext,
    target: Cache,
    units: Sequence[RunnableUnit],
    source: Cache | None,
    batch: int,
    between: Callable[[], None],
    *,
    from_data: bool,
) -> None:
    count = len(context.images)
    with torch.inference_mode():
        for positions in filling_order(count, batch, target.rows, source):
            indices = torch.arange(positions.start, positions.stop)
            x = torch.from_numpy(context.images.read(indices.numpy())) if source is None else source.read(indices)
            if units:
                if from_data:
                    x = views(context, x, indices)
                x = to_device(context, x, from_data=from_data)
                for unit in units:
                    x = unit(x)
                x = x.cpu()
            target.write(positions.start, x)
            del x
            between()
