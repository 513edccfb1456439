"""What goes into the state machine of `rounds`, with its time, and what comes out: what to record, and what to tell."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """A device asks for a task and waits, as `Presence` knows by now."""

    device_id: str
    now: float


@dataclass(frozen=True)
class Progressed:
    """A sign of life of a task."""

    task_id: str
    now: float


@dataclass(frozen=True)
class TaskFailed:
    """A task ended without an update: refused, declined, or broken.

    Attributes:
        status: "failed" or "refused".
        reason: its short name, for counting.
        final: the device would fail in the same way again.
    """

    task_id: str
    now: float
    status: str
    reason: str
    message: str
    final: bool = False


@dataclass(frozen=True)
class Tick:
    """Time has passed, or an update was recorded."""

    now: float


@dataclass(frozen=True)
class RoundDone:
    """The round is recorded. `paused` says why no other is to begin, if so."""

    round: int
    now: float
    paused: str = ""


@dataclass(frozen=True)
class StartRound:
    round: int
    devices: tuple[str, ...]


@dataclass(frozen=True)
class GiveTask:
    """Hand this task to its device, which waits for it."""

    task_id: str
    device_id: str
    attempt: int
    round: int


@dataclass(frozen=True)
class EndTask:
    """A task has ended without an update. `status` is "failed", "refused" or "lost"."""

    task_id: str
    device_id: str
    status: str
    reason: str
    message: str


@dataclass(frozen=True)
class Log:
    message: str


Event = Asked | Progressed | TaskFailed | Tick | RoundDone
Action = StartRound | GiveTask | EndTask | Log
