"""From unit costs and a budget to a block plan: exact dynamic programming over contiguous blocks. Pure; no torch.

The objective is lexicographic: fewest units left untrained, then fewest stages (depth splits), then least estimated
time. The two policies differ only in what a stage may choose:

    paper  the job's batch in one piece (arXiv 2303.04887, section 4.1)
    auto   any micro-batch, with or without checkpointing, so that full depth is kept wherever that fits
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from fedepth.costs import ModelCosts
from fedepth.errors import PlanError
from fedepth.estimate.peak import (
    build_peak,
    cache_bytes_in,
    cached_sample_bytes,
    effective_batch,
    needed_bytes,
    training_step,
)
from fedepth.plan import CachePlace, PeakComponents, Plan, Policy, Stage
from fedepth.sizes import format_size
from fedepth.task import TrainingSpec

# Only the order that these give matters, never the absolute time.
_DISK_FLOPS_PER_BYTE = 40.0  # reading a cached byte costs about as much as this much arithmetic
_STEP_OVERHEAD_SAMPLES = 2.0  # a forward pass costs about this many samples more than its arithmetic


@dataclass(frozen=True)
class _Choice:
    """One way to train one block, before it is known what comes before it."""

    first: int
    last: int
    micro_batch: int
    place: CachePlace
    checkpoint: bool
    predicted: PeakComponents
    cost: float


@dataclass(frozen=True)
class _Path:
    """The best way found to end with a given choice."""

    untrained: int
    stages: int
    cost: float
    choice: _Choice
    stage: Stage
    before: _Path | None

    @property
    def key(self) -> tuple[int, int, float]:
        return (self.untrained, self.stages, self.cost)


@lru_cache(maxsize=256)
def make_plan(
    costs: ModelCosts,
    *,
    budget_bytes: int,
    training: TrainingSpec,
    sample_count: int,
    policy: Policy,
    done: Stage | None = None,
) -> Plan:
    """The best plan whose every stage is predicted to stay inside `budget_bytes`.

    Args:
        done: a stage that has been trained already; the plan then covers the units behind it only, and counts the
            inputs that stage has cached.

    Raises:
        PlanError: not even one unit can be trained; carries what the smallest plan needs.
    """
    choices = list(_choices(costs, budget_bytes, training, sample_count, policy, done))
    paths: list[_Path] = []
    for choice in choices:  # ordered by first unit, so that every predecessor is complete
        best: _Path | None = None
        starts: list[_Path | None] = [None, *(path for path in paths if path.choice.last < choice.first)]
        for before in starts:
            path = _extend(before, choice, costs, budget_bytes, training, sample_count, done)
            if path and (best is None or path.key < best.key):
                best = path
        if best:
            paths.append(best)
    if not paths:
        raise _nothing_fits(costs, budget_bytes, training, sample_count, policy, done)
    end = len(costs.units) - 1
    winner = min(paths, key=lambda path: (path.untrained + end - path.choice.last, path.stages, path.cost))
    stages: list[Stage] = []
    step: _Path | None = winner
    while step:
        stages.insert(0, step.stage)
        step = step.before
    trained = {unit for stage in stages for unit in range(stage.first, stage.last + 1)}
    start = done.last + 1 if done else 0
    untrained = tuple(unit for unit in range(start, end + 1) if unit not in trained)
    return Plan(tuple(stages), untrained, policy, budget_bytes)


def unit_plan(costs: ModelCosts, *, unit: int, training: TrainingSpec, sample_count: int, policy: Policy) -> Plan:
    """Only this unit is trained, with the job's batch in one piece and its inputs on disk.

    The plan's budget is what that needs at least; the inputs are computed as fast as they can be inside it.
    """
    batch = effective_batch(costs, training, sample_count)
    predicted = training_step(costs, training, unit, unit, batch, accumulates=False, cache_bytes=0).peak
    slowest_build = build_peak(costs, 0, unit, 1, source_bytes=0, cache_bytes=0, streamed=True)
    budget_bytes = needed_bytes(max(predicted.total, slowest_build.total))
    choice = _Choice(unit, unit, batch, CachePlace.DISK, False, predicted, cost=0.0)
    path = _extend(None, choice, costs, budget_bytes, training, sample_count, None)
    assert path is not None, "the budget counts the slowest way to compute the inputs"
    others = tuple(other for other in range(len(costs.units)) if other != unit)
    return Plan((path.stage,), others, policy, budget_bytes)


def full_training_peak(costs: ModelCosts, training: TrainingSpec, sample_count: int) -> PeakComponents:
    """The predicted peak of training all units at once with the job's batch, inputs on disk."""
    batch = effective_batch(costs, training, sample_count)
    return training_step(costs, training, 0, len(costs.units) - 1, batch, accumulates=False, cache_bytes=0).peak


