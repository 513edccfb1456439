"""What a record is made of, as frozen types, and their rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec

from fedepth.layout import ModelLayout
from fedepth.plan import Plan
from fedepth.task import Outcome, TrainingSpec

# What a task or an update is refused, failed or lost for. Whatever else is said is counted as "other".
REASONS = frozenset(
    {
        "digest",
        "missing_tensor",
        "unknown_tensor",
        "shape",
        "dtype",
        "not_finite",
        "range",
        "size",
        "plan",
        "weights",
        "samples",
        "late",
        "device",
        "duplicate",
        "norm",
        "diverged",
        "lost",
        *(outcome.value for outcome in Outcome),
    }
)


@dataclass(frozen=True)
class RoundRecord:
    """A finished round; 0 is the start, with nothing trained.

    Attributes:
        digest: sha256 (hex) of the weights in force after this round: its own if it is published, else those of
            the round before.
        accuracy: a fraction; None if it is unknown, as everything else that may be None.
        published: whether its average became the global weights.
        note: why it was not.
        aside_digest: of an average that was not published and is kept aside; "" if there is none.
        epsilon: the differential privacy spent up to this round, with `delta`; None also if there is no bound on it.
        superseded: a rollback took it back.
        kept: whether its files are still here, as far as the record knows.
        noise_multiplier: of the noise that it was closed with; 0 for none.
        clip_norm: to which changes were clipped for that.
    """

    round: int
    digest: str
    size_bytes: int
    closed_at: float
    devices: int
    samples: int
    accuracy: float | None = None
    loss: float | None = None
    export_path: str = ""
    parity_max_abs: float | None = None
    published: bool = True
    note: str = ""
    aside_digest: str = ""
    epsilon: float | None = None
    superseded: bool = False
    kept: bool = True
    noise_multiplier: float | None = None
    clip_norm: float | None = None
    delta: float | None = None


@dataclass(frozen=True)
class Sealed:
    """New weights that are durable and wait for their round to be recorded."""

    round: int
    digest: str
    size_bytes: int
    path: Path


@dataclass(frozen=True)
class TaskRecord:
    """A task as it was handed out. `status` is one of given, accepted, refused, failed, lost."""

    task_id: str
    round: int
    device_id: str
    attempt: int
    status: str
    plan: Plan
    sample_count: int


@dataclass(frozen=True)
class EndedTask:
    """A task that ended without an update. `status` is failed, refused or lost."""

    task_id: str
    status: str
    reason: str
    message: str


@dataclass(frozen=True)
class FailureKind:
    """How often tasks or updates failed in one way, and the last that did. `at` is a Unix time."""

    status: str
    reason: str
    times: int
    message: str
    task_id: str
    at: float


@dataclass(frozen=True)
class RecordedChange:
    """A setting that was changed between two starts.

    Attributes:
        round: the first round that it holds for.
        accepted: it was asked about, and accepted by an option.
        at: a Unix time.
    """

    round: int
    setting: str
    before: Any
    now: Any
    accepted: bool
    at: float


PREPARED_VERSION = 3  # since tensors say which of them are statistics


@dataclass(frozen=True)
class Prepared:
    """What the model worker found out about the model; its graph and costs lie in a file of this digest and size.

    `version` is that of what is said of tensors: what an earlier version recorded is found out again.
    `fixed_statistics`: the costs with fixed BatchNorm statistics are known as well.
    """

    layout: ModelLayout
    training: TrainingSpec
    graph_digest: str
    graph_bytes: int
    version: int = 1
    fixed_statistics: bool = False


@dataclass(frozen=True)
class Summary:
    """The latest that is known of a job, each from the last round in force that has it; None or "" if none has.

    Attributes:
        epsilon: what all rounds have spent, with `delta`.
        not_private: why there is no `epsilon` though noise was added; "" if there is one, or none was.
        unpublished: how many rounds in force were not published.
    """

    accuracy: float | None
    export_path: str
    epsilon: float | None
    delta: float | None
    not_private: str
    unpublished: int


def finite(value: float | None) -> float | None:
    """A number as it is recorded: what is not finite is unknown."""
    return value if value is not None and math.isfinite(value) else None


def to_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def round_row(record: RoundRecord) -> dict[str, Any]:
    row = dict(vars(record))
    for name in ("accuracy", "loss", "parity_max_abs", "epsilon"):
        row[name] = finite(row[name])
    return row


def round_from(row: Mapping[Any, Any]) -> RoundRecord:
    return RoundRecord(**{each.name: row[each.name] for each in fields(RoundRecord)})


def task_from(row: Mapping[Any, Any]) -> TaskRecord:
    """From a row of `tasks` with the column `accepted`, which is NULL for a task without an update."""
    plan = msgspec.json.decode(row["plan"], type=Plan)
    status = row["status"] if row["accepted"] is None else "accepted"
    return TaskRecord(row["task_id"], row["round"], row["device_id"], row["attempt"], status, plan, row["sample_count"])
