"""The search for the best plan within a limit, without its components: the blocks, where their inputs lie, and how each
is trained. Pure; no torch.

Time does not enter until the number of stages is known: with all caches on disk, which needs the least memory, one pass
over the blocks tells which of them can be in a plan at all; only these are looked at more closely.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from fedepth.plan import CachePlace, Ending, Stage
from fedepth.planning.needs import IMPOSSIBLE
from fedepth.planning.ways import Way, Ways


@dataclass(frozen=True)
class Found:
    """A stage of the best plan, before its inputs' build is chosen."""

    first: int
    last: int
    way: Way
    place: CachePlace
    frozen_suffix: bool


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


class Search:
    """Plans for the units behind `done`, or for all of them. A limit is in raw bytes (fedepth.planning.needs)."""

    def __init__(
        self,
        ways: Ways,
        loaded_bytes: list[int],
        first_trained: int,
        done: Stage | None,
        endings: Sequence[Ending],
        logits_of_head: int | None = None,
    ) -> None:
        """
        Args:
            loaded_bytes: what each unit takes when it is only run.
            first_trained: no plan begins before it.
            logits_of_head: where the whole model runs before the first stage, for its logits, what its head takes.
        """
        self._endings = endings
        self._ways = ways
        self._done = done
        self._start = done.last + 1 if done else first_trained
        self._end = len(loaded_bytes) - 1
        # What computing inputs takes at least: one unit at a time, loaded alone, run on single samples.
        self._passing = [loaded + run for loaded, run in zip(loaded_bytes, ways.needs.runs(1), strict=True)]

        self._logits_of_head = None if done else logits_of_head

    def best(self, limit: int) -> list[Found]:
        """The stages of the best plan; none where nothing fits."""
        for ending in self._endings:
            rests = self._rests(limit, ending)
            starts = self._best_starts(rests, limit)
            if starts:
                return self._cheapest(starts, rests, limit, ending)
        return []

    def least(self) -> int:
        """The smallest limit within which there is a plan."""
        return min(map(self._least, self._endings))

    # --- how few stages

    def _rests(self, limit: int, ending: Ending) -> list[_Rest | None]:
        """For every unit the best that can be done from it on; None where nothing can."""
        rests: list[_Rest | None] = [None] * (self._end + 2)
        for first in range(self._end, self._start - 1, -1):
            best = (-1, 0)  # the last unit that is trained, and stages, negative, so that more is better
            for last in self._final_lasts(first, limit, ending):
                best = max(best, (last, -1))
            for last in self._inner_lasts(first, limit):
                rest = rests[last + 1]
                if rest is not None:
                    best = max(best, (rest.target, -rest.stages - 1))
            if best[0] >= 0:
                rests[first] = _Rest(best[0], -best[1])
        return rests

    def _final_lasts(self, first: int, limit: int, ending: Ending) -> Iterator[int]:
        """Where a plan's last block may end that begins with unit `first`."""
        least = self._ways.least(first, frozen_suffix=ending is Ending.FROZEN_SUFFIX)
        if ending is Ending.LAST_UNIT:
            return iter([self._end] if least[-1] <= limit else [])
        return (last for last in range(first, self._end) if least[last - first] <= limit)

    def _inner_lasts(self, first: int, limit: int) -> Iterator[int]:
        """Where a block may end that another one follows, for which its units have to run without autograd."""
        least = self._ways.least(first, frozen_suffix=False)
        for last in range(first, self._end):
            if self._passing[last] > limit:
                return
            if least[last - first] <= limit:
                yield last

    def _best_starts(self, rests: list[_Rest | None], limit: int) -> list[int]:
        """First units of the plans with the fewest units untrained, and then the fewest stages."""
        found: dict[tuple[int, int], list[int]] = {}
        for first in [self._start] if self._done else range(self._start, self._end + 1):
            rest = rests[first]
            if rest is not None and self.first_build(first) <= limit:
                untrained = first - self._start + self._end - rest.target
                found.setdefault((untrained, rest.stages), []).append(first)
        return found[min(found)] if found else []

    def first_build(self, first: int) -> int:
        """The least raw bytes for computing the inputs of a plan's first stage, when their cache lies on disk, and the
        logits that follow from them."""
        source, source_bytes = (
            (self._done.first, self._ways.cached(self._done.first, self._done.cache)) if self._done else (0, 0)
        )
        moments = [] if self._logits_of_head is None else [*self._passing[first:], self._logits_of_head]
        if source == first:
            moments.append(self._ways.needs.building(first, first, 1, streamed=False))
        else:
            moments.append(source_bytes + max(self._passing[source:first]))
        return max(moments)

    def _least(self, ending: Ending) -> int:
        """The smallest limit within which there is a plan that ends so."""
        least = [IMPOSSIBLE] * (self._end + 2)
        for first in range(self._end, self._start - 1, -1):
            ends = self._ways.least(first, frozen_suffix=ending is Ending.FROZEN_SUFFIX)
            best = ends[-1] if ending is Ending.LAST_UNIT else min(ends[:-1], default=IMPOSSIBLE)
            passing = accumulate(self._passing[first : self._end], max)
            inner = zip(self._ways.least(first, frozen_suffix=False), passing, least[first + 1 :], strict=False)
            least[first] = min([best, *map(max, inner)])
        starts = [self._start] if self._done else range(self._start, self._end + 1)
        return min(max(least[first], self.first_build(first)) for first in starts)

    # --- how to spend the least time

    def _cheapest(self, starts: list[int], rests: list[_Rest | None], limit: int, ending: Ending) -> list[Found]:
        """The plan with the least work among those that begin with one of these units and keep to `rests`.

        A stage's way and the stages behind it do not depend on what comes before, except that the inputs of the next
        stage are computed while both caches may lie in RAM.
        """
        frozen_suffix = ending is Ending.FROZEN_SUFFIX
        lasts = self._lasts_from(starts, rests, limit, ending)
        chosen: dict[tuple[int, CachePlace], _Choice] = {}
        for first in sorted(lasts, reverse=True):
            final = _known(rests[first]).stages == 1
            for place in CachePlace:
                choices = []
                for last in lasts[first]:
                    way = self._ways.cheapest(first, last, place, limit, frozen_suffix=frozen_suffix and final)
                    if way is None:
                        continue
                    if final:
                        choices.append(_Choice(way.work, last, way, None))
                        continue
                    building = self._ways.cached(first, place) + max(self._passing[first : last + 1])
                    choices += [
                        _Choice(way.work + following.work, last, way, next_place)
                        for next_place, following in _following(chosen, last + 1)
                        if building + self._ways.cached(last + 1, next_place) <= limit
                    ]
                if choices:
                    chosen[first, place] = min(choices, key=lambda choice: choice.work)
        first, start_place = min(
            (
                (first, place)
                for first in starts
                for place, _ in _following(chosen, first)
                if self.first_build(first) + self._ways.cached(first, place) <= limit
            ),
            key=lambda key: chosen[key].work,
        )
        stages: list[Found] = []
        at: CachePlace | None = start_place
        while at is not None:
            choice = chosen[first, at]
            final = choice.next_place is None
            stages.append(Found(first, choice.last, choice.way, at, frozen_suffix and final))
            first, at = choice.last + 1, choice.next_place
        return stages

    def _lasts_from(
        self, starts: list[int], rests: list[_Rest | None], limit: int, ending: Ending
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
                found[first] = [last for last in self._final_lasts(first, limit, ending) if last == rest.target]
                continue
            following = _Rest(rest.target, rest.stages - 1)
            found[first] = [last for last in self._inner_lasts(first, limit) if rests[last + 1] == following]
            waiting += [last + 1 for last in found[first]]
        return found


def _known(rest: _Rest | None) -> _Rest:
    assert rest is not None, "plans are only followed where there are some"
    return rest


def _following(chosen: dict[tuple[int, CachePlace], _Choice], first: int) -> Iterator[tuple[CachePlace, _Choice]]:
    """What was chosen for a stage that begins with unit `first`, by the place of its cache."""
    return ((place, chosen[first, place]) for place in CachePlace if (first, place) in chosen)
