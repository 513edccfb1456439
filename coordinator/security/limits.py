"""What one device may ask of a coordinator: how often, and how much at once.

Rates are those of a token bucket for each identity and kind of call: so many at once, and from then on so many a
second. They lie well above what an agent does on the worst link that is measured (benchmarks.links), so that whoever
meets them is broken or hostile, and well below what would keep a coordinator from others.

    call            agents                                             allowed
    NextTask        one in 30 s; a second apart where a link is bad    5 a second, 100 at once
    FetchFile       a stream per file; after a cut again, up to 5 a    20 a second, 200 at once
    UploadPart      second on a link that is cut every 40 kB
    DescribeData    one, and one after each cut
    ReportProgress  one in 5 s, and one at the start of each phase     5 a second, 60 at once
    CommitUpdate    one per update, and one after each cut
    ReportFailure   one per task
    Renew           one in months                                      1 in 20 s, 5 at once
    operators'      by hand, or by a program that watches              50 a second, 200 at once

A stream costs by its messages: agents send and get some hundred a second at most on any link that is measured, of 512
bytes and more. Of all streams of one device 500 a second are read, and 500 written, 2,000 at once each. Others are not
refused but wait, which holds up that device alone.

Calls that last count as well: a device whose link is cut on one side only comes back while its old calls still seem to
go on, so that of too many the oldest is ended, not the newest refused.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import structlog

from fedepth.printable import printable

MOST_REMEMBERED = 20_000  # identities; more have no certificate of one coordinator
LOG_EVERY_S = 10.0
_log = structlog.get_logger()

T = TypeVar("T")


@dataclass(frozen=True)
class Limit:
    """What is allowed of one kind of call.

    Attributes:
        per_s: from then on.
        burst: at once, after a pause.
        at_once: going on at the same time.
    """

    per_s: float
    burst: int
    at_once: int


_STREAM = Limit(20, 200, 8)
_SAYING = Limit(5, 60, 8)
_OPERATOR = Limit(50, 200, 16)
_MESSAGES = Limit(500, 2000, 0)
READ, WRITTEN = "messages read", "messages written"
# What is not refused, but neither recorded nor told beyond this: a device could fill the record and the log with it.
UNKNOWN_TASKS, CLONES = "updates of tasks that are not open", "questions of a clone"
_TOLD = Limit(0.1, 20, 0)
LIMITS = {
    READ: _MESSAGES,
    WRITTEN: _MESSAGES,
    UNKNOWN_TASKS: _TOLD,
    CLONES: _TOLD,
    "NextTask": Limit(5, 100, 2),
    "FetchFile": _STREAM,
    "UploadPart": _STREAM,
    "DescribeData": Limit(5, 60, 2),
    "CommitUpdate": _SAYING,
    "ReportFailure": _SAYING,
    "ReportProgress": _SAYING,
    "Renew": Limit(0.05, 5, 1),
    "Check": _SAYING,
    "Watch": _OPERATOR,
    "JobStatus": _OPERATOR,
    "ServerReflectionInfo": _OPERATOR,
}


@dataclass
class _Bucket:
    tokens: float
    at: float


@dataclass
class _Known(Generic[T]):
    """What is remembered of one identity; calls that go on, by kind, the oldest first."""

    buckets: dict[str, _Bucket] = field(default_factory=dict)
    calls: dict[str, list[T]] = field(default_factory=dict)


class Limits(Generic[T]):
    """Counts calls of every identity; T is what stands for a call that goes on.

    Attributes:
        refused: calls beyond the limits, since the start.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, most_remembered: int = MOST_REMEMBERED) -> None:
        self.refused = 0
        self._clock = clock
        self._most_remembered = most_remembered
        self._known: OrderedDict[str, _Known[T]] = OrderedDict()
        self._untold = 0
        self._told = -math.inf

    def take(self, who: str, name: str, kind: str) -> str:
        """Counts a call. Returns why it is not allowed now; "" if it is.

        Args:
            who: the identity.
            name: for people.
            kind: the method's name, without its service.
        """
        limit = limit_of(kind)
        bucket = self._bucket(who, kind)
        if bucket.tokens >= 1:
            bucket.tokens -= 1
            return ""
        after_s = math.ceil((1 - bucket.tokens) / limit.per_s)
        rate = f"{limit.per_s:g} a second" if limit.per_s >= 1 else f"one in {1 / limit.per_s:g} s"
        self._note(who, name, kind)
        return f"busy: {printable(name)} calls {kind} more often than {rate}; come back in {after_s} s"

    def message_pause(self, who: str, kind: str) -> float:
        """Counts a message of a stream, READ or WRITTEN; how long it has to wait, in seconds."""
        bucket = self._bucket(who, kind)
        bucket.tokens -= 1
        return max(0.0, -bucket.tokens / LIMITS[kind].per_s)

    def enter(self, who: str, name: str, kind: str, call: T) -> T | None:
        """Notes a call that begins. Returns the oldest of its kind, to be ended, if there are too many."""
        calls = self._remembered(who).calls.setdefault(kind, [])
        calls.append(call)
        if len(calls) <= limit_of(kind).at_once:
            return None
        self._note(who, name, kind)
        return calls.pop(0)

    def leave(self, who: str, kind: str, call: T) -> None:
        """Notes that a call is over."""
        known = self._known.get(who)
        calls = known.calls.get(kind, []) if known else []
        if call in calls:
            calls.remove(call)

    def _bucket(self, who: str, kind: str) -> _Bucket:
        limit, now = limit_of(kind), self._clock()
        buckets = self._remembered(who).buckets
        bucket = buckets.get(kind)
        if bucket is None:
            bucket = buckets[kind] = _Bucket(limit.burst, now)
        bucket.tokens = min(limit.burst, bucket.tokens + (now - bucket.at) * limit.per_s)
        bucket.at = now
        return bucket

    def _remembered(self, who: str) -> _Known[T]:
        known = self._known.get(who)
        if known is None:
            known = self._known[who] = _Known()
            if len(self._known) > self._most_remembered:
                self._known.popitem(last=False)
        self._known.move_to_end(who)
        return known

    def _note(self, who: str, name: str, kind: str) -> None:
        """Counts what is beyond a limit, and says so, but not as often as it happens."""
        self.refused += 1
        self._untold += 1
        now = self._clock()
        if now >= self._told + LOG_EVERY_S:
            _log.warning(
                "calls beyond the limits of one device; if it goes on: fedepth-coordinator certs revoke",
                device=printable(name),
                caller=printable(who),
                call=kind,
                times=self._untold,
            )
            self._untold, self._told = 0, now


def limit_of(kind: str) -> Limit:
    """What is allowed of this kind; of one that nobody may call, as little as of any."""
    return LIMITS.get(kind, _SAYING)


def too_many(kind: str) -> str:
    """Why the oldest of too many calls is ended."""
    return (
        f"busy: more than {limit_of(kind).at_once} calls of {kind} at once, and this was the oldest; come back in 1 s"
    )