def smallest_peak(costs: ModelCosts, training: TrainingSpec, sample_count: int, policy: Policy) -> int:
    """What the smallest plan needs: one unit trained, all else as small as the policy allows."""
    start = _nothing_fits(costs, 0, training, sample_count, policy, None)
    return start.needed_bytes


def estimated_work(costs: ModelCosts, training: TrainingSpec, sample_count: int, plan: Plan) -> float:
    """What the planner takes for a plan's time, in floating point operations; for comparing plans of one job only."""
    return sum(
        _cost(costs, training, sample_count, each.first, each.last, each.micro_batch, each.cache, each.checkpoint)
        for each in plan.stages
    )


def _choices(
    costs: ModelCosts,
    budget_bytes: int,
    training: TrainingSpec,
    sample_count: int,
    policy: Policy,
    done: Stage | None,
) -> Iterator[_Choice]:
    """For every range of units and cache place, the cheapest way that fits."""
    batch = effective_batch(costs, training, sample_count)
    start = done.last + 1 if done else 0
    for first in range(start, len(costs.units)):
        for last in range(first, len(costs.units)):
            for place in CachePlace:
                cached = cache_bytes_in(place, costs, training, first, sample_count)
                ways: list[_Choice] = []
                for checkpoint in _checkpoints(policy, first, last):
                    for micro_batch in _micro_batches(batch, policy, costs.smallest_micro_batch):
                        predicted = training_step(
                            costs,
                            training,
                            first,
                            last,
                            micro_batch,
                            accumulates=micro_batch < batch,
                            cache_bytes=cached,
                            checkpoint=checkpoint,
                        ).peak
                        if needed_bytes(predicted.total) <= budget_bytes:
                            cost = _cost(costs, training, sample_count, first, last, micro_batch, place, checkpoint)
                            ways.append(_Choice(first, last, micro_batch, place, checkpoint, predicted, cost))
                            break  # a smaller micro-batch only costs more
                if ways:
                    yield min(ways, key=lambda way: way.cost)


def _checkpoints(policy: Policy, first: int, last: int) -> tuple[bool, ...]:
    """Keeping only the inputs of a single unit saves nothing: it is run again as a whole."""
    return (False, True) if policy is Policy.AUTO and last > first else (False,)


