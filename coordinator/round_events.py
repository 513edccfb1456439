"""What goes into the state machine of `rounds`, with its time, and what comes out, for the job to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceWaiting:
    """A device asks for a task and waits."""

    device_id: str
    now: float


@dataclass(frozen=True)
class Left:
    """A device no longer waits."""

    device_id: str
    now: float


@dataclass(frozen=True)
class Progressed:
    """A sign of life of a task."""

    task_id: str
    now: float


@dataclass(frozen=True)
class UpdateRecorded:
    """An update is recorded. Only for tasks that `accepts` allows."""

    task_id: str
    now: float


@dataclass(frozen=True)
class TaskFailed:
    """A task ended without an update: refused, declined, or broken."""

    task_id: str
    now: float


@dataclass(frozen=True)
class Tick:
    now: float


@dataclass(frozen=True)
class RoundDone:
    """The round's average is recorded."""

    round: int
    now: float


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
class LoseTask:
    task_id: str
    device_id: str
    reason: str


@dataclass(frozen=True)
class CloseRound:
    """Average these tasks' updates, then say RoundDone."""

    round: int
    task_ids: tuple[str, ...]


@dataclass(frozen=True)
class Finish:
    rounds: int


@dataclass(frozen=True)
class Log:
    message: str


Event = DeviceWaiting | Left | Progressed | UpdateRecorded | TaskFailed | Tick | RoundDone
Action = StartRound | GiveTask | LoseTask | CloseRound | Finish | Log
