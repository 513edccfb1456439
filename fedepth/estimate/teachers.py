"""What models that a block learns from take beside it: their logits, kept and in a step. Pure arithmetic; no torch."""

from __future__ import annotations

from dataclasses import replace

from fedepth.costs import ModelCosts, PassCost, Size, UnitCost
from fedepth.plan import CachePlace
from fedepth.task import Distil, TrainingSpec

# The global model's logits of all samples lie in RAM up to this size.
LOGITS_IN_RAM_BYTES = 1 << 20
# What a divergence holds beside the cross-entropy, in logits of a micro-batch: its own log-probabilities, and of each
# teacher the logits and the probabilities; and what comes and goes while it is computed, forwards or backwards.
_OWN_LOGITS, _TEACHER_LOGITS, _PASSING_LOGITS = 1, 2, 5


def teachers_of(training: TrainingSpec) -> int:
    """How many models a block learns from beside the labels."""
    return int(training.distil is Distil.GLOBAL)


def taught(exit_: UnitCost, costs: ModelCosts, training: TrainingSpec) -> UnitCost:
    """An exit with the teachers that its loss is computed with (fedepth.training.objective)."""
    teachers = teachers_of(training)
    if not teachers:
        return exit_

    def more(size: Size, logits: int) -> Size:
        return Size(size.fixed, size.per_sample + logits * costs.logit_bytes)

    def passing(cost: PassCost) -> PassCost:
        return replace(cost, peak=more(cost.peak, _PASSING_LOGITS))

    step = exit_.training
    return replace(
        exit_,
        training=replace(
            step,
            saved=more(step.saved, _OWN_LOGITS + teachers * _TEACHER_LOGITS),
            forward=passing(step.forward),
            backward=passing(step.backward),
        ),
    )


def logits_place(costs: ModelCosts, sample_count: int) -> CachePlace:
    """Where the global model's logits of all samples are kept while a task distils from them: in RAM if they are few,
    since a file would cost a call for every sample of every step."""
    return CachePlace.RAM if costs.logit_bytes * sample_count <= LOGITS_IN_RAM_BYTES else CachePlace.DISK


def kept_logits_bytes(costs: ModelCosts, training: TrainingSpec, sample_count: int) -> int:
    """RAM that they take.

    Counted also where they are too many for it by so little that a device with a few samples less, which is given the
    same plan (coordinator.plans), keeps them there.
    """
    size = costs.logit_bytes * sample_count
    if training.distil is Distil.NONE or size > LOGITS_IN_RAM_BYTES + LOGITS_IN_RAM_BYTES // 64:
        return 0
    return min(size, LOGITS_IN_RAM_BYTES)