def _micro_batches(batch: int, policy: Policy, smallest: int) -> Iterator[int]:
    """Candidate sizes, largest first: the batch in 1, 2, 3, … even pieces."""
    yield batch
    if policy is Policy.AUTO:
        previous = batch
        for pieces in range(2, batch + 1):
            size = -(-batch // pieces)
            if size < smallest:
                return
            # The remainder is spread, so the smallest piece is floor(batch / pieces).
            if size < previous and batch // pieces >= smallest:
                yield size
                previous = size


def _cost(
    costs: ModelCosts,
    training: TrainingSpec,
    sample_count: int,
    first: int,
    last: int,
    micro_batch: int,
    place: CachePlace,
    checkpoint: bool,
) -> float:
    """Estimated work of a stage, in floating point operations; for comparison only."""
    passes = 4.0 if checkpoint else 3.0  # a backward pass is worth two forward passes
    flops = passes * sum(unit.flops for unit in costs.units[first : last + 1]) + 3.0 * costs.exits[last].flops
    flops *= 1.0 + _STEP_OVERHEAD_SAMPLES / micro_batch
    if place is CachePlace.DISK:
        flops += _DISK_FLOPS_PER_BYTE * cached_sample_bytes(costs, training, first)
    return flops * sample_count * training.local_epochs


def _extend(
    before: _Path | None,
    choice: _Choice,
    costs: ModelCosts,
    budget_bytes: int,
    training: TrainingSpec,
    sample_count: int,
    done: Stage | None,
) -> _Path | None:
    """`choice` trained after `before`, if building its inputs fits as well."""
    previous = before.stage if before else done
    source = previous.first if previous else 0
    source_bytes = cache_bytes_in(previous.cache, costs, training, source, sample_count) if previous else 0
    cache_bytes = cache_bytes_in(choice.place, costs, training, choice.first, sample_count)
    for build_batch, streamed in _builds(effective_batch(costs, training, sample_count), source, choice.first):
        peak = build_peak(
            costs,
            source,
            choice.first,
            build_batch,
            source_bytes=source_bytes,
            cache_bytes=cache_bytes,
            streamed=streamed,
        )
        if needed_bytes(peak.total) <= budget_bytes:
            break
    else:
        return None
    stage = Stage(
        choice.first,
        choice.last,
        choice.micro_batch,
        choice.place,
        build_batch,
        predicted=max(peak, choice.predicted, key=lambda each: each.total),
        checkpoint=choice.checkpoint,
        build_streamed=streamed,
    )
    skipped = choice.first - (before.choice.last + 1 if before else done.last + 1 if done else 0)
    return _Path(
        untrained=(before.untrained if before else 0) + skipped,
        stages=(before.stages if before else 0) + 1,
        cost=(before.cost if before else 0.0) + choice.cost,
        choice=choice,
        stage=stage,
        before=before,
    )


def _builds(batch: int, source: int, first: int) -> Iterator[tuple[int, bool]]:
    """Ways to compute a stage's inputs, (samples at a time, unit by unit or not), the quickest first."""
    while batch:
        yield batch, False
        if first - source > 1:
            yield batch, True
        batch //= 2


def _nothing_fits(
    costs: ModelCosts,
    budget_bytes: int,
    training: TrainingSpec,
    sample_count: int,
    policy: Policy,
    done: Stage | None,
) -> PlanError:
    batch = effective_batch(costs, training, sample_count)
    # Single samples take the least activations, the whole batch in one piece needs no sum of gradients.
    sizes = list(_micro_batches(batch, policy, costs.smallest_micro_batch))
    start = done.last + 1 if done else 0
    source = done.first if done else 0
    source_bytes = cache_bytes_in(done.cache, costs, training, source, sample_count) if done else 0
    smallest = min(
        max(
            training_step(costs, training, unit, unit, size, accumulates=size < batch, cache_bytes=0).peak.total,
            build_peak(costs, source, unit, 1, source_bytes=source_bytes, cache_bytes=0, streamed=True).total,
        )
        for unit in range(start, len(costs.units))
        for size in {sizes[0], sizes[-1]}
    )
    needed = needed_bytes(smallest)
    return PlanError(
        f"the smallest plan needs {format_size(needed, round_up=True)}, {format_size(budget_bytes)} are free "
        f"({costs.model}, policy {policy.value}, batch {batch}). Free memory on the device, raise its cap, "
        + ("or ask for policy auto, which may use micro-batches." if policy is Policy.PAPER else "or lower the batch."),
        needed_bytes=needed,
        budget_bytes=budget_bytes,
    )
