"""From unit costs and a budget to a block plan: exact dynamic programming over contiguous blocks. Pure; no torch.

The units that are trained are one contiguous range. A plan whose last block ends with the model's last unit leaves
only first units untrained, and comes before any other. Where none fits, the units behind the last block are untrained:
its loss is computed through them, frozen (`Stage.frozen_suffix`), since a block that was trained for the skip
connection while they were not would harm the model. Within either form the objective is lexicographic: fewest units
untrained, then fewest stages (depth splits), then least estimated time. The two policies differ only in what a stage
may choose:

    paper  the job's batch in one piece (arXiv 2303.04887, section 4.1)
    auto   any micro-batch, with or without checkpointing, so that full depth is kept wherever that fits

Time does not enter until the number of stages is known: with all caches on disk, which needs the least memory, one pass
over the blocks tells which of them can be in a plan at all; only these are looked at more closely.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from fedepth.costs import ModelCosts
from fedepth.errors import PlanError
from fedepth.estimate.peak import build_peak, effective_batch, needed_bytes, training_step
from fedepth.plan import CachePlace, PeakComponents, Plan, Policy, Stage
from fedepth.planning.needs import IMPOSSIBLE, raw_limit, with_kept
from fedepth.planning.ways import Way, Ways, Work
from fedepth.sizes import format_size
from fedepth.task import TrainingSpec


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
        done: a stage that has been trained already; the plan then goes on behind it, and counts the inputs that stage
            has cached. Its `untrained` names units behind it only.

    Raises:
        PlanError: no plan fits; carries what the smallest plan needs.
    """
    return Planner(costs, training, sample_count, policy, done).plan(budget_bytes)


def unit_plan(costs: ModelCosts, *, unit: int, training: TrainingSpec, sample_count: int, policy: Policy) -> Plan:
    """Only this unit is trained, with the job's batch in one piece and its inputs on disk.

    The plan's budget is what that needs at least; the inputs are computed as fast as they can be inside it.

    Raises:
        PlanError: see `Planner`.
    """
    planner = Planner(costs, training, sample_count, policy)
    frozen_suffix = costs.units[unit].exit is None
    way = Way(planner.ways.batch, checkpoint=False, work=0.0)
    trained = planner.trained_peak(unit, unit, way, CachePlace.DISK, frozen_suffix=frozen_suffix)
    slowest_build = build_peak(costs, 0, unit, 1, source_bytes=0, cache_bytes=0, streamed=True)
    budget_bytes = needed_bytes(max(trained.total, slowest_build.total))
    limit = raw_limit(budget_bytes, costs.calibration)
    stage = planner.stage(None, unit, unit, way, CachePlace.DISK, limit, frozen_suffix=frozen_suffix)
    others = tuple(other for other in range(len(costs.units)) if other != unit)
    return Plan((stage,), others, policy, budget_bytes)


def full_training_peak(costs: ModelCosts, training: TrainingSpec, sample_count: int) -> PeakComponents:
    """The predicted peak of training all units at once with the job's batch, inputs on disk."""
    batch = effective_batch(costs, training, sample_count)
    return training_step(costs, training, 0, len(costs.units) - 1, batch, accumulates=False, cache_bytes=0).peak


def smallest_peak(costs: ModelCosts, training: TrainingSpec, sample_count: int, policy: Policy) -> int:
    """The budget that the smallest plan needs: whatever it trains, all else as small as the policy allows."""
    return Planner(costs, training, sample_count, policy).least_bytes()


def estimated_work(costs: ModelCosts, training: TrainingSpec, sample_count: int, plan: Plan) -> float:
    """What the planner takes for a plan's time, in floating point operations; for comparing plans of one job only."""
    work = Work(costs, training, sample_count)
    return sum(work.of_stage(stage) for stage in plan.stages)


