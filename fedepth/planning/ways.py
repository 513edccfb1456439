"""The ways to train one block: micro-batch and checkpointing, what each takes in time, and the cheapest that fits."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from fedepth.costs import ModelCosts
from fedepth.estimate.peak import (
    cache_bytes_in,
    cached_sample_bytes,
    effective_batch,
    keeps_to,
)
from fedepth.plan import CachePlace, Policy, Stage
from fedepth.planning.needs import Needs, Table
from fedepth.task import TrainingSpec

# Only the order that these give matters, never the absolute time.
_DISK_FLOPS_PER_BYTE = 40.0  # reading a cached byte costs about as much as this much arithmetic
_STEP_OVERHEAD_SAMPLES = 2.0  # a forward pass costs about this many samples more than its arithmetic


@dataclass(frozen=True)
class Way:
    """How a block is trained, and its estimated work."""

    micro_batch: int
    checkpoint: bool
    work: float


class Work:
    """Estimated work of stages, in floating point operations; for comparing plans of one job only."""

    def __init__(self, costs: ModelCosts, training: TrainingSpec, sample_count: int) -> None:
        self._flops = list(accumulate((unit.flops for unit in costs.units), initial=0))
        self._head = costs.head
        self._units = costs.units
        self._disk = [
            _DISK_FLOPS_PER_BYTE * cached_sample_bytes(costs, training, unit) for unit in range(len(costs.units))
        ]
        self._times = sample_count * training.local_epochs

    def of(
        self, first: int, last: int, micro_batch: int, place: CachePlace, *, checkpoint: bool, frozen_suffix: bool
    ) -> float:
        passes = 4.0 if checkpoint else 3.0  # a backward pass is worth two forward passes
        exit_ = self._head if frozen_suffix else self._units[last].exit or self._head
        flops = passes * (self._flops[last + 1] - self._flops[first]) + 3.0 * exit_.flops
        if frozen_suffix:  # only the gradients of inputs are computed behind the block
            flops += (passes - 1.0) * (self._flops[-1] - self._flops[last + 1])
        flops *= 1.0 + _STEP_OVERHEAD_SAMPLES / micro_batch
        if place is CachePlace.DISK:
            flops += self._disk[first]
        return flops * self._times

    def of_stage(self, stage: Stage, models: int = 1) -> float:
        one = self.of(
            stage.first,
            stage.last,
            stage.micro_batch,
            stage.cache,
            checkpoint=stage.checkpoint,
            frozen_suffix=stage.frozen_suffix,
        )
        # All but the first run forwards once more, for what they say to the others.
        said = (self._flops[stage.last + 1] - self._flops[stage.first]) * self._times
        return models * one + (models - 1) * said


def micro_batches(costs: ModelCosts, training: TrainingSpec, sample_count: int, policy: Policy) -> list[int]:
    """Sizes to choose from, largest first: the batch in 1, 2, 3, … pieces of almost one size."""
    batch = effective_batch(costs, training, sample_count)
    if policy is Policy.PAPER:
        return [batch]
    sizes = dict.fromkeys(-(-batch // pieces) for pieces in range(1, batch + 1))
    return [size for size in sizes if keeps_to(costs, training, sample_count, size)]


class Ways:
    """The ways that one job's policy allows."""

    def __init__(self, costs: ModelCosts, training: TrainingSpec, sample_count: int, policy: Policy) -> None:
        self.batch = effective_batch(costs, training, sample_count)
        self.needs = Needs(costs, training, self.batch)
        self.work = Work(costs, training, sample_count)
        self._cache_bytes = [
            cache_bytes_in(CachePlace.RAM, costs, training, unit, sample_count) for unit in range(len(costs.units))
        ]
        self._sizes = micro_batches(costs, training, sample_count, policy)
        self._checkpoints = (False, True) if policy is Policy.AUTO else (False,)
        self._last_found: dict[tuple[bool, CachePlace], int] = {}
        self._least: dict[tuple[int, bool], list[int]] = {}

    def cached(self, first: int, place: CachePlace) -> int:
        """RAM that the cached inputs of unit `first` take."""
        return self._cache_bytes[first] if place is CachePlace.RAM else 0

    def least(self, first: int, *, frozen_suffix: bool) -> list[int]:
        """The least raw bytes with which a block from `first` to each later unit can be trained, its inputs on disk.

        What a block needs grows with its micro-batch, except that the whole batch in one piece needs no sum of
        gradients.
        """
        key = (first, frozen_suffix)
        if key not in self._least:
            columns: list[list[int]] = []
            for checkpoint in self._checkpoints:
                for size in {self._sizes[0], self._sizes[-1]}:
                    column = self._table(size, checkpoint, frozen_suffix).needs(first)
                    if not _may_checkpoint(first, first, checkpoint, frozen_suffix):
                        column[0] = columns[0][0]
                    columns.append(column)
            self._least[key] = list(map(min, *columns)) if len(columns) > 1 else columns[0]
        return self._least[key]

    def cheapest(self, first: int, last: int, place: CachePlace, limit: int, *, frozen_suffix: bool) -> Way | None:
        """The way with the least work that fits into so many raw bytes; None if none does."""
        room = limit - self.cached(first, place)
        best: Way | None = None
        for checkpoint in self._checkpoints:
            if not _may_checkpoint(first, last, checkpoint, frozen_suffix):
                continue
            size = self._largest(first, last, place, room, checkpoint, frozen_suffix)
            if size is None or (best and size <= best.micro_batch):
                continue  # computing twice pays only where it allows a larger micro-batch
            work = self.work.of(first, last, size, place, checkpoint=checkpoint, frozen_suffix=frozen_suffix)
            if best is None or work < best.work:
                best = Way(size, checkpoint, work)
        return best

    def _largest(
        self, first: int, last: int, place: CachePlace, room: int, checkpoint: bool, frozen_suffix: bool
    ) -> int | None:
        """The largest micro-batch that fits: work falls as it grows.

        Smaller ones need less, except that the whole batch in one piece may need less than any. The search goes step by
        step from where the last one alike ended, since neighbouring blocks need about the same.
        """
        sizes = self._sizes

        def fits(index: int) -> bool:
            return self._table(sizes[index], checkpoint, frozen_suffix).need(first, last) <= room

        if fits(0):
            return sizes[0]
        low, high = 1, len(sizes)  # the first size that fits lies in between, or is none
        tried = self._last_found.get((checkpoint, place), len(sizes) // 2)
        while low < high:
            tried = min(max(tried, low), high - 1)
            if fits(tried):
                high, tried = tried, tried - 1
            else:
                low = tried = tried + 1
        self._last_found[checkpoint, place] = low
        return sizes[low] if low < len(sizes) else None

    def _table(self, micro_batch: int, checkpoint: bool, frozen_suffix: bool) -> Table:
        return self.needs.table(micro_batch, checkpoint=checkpoint, frozen_suffix=frozen_suffix)


def _may_checkpoint(first: int, last: int, checkpoint: bool, frozen_suffix: bool) -> bool:
    """Keeping only the inputs of a single unit saves nothing: it is run again as a whole."""
    return not checkpoint or last > first or frozen_suffix
