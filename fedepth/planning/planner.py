"""From unit costs and a budget to a block plan: exact dynamic programming over contiguous blocks. Pure; no torch.

The units that are trained are one contiguous range. Units that the model's author froze come before it, unless others
that are trained come first. A plan whose last block ends with the model's last unit leaves only first units untrained,
and comes before any other. Where none fits, the units behind the last block are untrained: its loss is computed through
them, frozen (`Stage.frozen_suffix`). Where that does not fit either, the block is trained for the skip connection, and
the head keeps its global value. Within each of these endings (`Ending`) the objective is lexicographic: fewest units
untrained, then fewest stages (depth splits), then least estimated time. The two policies differ only in what a stage
may choose:

    paper  the job's batch in one piece (arXiv 2303.04887, section 4.1)
    auto   any micro-batch, with or without checkpointing, so that full depth is kept wherever that fits

Where the job asks for mutual distillation, the most models are trained that surplus memory holds: what is left beside
one that trains all units in one stage with the job's batch in one piece, without checkpointing, and has no use for
more (section 4.3). So no model is ever split, cut into micro-batches or computed twice for the sake of another one,
and with more memory there are never fewer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedepth.costs import ModelCosts
from fedepth.errors import ConfigError, PlanError
from fedepth.estimate.peak import build_peak, effective_batch, logits_peak, needed_bytes, training_step
from fedepth.estimate.teachers import kept_logits_bytes
from fedepth.plan import MOST_MODELS, CachePlace, Ending, PeakComponents, Plan, Policy, Stage
from fedepth.planning.needs import raw_limit, with_kept
from fedepth.planning.search import Found, Search
from fedepth.planning.ways import Way, Ways, Work
from fedepth.printable import quoted
from fedepth.sizes import format_size
from fedepth.task import Distil, TrainingSpec


def make_plan(
    costs: ModelCosts,
    *,
    budget_bytes: int,
    training: TrainingSpec,
    sample_count: int,
    policy: Policy,
    done: Stage | None = None,
    endings: Sequence[Ending] = tuple(Ending),
) -> Plan:
    """The best plan whose every stage is predicted to stay inside `budget_bytes`.

    Args:
        done: a stage that has been trained already; the plan then goes on behind it, and counts the inputs that stage
            has cached. Its `untrained` names units behind it only.
        endings: those to choose from, the better first.

    Raises:
        PlanError: no plan fits; carries what the smallest plan needs.
    """
    return Planner(costs, training, sample_count, policy, done, endings).plan(budget_bytes)


def unit_plan(costs: ModelCosts, *, unit: int, training: TrainingSpec, sample_count: int, policy: Policy) -> Plan:
    """A trial of this unit alone with the head, with the job's batch in one piece and its inputs on disk.

    The plan says nothing of other units. Its budget is what that needs at least; the inputs are computed as fast as
    they can be inside it.

    Raises:
        PlanError: see `Planner`.
    """
    planner = Planner(costs, training, sample_count, policy)
    frozen_suffix = costs.units[unit].exit is None
    way = Way(planner.ways.batch, checkpoint=False, work=0.0)
    found = Found(unit, unit, way, CachePlace.DISK, frozen_suffix)
    kept = planner.kept_bytes
    trained = planner.trained_peak(found)
    slowest_build = build_peak(costs, 0, unit, 1, source_bytes=0, cache_bytes=kept, streamed=True)
    slowest_logits = planner.slowest_logits(None, unit, CachePlace.DISK)
    budget_bytes = needed_bytes(max(each.total for each in (trained, slowest_build, *slowest_logits)))
    limit = raw_limit(budget_bytes, costs.calibration) - kept
    stage = planner.stage(None, found, limit)
    behind = tuple(range(unit + 1, len(costs.units))) if frozen_suffix else ()
    return Plan((stage,), behind, policy, budget_bytes)


def full_training_peak(costs: ModelCosts, training: TrainingSpec, sample_count: int, models: int = 1) -> PeakComponents:
    """The predicted peak of training all units that are not frozen at once with the job's batch, inputs on disk."""
    batch = effective_batch(costs, training, sample_count)
    first, last = costs.first_trained, len(costs.units) - 1
    kept = kept_logits_bytes(costs, training, sample_count)
    return training_step(costs, training, first, last, batch, accumulates=False, cache_bytes=kept, models=models).peak


def smallest_peak(costs: ModelCosts, training: TrainingSpec, sample_count: int, policy: Policy) -> int:
    """The budget that the smallest plan needs: whatever it trains, all else as small as the policy allows."""
    return Planner(costs, training, sample_count, policy).least_bytes()


def estimated_work(costs: ModelCosts, training: TrainingSpec, sample_count: int, plan: Plan) -> float:
    """What the planner takes for a plan's time, in floating point operations; for comparing plans of one job only."""
    work = Work(costs, training, sample_count)
    return sum(work.of_stage(stage, plan.models) for stage in plan.stages)


