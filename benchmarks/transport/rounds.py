"""The rounds of one federation, measured while it runs: a clock, and what all of its processes take."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from benchmarks.transport.processes import processor_seconds, resident_bytes, tree
from fedepth.errors import ChildError

STUCK_S = 180.0
_EVERY_S = 0.02
_PEAK_TURNS = 5
_LOOK_TURNS = 100


@dataclass
class Rounds:
    """What was seen.

    Attributes:
        ends: when each round ended, in seconds of one clock, with the processor seconds of all processes until then.
        peaks: the most resident bytes of each process and its children, by name.
    """

    ends: list[tuple[float, float]] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)

    def figures(self, skip: int) -> dict[str, Any]:
        """Medians over the rounds after the first `skip`, in which processes start and caches fill."""
        ends = self.ends[skip:]
        pairs = list(itertools.pairwise(ends))
        if not pairs:
            raise ChildError(f"{len(self.ends)} rounds were seen, which is too few after the first {skip}")
        seconds = [after[0] - before[0] for before, after in pairs]
        return {
            "rounds": len(pairs),
            "seconds": round(statistics.median(seconds), 3),
            "seconds_least": round(min(seconds), 3),
            "processor_seconds": round((ends[-1][1] - ends[0][1]) / len(pairs), 3),
            "peak_bytes": self.peaks,
        }


def observe(count: int, finished_rounds: Callable[[], int], pids: Mapping[str, int]) -> Rounds:
    """Watches until `count` rounds are over.

    Args:
        finished_rounds: how many are over by now. Asked some fifty times a second; it raises ChildError where none
            will follow.
        pids: the processes of the federation, by name.

    Raises:
        ChildError: no round has ended for STUCK_S.
    """
    seen = Rounds()
    moved = time.monotonic()
    turn = 0
    trees: dict[str, list[psutil.Process]] = {}
    while len(seen.ends) < count:
        done = finished_rounds()
        now = time.monotonic()
        if done > len(seen.ends):
            seen.ends += [(now, processor_seconds(pids.values()))] * (done - len(seen.ends))
            moved = now
        elif now - moved > STUCK_S:
            raise ChildError(f"no round has ended for {STUCK_S:.0f} s, after {len(seen.ends)}")
        # Looking through /proc for children takes time from those that are measured: a fifth of a core at every turn.
        # Of a child that lives for less than two seconds, the peak may be missed.
        if turn % _LOOK_TURNS == 0:
            trees = {name: tree([pid]) for name, pid in pids.items()}
        if turn % _PEAK_TURNS == 0:
            for name, processes in trees.items():
                seen.peaks[name] = max(seen.peaks.get(name, 0), resident_bytes(processes))
        turn += 1
        time.sleep(_EVERY_S)
    return seen


def largest(peaks: Mapping[str, int], names: Sequence[str]) -> int:
    """The largest peak of these processes."""
    return max((peaks.get(name, 0) for name in names), default=0)
