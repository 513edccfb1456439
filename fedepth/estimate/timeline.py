"""Predicted memory over time: what lives at every moment of a plan. Pure arithmetic; no torch.

A stage computes its inputs once and then repeats the same step, so one step stands for all of them. The moments are
those from which fedepth.estimate.peak takes a stage's peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedepth.costs import ModelCosts
from fedepth.estimate.peak import (
    Moments,
    build_moments,
    cache_bytes_in,
    effective_batch,
    logits_moments,
    logits_way,
    training_step,
)
from fedepth.estimate.teachers import kept_logits_bytes
from fedepth.plan import PeakComponents, Plan
from fedepth.task import Distil, TrainingSpec


@dataclass(frozen=True)
class Moment:
    """One moment of a plan.

    Attributes:
        stage: index of the stage in its plan.
        label: what runs: "build 3", "logits 3", "forward 3", "again 3", "backward 3" with the index of the unit,
            "logits head" and "logits exit" of what is distilled from, "forward exit", "backward exit", or "build" where
            the inputs are the samples themselves; with ", convolution 1" behind it while the first of the unit's
            convolutions runs (fedepth.estimate.peak).
        components: what lives meanwhile, in bytes.
    """

    stage: int
    label: str
    components: PeakComponents


def timeline(costs: ModelCosts, training: TrainingSpec, sample_count: int, plan: Plan) -> tuple[Moment, ...]:
    """The moments of every stage in order: its inputs are built, then one step runs.

    Args:
        costs: the table that the plan was made from.
        sample_count: samples in the device's shard; all of them are cached.
    """
    batch = effective_batch(costs, training, sample_count)
    kept = kept_logits_bytes(costs, training, sample_count)
    moments: list[Moment] = []
    source, source_bytes = 0, 0
    for index, stage in enumerate(plan.stages):
        cached = cache_bytes_in(stage.cache, costs, training, stage.first, sample_count)
        logits: Moments = ()
        if index == 0 and training.distil is Distil.GLOBAL:
            samples, streamed = logits_way(costs, training, stage, sample_count)
            logits = logits_moments(costs, stage.first, samples, cache_bytes=cached + kept, streamed=streamed)
        build = build_moments(
            costs,
            source,
            stage.first,
            stage.build_batch,
            source_bytes=source_bytes,
            cache_bytes=cached + kept,
            streamed=stage.build_streamed,
        )
        step = training_step(
            costs,
            training,
            stage.first,
            stage.last,
            stage.micro_batch,
            accumulates=stage.micro_batch < batch,
            cache_bytes=cached + kept,
            checkpoint=stage.checkpoint,
            frozen_suffix=stage.frozen_suffix,
            models=plan.models,
        ).moments
        moments.extend(Moment(index, label, components) for label, components in (*build, *logits, *step))
        source, source_bytes = stage.first, cached
    return tuple(moments)