@dataclass(frozen=True)
class _Rest:
    """The best that can be done from some unit on.

    Attributes:
        target: the last unit that can be trained.
        stages: with how few stages.
    """

    target: int
    stages: int


@dataclass(frozen=True)
class _Choice:
    """A stage with all that follows it, the cheapest way."""

    work: float
    last: int
    way: Way
    next_place: CachePlace | None


class Planner:
    """The planner for one job. What it finds out about blocks holds for every budget, so that many may be asked for."""

    def __init__(
        self,
        costs: ModelCosts,
        training: TrainingSpec,
        sample_count: int,
        policy: Policy,
        done: Stage | None = None,
    ) -> None:
        """Arguments as for `make_plan`.

        Raises:
            PlanError: the device has too few samples to train on at all.
        """
        if sample_count < costs.smallest_micro_batch:
            raise PlanError(
                f"the device has {sample_count} of the {costs.smallest_micro_batch} samples that BatchNorm in "
                f"{costs.model} needs at once. Give it more data.",
                needed_bytes=0,
                budget_bytes=0,
            )
        self.ways = Ways(costs, training, sample_count, policy)
        self._costs = costs
        self._training = training
        self._sample_count = sample_count
        self._policy = policy
        self._done = done
        self._start = done.last + 1 if done else 0
        self._end = len(costs.units) - 1
        runs = self.ways.needs.runs(1)
        # What computing inputs takes at least: one unit at a time, loaded alone, run on single samples.
        self._passing = [unit.loaded_bytes + run for unit, run in zip(costs.units, runs, strict=True)]

    def plan(self, budget_bytes: int) -> Plan:
        """The best plan for a budget.

        Raises:
            PlanError: no plan fits; carries what the smallest plan needs.
        """
        limit = raw_limit(budget_bytes, self._costs.calibration)
        for frozen_suffix in (False, True):
            rests = self._rests(limit, frozen_suffix)
            starts = self._best_starts(rests, limit)
            if starts:
                stages = self._cheapest(starts, rests, limit, frozen_suffix)
                break
        else:
            raise self._nothing_fits(budget_bytes)
        first, last = stages[0].first, stages[-1].last
        untrained = (*range(self._start, first), *range(last + 1, self._end + 1))
        return Plan(stages, untrained, self._policy, budget_bytes)

    def least_bytes(self) -> int:
        """The smallest budget for which there is a plan."""
        raw = min(self._least_raw(frozen_suffix=False), self._least_raw(frozen_suffix=True))
        return needed_bytes(with_kept(raw, self._costs.calibration))

    def trained_peak(
        self, first: int, last: int, way: Way, place: CachePlace, *, frozen_suffix: bool
    ) -> PeakComponents:
        """The predicted peak of training a block this way."""
        return training_step(
            self._costs,
            self._training,
            first,
            last,
            way.micro_batch,
            accumulates=way.micro_batch < self.ways.batch,
            cache_bytes=self._cache_bytes(first, place),
            checkpoint=way.checkpoint,
            frozen_suffix=frozen_suffix,
        ).peak

    def stage(
        self,
        previous: Stage | None,
        first: int,
        last: int,
        way: Way,
        place: CachePlace,
        limit: int,
        *,
        frozen_suffix: bool,
    ) -> Stage:
        """The stage, with its inputs computed as fast as they can be within so many raw bytes."""
        source = previous.first if previous else 0
        source_bytes = self._cache_bytes(source, previous.cache) if previous else 0
        cache_bytes = self._cache_bytes(first, place)
        needs = self.ways.needs
        build_batch, streamed = next(
            (samples, streamed)
            for samples, streamed in _builds(self.ways.batch, source, first)
            if needs.building(source, first, samples, streamed=streamed) + source_bytes + cache_bytes <= limit
        )
        building = build_peak(
            self._costs,
            source,
            first,
            build_batch,
            source_bytes=source_bytes,
            cache_bytes=cache_bytes,
            streamed=streamed,
        )
        training = self.trained_peak(first, last, way, place, frozen_suffix=frozen_suffix)
        return Stage(
            first,
            last,
            way.micro_batch,
            place,
            build_batch,
            predicted=max(building, training, key=lambda peak: peak.total),
            checkpoint=way.checkpoint,
            build_streamed=streamed,
            frozen_suffix=frozen_suffix,
        )

    # --- how few stages

    def _rests(self, limit: int, frozen_suffix: bool) -> list[_Rest | None]:
        """For every unit the best that can be done from it on; None where nothing can."""
        rests: list[_Rest | None] = [None] * (self._end + 2)
        for first in range(self._end, self._start - 1, -1):
            best = (-1, 0)  # the last unit that is trained, and stages, negative, so that more is better
            for last in self._final_lasts(first, limit, frozen_suffix):
                best = max(best, (last, -1))
            for last in self._inner_lasts(first, limit):
                rest = rests[last + 1]
                if rest is not None:
                    best = max(best, (rest.target, -rest.stages - 1))
            if best[0] >= 0:
                rests[first] = _Rest(best[0], -best[1])
        return rests

    def _final_lasts(self, first: int, limit: int, frozen_suffix: bool) -> Iterator[int]:
        """Where a plan's last block may end that begins with unit `first`."""
        least = self.ways.least(first, frozen_suffix=frozen_suffix)
        if frozen_suffix:
            return (last for last in range(first, self._end) if least[last - first] <= limit)
        return iter([self._end] if least[-1] <= limit else [])

    def _inner_lasts(self, first: int, limit: int) -> Iterator[int]:
        """Where a block may end that another one follows, for which its units have to run without autograd."""
        least = self.ways.least(first, frozen_suffix=False)
        for last in range(first, self._end):
            if self._passing[last] > limit:
                return
            if least[last - first] <= limit:
                yield last

    def _best_starts(self, rests: list[_Rest | None], limit: int) -> list[int]:
        """First units of the plans with the fewest units untrained, and then the fewest stages."""
        found: dict[tuple[int, int], list[int]] = {}
        for first in [self._start] if self._done else range(self._end + 1):
            rest = rests[first]
            if rest is not None and self._first_build(first) <= limit:
                untrained = first - self._start + self._end - rest.target
                found.setdefault((untrained, rest.stages), []).append(first)
        return found[min(found)] if found else []

    def _first_build(self, first: int) -> int:
        """The least raw bytes for computing the inputs of a plan's first stage, when their cache lies on disk."""
        source, source_bytes = (
            (self._done.first, self._cache_bytes(self._done.first, self._done.cache)) if self._done else (0, 0)
        )
        if source == first:
            return self.ways.needs.building(first, first, 1, streamed=False)
        return source_bytes + max(self._passing[source:first])

    def _least_raw(self, *, frozen_suffix: bool) -> int:
        """The smallest limit within which there is a plan of this form."""
        least = [IMPOSSIBLE] * (self._end + 2)
        for first in range(self._end, self._start - 1, -1):
            ends = self.ways.least(first, frozen_suffix=frozen_suffix)
            best = min(ends[:-1], default=IMPOSSIBLE) if frozen_suffix else ends[-1]
            passing = accumulate(self._passing[first : self._end], max)
            inner = zip(self.ways.least(first, frozen_suffix=False), passing, least[first + 1 :], strict=False)
            least[first] = min([best, *map(max, inner)])
        starts = [self._start] if self._done else range(self._end + 1)
        return min(max(least[first], self._first_build(first)) for first in starts)

    # --- how to spend the least time

    def _cheapest(
        self, starts: list[int], rests: list[_Rest | None], limit: int, frozen_suffix: bool
    ) -> tuple[Stage, ...]:
        """The plan with the least work among those that begin with one of these units and keep to `rests`.

        A stage's way and the stages behind it do not depend on what comes before, except that the inputs of the next
        stage are computed while both caches may lie in RAM.
        """
        lasts = self._lasts_from(starts, rests, limit, frozen_suffix)
        chosen: dict[tuple[int, CachePlace], _Choice] = {}
        for first in sorted(lasts, reverse=True):
            final = _known(rests[first]).stages == 1
            for place in CachePlace:
                choices = []
                for last in lasts[first]:
                    way = self.ways.cheapest(first, last, place, limit, frozen_suffix=frozen_suffix and final)
                    if way is None:
                        continue
                    if final:
                        choices.append(_Choice(way.work, last, way, None))
                        continue
                    building = self._cache_bytes(first, place) + max(self._passing[first : last + 1])
                    choices += [
                        _Choice(way.work + following.work, last, way, next_place)
                        for next_place, following in _following(chosen, last + 1)
                        if building + self._cache_bytes(last + 1, next_place) <= limit
                    ]
                if choices:
                    chosen[first, place] = min(choices, key=lambda choice: choice.work)
        first, start_place = min(
            (
                (first, place)
                for first in starts
                for place, _ in _following(chosen, first)
                if self._first_build(first) + self._cache_bytes(first, place) <= limit
            ),
            key=lambda key: chosen[key].work,
        )
        stages: list[Stage] = []
        at: CachePlace | None = start_place
        while at is not None:
            choice = chosen[first, at]
            final = choice.next_place is None
            before = stages[-1] if stages else self._done
            stages.append(
                self.stage(before, first, choice.last, choice.way, at, limit, frozen_suffix=frozen_suffix and final)
            )
            first, at = choice.last + 1, choice.next_place
        return tuple(stages)

    def _lasts_from(
        self, starts: list[int], rests: list[_Rest | None], limit: int, frozen_suffix: bool
    ) -> dict[int, list[int]]:
        """By first unit, where blocks may end in plans that begin at `starts` and have the fewest stages."""
        found: dict[int, list[int]] = {}
        waiting = list(starts)
        while waiting:
            first = waiting.pop()
            if first in found:
                continue
            rest = _known(rests[first])
            if rest.stages == 1:
                found[first] = [last for last in self._final_lasts(first, limit, frozen_suffix) if last == rest.target]
                continue
            following = _Rest(rest.target, rest.stages - 1)
            found[first] = [last for last in self._inner_lasts(first, limit) if rests[last + 1] == following]
            waiting += [last + 1 for last in found[first]]
        return found

    def _cache_bytes(self, first: int, place: CachePlace) -> int:
        return self.ways.cache_bytes[first] if place is CachePlace.RAM else 0

    def _nothing_fits(self, budget_bytes: int) -> PlanError:
        needed = self.least_bytes()
        paper = self._policy is Policy.PAPER
        return PlanError(
            f"the smallest plan needs {format_size(needed, round_up=True)}, {format_size(budget_bytes)} are free "
            f"({self._costs.model}, policy {self._policy.value}, batch {self.ways.batch}). Free memory on the device, "
            f"raise its cap, or {'ask for policy auto, which may use micro-batches' if paper else 'lower the batch'}.",
            needed_bytes=needed,
            budget_bytes=budget_bytes,
        )


def _known(rest: _Rest | None) -> _Rest:
    assert rest is not None, "plans are only followed where there are some"
    return rest


def _following(chosen: dict[tuple[int, CachePlace], _Choice], first: int) -> Iterator[tuple[CachePlace, _Choice]]:
    """What was chosen for a stage that begins with unit `first`, by the place of its cache."""
    return ((place, chosen[first, place]) for place in CachePlace if (first, place) in chosen)


def _builds(batch: int, source: int, first: int) -> Iterator[tuple[int, bool]]:
    """Ways to compute a stage's inputs, (samples at a time, unit by unit or not), the quickest first."""
    while batch:
        yield batch, False
        if first - source > 1:
            yield batch, True
        batch //= 2
