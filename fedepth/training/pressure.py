"""What a stage does when others take the memory that it was promised: smaller micro-batches, or a pause."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from fedepth.costs import ModelCosts
from fedepth.estimate.peak import (
    build_peak,
    cache_bytes_in,
    effective_batch,
    keeps_to,
    needed_bytes,
    training_step,
)
from fedepth.estimate.teachers import kept_logits_bytes
from fedepth.plan import Stage
from fedepth.task import TrainingSpec


class MicroBatch:
    """The samples that a stage takes at once.

    Attributes:
        now: as planned, or fewer while memory is short; it may change between two steps.
    """

    def __init__(
        self, costs: ModelCosts, training: TrainingSpec, stage: Stage, sample_count: int, models: int = 1
    ) -> None:
        self.now = stage.micro_batch
        self._stage = stage
        self._fitting = partial(fitting_micro_batch, costs, training, stage, sample_count, models=models)

    def fits(self, budget_bytes: int | None) -> bool:
        """Makes it fit into a budget and says whether it does; None gives the stage its own way back."""
        found = self._stage.micro_batch if budget_bytes is None else self._fitting(budget_bytes)
        self.now = found or self.now
        return found is not None


def fitting_micro_batch(
    costs: ModelCosts,
    training: TrainingSpec,
    stage: Stage,
    sample_count: int,
    budget_bytes: int,
    models: int = 1,
) -> int | None:
    """The largest micro-batch, at most the stage's own, whose predicted peak stays inside; None if even one sample is
    too much."""
    batch = effective_batch(costs, training, sample_count)
    # Gradients accumulate to the job's batch: BatchNorm aside, the size changes memory and time and not the result.
    for micro_batch in _smaller_and_smaller(stage.micro_batch, costs.smallest_micro_batch):
        if not keeps_to(costs, training, sample_count, micro_batch):
            continue  # an odd batch leaves pieces of one sample, of which BatchNorm has no variance
        peak = training_step(
            costs,
            training,
            stage.first,
            stage.last,
            micro_batch,
            accumulates=micro_batch < batch,
            cache_bytes=cache_bytes_in(stage.cache, costs, training, stage.first, sample_count)
            + kept_logits_bytes(costs, training, sample_count),
            checkpoint=stage.checkpoint,
            frozen_suffix=stage.frozen_suffix,
            models=models,
        ).peak
        if needed_bytes(peak.total) <= budget_bytes:
            return micro_batch
    return None


def building_fits(
    costs: ModelCosts,
    training: TrainingSpec,
    stage: Stage,
    previous: Stage | None,
    sample_count: int,
    budget_bytes: int,
) -> bool:
    """Whether computing the stage's inputs from those of `previous`, or from the samples, is predicted to fit."""
    first = previous.first if previous else 0
    peak = build_peak(
        costs,
        first,
        stage.first,
        stage.build_batch,
        source_bytes=cache_bytes_in(previous.cache, costs, training, first, sample_count) if previous else 0,
        cache_bytes=cache_bytes_in(stage.cache, costs, training, stage.first, sample_count)
        + kept_logits_bytes(costs, training, sample_count),
        streamed=stage.build_streamed,
    )
    return needed_bytes(peak.total) <= budget_bytes


def _smaller_and_smaller(largest: int, smallest: int) -> Iterator[int]:
    size = largest
    while size > smallest:
        yield size
        size = max(smallest, size // 2)
    yield size
