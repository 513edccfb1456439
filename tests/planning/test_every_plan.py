"""The planner against all plans there are, one by one, for small models."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedepth.costs import Calibration, ModelCosts, PassCost, Size
from fedepth.errors import PlanError
from fedepth.estimate.peak import (
    build_peak,
    cache_bytes_in,
    effective_batch,
    logits_peak,
    needed_bytes,
    training_step,
)
from fedepth.estimate.teachers import kept_logits_bytes
from fedepth.plan import CachePlace, Ending, Plan, Policy, Stage
from fedepth.planning.needs import Needs, raw_limit, with_kept
from fedepth.planning.planner import estimated_work, make_plan
from fedepth.task import Distil, TrainingSpec
from tests.drawn_costs import models

TRAINING = TrainingSpec(8, 2, "sgd", 0.1, 0.9, 0.0, 0.0, "none", 1)
DEVICES = [
    Calibration(fixed_bytes=0, kept=0.0, kernel_share=0.0, depthwise_share=0.0, reordered_share=0.0),
    Calibration(fixed_bytes=20_000, kept=0.7, kernel_share=2.0, depthwise_share=9.5, reordered_share=0.95),
]

Key = tuple[Ending, int, int, float]  # with units untrained, stages, work: less is better


class AllPlans:
    """Every plan of a job, with the budget that it needs."""

    def __init__(
        self, costs: ModelCosts, training: TrainingSpec, samples: int, policy: Policy, done: Stage | None
    ) -> None:
        self.costs, self.training, self.samples, self.policy, self.done = costs, training, samples, policy, done
        self.batch = effective_batch(costs, training, samples)
        self.kept = kept_logits_bytes(costs, training, samples)
        self.stages_of: dict[tuple[int, int, CachePlace, bool], list[tuple[int, float]]] = {}
        self.builds: dict[tuple[int, CachePlace | None, int, CachePlace], int] = {}

    def __iter__(self) -> Iterator[tuple[Key, int]]:
        """Its key and its budget, of every plan."""
        units = len(self.costs.units)
        start = self.done.last + 1 if self.done else self.costs.first_trained
        for first, last in itertools.combinations_with_replacement(range(start, units), 2):
            if self.done and first > start:
                continue
            endings = (Ending.FROZEN_SUFFIX, Ending.FROZEN_HEAD) if last < units - 1 else (Ending.LAST_UNIT,)
            untrained = first - start + units - 1 - last
            for ending, count in itertools.product(endings, range(last - first + 1)):
                for cuts in itertools.combinations(range(first + 1, last + 1), count):
                    blocks = list(zip((first, *cuts), (*(cut - 1 for cut in cuts), last), strict=True))
                    for places in itertools.product(CachePlace, repeat=len(blocks)):
                        for work, budget in self.of(blocks, places, ending is Ending.FROZEN_SUFFIX):
                            yield (ending, untrained, len(blocks), work), budget

    def of(
        self, blocks: list[tuple[int, int]], places: tuple[CachePlace, ...], frozen_suffix: bool
    ) -> Iterator[tuple[float, int]]:
        built = 0 if self.done else self.logits(blocks[0][0], places[0])
        source, source_place = (self.done.first, self.done.cache) if self.done else (0, None)
        for (first, _), place in zip(blocks, places, strict=True):
            built = max(built, self.build(source, source_place, first, place))
            source, source_place = first, place
        ways = [
            self.ways(first, last, place, frozen_suffix and last == blocks[-1][1])
            for (first, last), place in zip(blocks, places, strict=True)
        ]
        for chosen in itertools.product(*ways):
            yield sum(work for _, work in chosen), max(built, *(needed for needed, _ in chosen))

    def logits(self, first: int, place: CachePlace) -> int:
        """The budget for the logits that a task distils from, before its first stage."""
        if self.training.distil is Distil.NONE:
            return 0
        cached = cache_bytes_in(place, self.costs, self.training, first, self.samples) + self.kept
        ways = itertools.product(range(1, self.batch + 1), (False, True))
        return min(
            needed_bytes(logits_peak(self.costs, first, samples, cache_bytes=cached, streamed=streamed).total)
            for samples, streamed in ways
        )

    def ways(self, first: int, last: int, place: CachePlace, frozen_suffix: bool) -> list[tuple[int, float]]:
        """Budget and work of every way to train a block that no other way beats in both."""
        key = (first, last, place, frozen_suffix)
        if key not in self.stages_of:
            found = list(self.every_way(*key))
            self.stages_of[key] = [
                way for way in found if not any(o[0] <= way[0] and o[1] <= way[1] and o != way for o in found)
            ]
        return self.stages_of[key]

    def every_way(self, first: int, last: int, place: CachePlace, frozen_suffix: bool) -> Iterator[tuple[int, float]]:
        units = self.costs.units
        if not frozen_suffix and units[last].exit is None:
            return
        if frozen_suffix and any(unit.frozen is None for unit in units[last + 1 :]):
            return
        for checkpoint in (False, True):
            if checkpoint and (self.policy is Policy.PAPER or (first == last and not frozen_suffix)):
                continue
            for micro_batch in {-(-self.batch // pieces) for pieces in range(1, self.batch + 1)}:
                if micro_batch < self.batch and (self.policy is Policy.PAPER or not self.allowed(micro_batch)):
                    continue
                peak = training_step(
                    self.costs, self.training, first, last, micro_batch,
                    accumulates=micro_batch < self.batch,
                    cache_bytes=self.kept + cache_bytes_in(place, self.costs, self.training, first, self.samples),
                    checkpoint=checkpoint, frozen_suffix=frozen_suffix,
                ).peak  # fmt: skip
                stage = Stage(
                    first, last, micro_batch, place, 1, peak, checkpoint=checkpoint, frozen_suffix=frozen_suffix
                )
                plan = Plan((stage,), (), self.policy, 0)
                work = estimated_work(self.costs, self.training, self.samples, plan)
                yield needed_bytes(peak.total), work

    def allowed(self, micro_batch: int) -> bool:
        """Cutting every batch of an epoch in as few even pieces as may be leaves none that BatchNorm cannot take."""
        batches = -(-self.samples // self.batch)
        return all(
            size // -(-size // micro_batch) >= self.costs.smallest_micro_batch
            for size in (self.samples // batches, -(-self.samples // batches))
        )

    def build(self, source: int, source_place: CachePlace | None, first: int, place: CachePlace) -> int:
        key = (source, source_place, first, place)
        if key not in self.builds:
            cached = self.kept + cache_bytes_in(place, self.costs, self.training, first, self.samples)
            held = cache_bytes_in(source_place, self.costs, self.training, source, self.samples) if source_place else 0
            self.builds[key] = min(
                needed_bytes(
                    build_peak(
                        self.costs, source, first, samples, source_bytes=held, cache_bytes=cached, streamed=streamed
                    ).total
                )
                for samples in range(1, self.batch + 1)
                for streamed in (False, True)
            )
        return self.builds[key]


@settings(max_examples=250, deadline=None)
@given(st.data(), st.sampled_from(DEVICES), st.sampled_from(Policy), st.booleans())
def test_no_plan_is_better(data: st.DataObject, device: Calibration, policy: Policy, goes_on: bool) -> None:
    costs = data.draw(models(device))
    *before, last_unit = costs.units
    if data.draw(st.booleans()):  # so that plans without it are worth a look
        last_unit = replace(last_unit, parameter_bytes=last_unit.parameter_bytes + 300_000)
        costs = replace(costs, units=(*before, last_unit))
    if data.draw(st.booleans()):  # else what inputs take while they are computed hardly ever decides
        light = [replace(unit, parameter_bytes=unit.parameter_bytes // 100) for unit in costs.units]
        heavy = data.draw(st.lists(st.integers(0, 80_000), min_size=len(light), max_size=len(light)))
        inference = [PassCost(Size(fixed, 1000)) for fixed in heavy]
        units = (replace(unit, inference=cost) for unit, cost in zip(light, inference, strict=True))
        costs = replace(costs, units=tuple(units))
    training = replace(TRAINING, batch=data.draw(st.integers(1, 8)), proximal_mu=data.draw(st.sampled_from([0.0, 0.1])))
    if data.draw(st.booleans()):
        training = replace(training, distil=Distil.GLOBAL)
        costs = replace(costs, logit_bytes=data.draw(st.sampled_from((40, 2_000, 100_000))))
    samples = data.draw(st.integers(costs.smallest_micro_batch, 40))
    done = None
    if goes_on and len(costs.units) > 1:
        last = data.draw(st.integers(0, len(costs.units) - 2))
        first = data.draw(st.integers(0, last))
        place = data.draw(st.sampled_from(CachePlace))
        done = Stage(first, last, 1, place, 1, build_peak(costs, 0, 0, 1, source_bytes=0, cache_bytes=0))
    every = sorted(AllPlans(costs, training, samples, policy, done), key=lambda plan: plan[1])
    # A budget at which the best plan changes, or one byte less: everything that there is to get wrong lies there.
    thresholds: dict[Key, int] = {}
    for key, needed in every:
        if not thresholds or key < min(thresholds):
            thresholds[key] = needed
    rare = [needed for key, needed in thresholds.items() if key[0] is not Ending.LAST_UNIT or key[2] > 1]
    often = st.sampled_from(list(thresholds.values()))
    budget = data.draw(st.sampled_from(rare) | often if rare else often) - data.draw(st.integers(0, 1))
    fitting = [key for key, needed in every if needed <= budget]
    try:
        found = make_plan(costs, budget_bytes=budget, training=training, sample_count=samples, policy=policy, done=done)
    except PlanError as error:
        assert not fitting
        assert (error.needed_bytes, error.budget_bytes) == (every[0][1], budget)
        return
    best = min(fitting)
    key = found.ending, len(found.untrained), len(found.stages)
    assert key == best[:3]
    assert estimated_work(costs, training, samples, found) == pytest.approx(best[3], rel=1e-9)
    assert needed_bytes(found.predicted_peak_bytes) <= budget


@settings(max_examples=100, deadline=None)
@given(
    models(DEVICES[1]),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from(Distil),
    st.booleans(),
    st.booleans(),
)
def test_needs_are_those_of_the_prediction(
    costs: ModelCosts, micro_batch: int, proximal_mu: float, distil: Distil, checkpoint: bool, frozen_suffix: bool
) -> None:
    training = replace(TRAINING, proximal_mu=proximal_mu, distil=distil)
    costs = replace(costs, logit_bytes=400)
    table = Needs(costs, training, 8).table(micro_batch, checkpoint=checkpoint, frozen_suffix=frozen_suffix)
    units = len(costs.units)
    for first in range(units):
        for last, need in enumerate(table.needs(first), first):
            assert need == table.need(first, last)
            if frozen_suffix and last == units - 1:
                continue
            try:
                peak = training_step(
                    costs, training, first, last, micro_batch,
                    accumulates=micro_batch < 8, cache_bytes=0, checkpoint=checkpoint, frozen_suffix=frozen_suffix,
                ).peak  # fmt: skip
            except ValueError:  # no block can end there
                assert need > 1 << 60
            else:
                assert with_kept(need, costs.calibration) == peak.total


@given(st.integers(0, 1 << 40), st.floats(0, 1))
def test_a_limit_is_the_last_byte_that_fits(budget: int, kept: float) -> None:
    device = Calibration(kept=kept)
    limit = raw_limit(budget, device)
    assert needed_bytes(with_kept(limit + 1, device)) > budget
    assert limit == -1 or needed_bytes(with_kept(limit, device)) <= budget