class Planner:
    """The planner for one job. What it finds out about blocks holds for every budget, so that many may be asked for.

    Attributes:
        kept_bytes: RAM that is taken all the time, by logits that the task distils from.
    """

    def __init__(
        self,
        costs: ModelCosts,
        training: TrainingSpec,
        sample_count: int,
        policy: Policy,
        done: Stage | None = None,
        endings: Sequence[Ending] = tuple(Ending),
    ) -> None:
        """Arguments as for `make_plan`.

        Raises:
            PlanError: the device has too few samples to train on at all.
        """
        if sample_count < 1:
            raise PlanError(
                f"there are {sample_count} samples to train {costs.model} on", needed_bytes=0, budget_bytes=0
            )
        if sample_count < costs.smallest_micro_batch:
            raise PlanError(
                f"BatchNorm in {costs.model} needs at least {costs.smallest_micro_batch} samples at once, but the "
                f"device has {sample_count}. Give the device more data.",
                needed_bytes=0,
                budget_bytes=0,
            )
        self.ways = Ways(costs, training, sample_count, policy)
        self._costs = costs
        self._training = training
        self._sample_count = sample_count
        self._policy = policy
        self._done = done
        self.kept_bytes = kept_logits_bytes(costs, training, sample_count)
        self._endings = endings
        self._search = Search(
            self.ways,
            [unit.loaded_bytes for unit in costs.units],
            costs.first_trained,
            done,
            endings,
            self.ways.needs.head_alone(1) if training.distil is Distil.GLOBAL else None,
        )

    def plan(self, budget_bytes: int) -> Plan:
        """The best plan for a budget.

        Raises:
            PlanError: no plan fits; carries what the smallest plan needs.
            ConfigError: the budget is no whole number.
        """
        if not isinstance(budget_bytes, int):
            raise ConfigError(f"budget_bytes must be a whole number of bytes, is {quoted(str(budget_bytes))}")
        limit = raw_limit(budget_bytes, self._costs.calibration) - self.kept_bytes
        for models in range(min(self._training.mutual, MOST_MODELS), 1, -1):
            surplus = self._in_surplus(models, budget_bytes, limit)
            if surplus is not None:
                return Plan((surplus,), (), self._policy, budget_bytes, models)
        found = self._search.best(limit)
        if not found:
            raise self._nothing_fits(budget_bytes)
        stages: list[Stage] = []
        for each in found:
            stages.append(self.stage(stages[-1] if stages else self._done, each, limit))
        start = self._done.last + 1 if self._done else self._costs.first_trained
        untrained = (*range(start, found[0].first), *range(found[-1].last + 1, len(self._costs.units)))
        return Plan(tuple(stages), untrained, self._policy, budget_bytes)

    def least_bytes(self) -> int:
        """The smallest budget for which there is a plan."""
        return needed_bytes(with_kept(self._search.least() + self.kept_bytes, self._costs.calibration))

    def _in_surplus(self, models: int, budget_bytes: int, limit: int) -> Stage | None:
        """The one stage that trains so many models within a budget, `limit` raw bytes; None if there is none."""
        if self._done is not None or Ending.LAST_UNIT not in self._endings:
            return None
        first, last = self._costs.first_trained, len(self._costs.units) - 1
        for place in CachePlace:  # the quicker one first
            found = Found(first, last, Way(self.ways.batch, checkpoint=False, work=0.0), place, frozen_suffix=False)
            built = self._search.first_build(first) + self.ways.cached(first, place)
            if built <= limit and needed_bytes(self.trained_peak(found, models).total) <= budget_bytes:
                return self.stage(None, found, limit, models)
        return None

    def trained_peak(self, found: Found, models: int = 1) -> PeakComponents:
        """The predicted peak of training a block this way."""
        return training_step(
            self._costs,
            self._training,
            found.first,
            found.last,
            found.way.micro_batch,
            accumulates=found.way.micro_batch < self.ways.batch,
            cache_bytes=self.ways.cached(found.first, found.place) + self.kept_bytes,
            checkpoint=found.way.checkpoint,
            frozen_suffix=found.frozen_suffix,
            models=models,
        ).peak

    def slowest_logits(self, previous: Stage | None, first: int, place: CachePlace) -> tuple[PeakComponents, ...]:
        """The peak of computing the logits that the task distils from, if that comes before the stage that begins with
        unit `first`, as small as it can be."""
        if previous is not None or self._training.distil is Distil.NONE:
            return ()
        cached = self.ways.cached(first, place) + self.kept_bytes
        return (logits_peak(self._costs, first, 1, cache_bytes=cached, streamed=True),)

    def stage(self, previous: Stage | None, found: Found, limit: int, models: int = 1) -> Stage:
        """The stage, with its inputs computed as fast as they can be within so many raw bytes beside kept ones."""
        first = found.first
        source = previous.first if previous else 0
        source_bytes = self.ways.cached(source, previous.cache) if previous else 0
        cache_bytes = self.ways.cached(first, found.place)
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
            cache_bytes=cache_bytes + self.kept_bytes,
            streamed=streamed,
        )
        logits = self.slowest_logits(previous, first, found.place)
        return Stage(
            first,
            found.last,
            found.way.micro_batch,
            found.place,
            build_batch,
            predicted=max(building, *logits, self.trained_peak(found, models), key=lambda peak: peak.total),
            checkpoint=found.way.checkpoint,
            build_streamed=streamed,
            frozen_suffix=found.frozen_suffix,
        )

    def _nothing_fits(self, budget_bytes: int) -> PlanError:
        needed = self.least_bytes()
        paper = self._policy is Policy.PAPER
        return PlanError(
            f"the smallest plan needs {format_size(needed, round_up=True)}, but only {format_size(budget_bytes)} is "
            f"free ({self._costs.model}, policy {self._policy.value}, batch {self.ways.batch}). Free memory on the "
            "device, raise its cap, or "
            f"{'set the policy to auto, which allows micro-batches' if paper else 'lower the batch size'}.",
            needed_bytes=needed,
            budget_bytes=budget_bytes,
        )


def _builds(batch: int, source: int, first: int) -> Iterator[tuple[int, bool]]:
    """Ways to compute a stage's inputs, (samples at a time, unit by unit or not), the quickest first."""
    while batch:
        yield batch, False
        if first - source > 1:
            yield batch, True
        batch //= 2
