"""What a stage does when others take the memory that it was promised: smaller micro-batches, or a pause."""

from __future__ import annotations

from collections.abc import Iterator

from fedepth.memory.predict import build_peak, cache_bytes_in, effective_batch, needed_bytes, training_step
from fedepth.task import ModelCosts, Stage, TrainingSpec


def fitting_micro_batch(
    costs: ModelCosts, training: TrainingSpec, stage: Stage, sample_count: int, budget_bytes: int
) -> int | None:
    """The largest micro-batch, at most the stage's own, whose predicted peak stays inside; None if even one sample is
    too much."""
    batch = effective_batch(costs, training, sample_count)
    for micro_batch in _smaller_and_smaller(stage.micro_batch, costs.smallest_micro_batch):
        peak = training_step(
            costs,
            training,
            stage.first,
            stage.last,
            micro_batch,
            accumulates=micro_batch < batch,
            cache_bytes=cache_bytes_in(stage.cache, costs, training, stage.first, sample_count),
            checkpoint=stage.checkpoint,
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
        cache_bytes=cache_bytes_in(stage.cache, costs, training, stage.first, sample_count),
        streamed=stage.build_streamed,
    )
    return needed_bytes(peak.total) <= budget_bytes


def _smaller_and_smaller(largest: int, smallest: int) -> Iterator[int]:
    size = largest
    while size > smallest:
        yield size
        size = max(smallest, size // 2)
    yield size
