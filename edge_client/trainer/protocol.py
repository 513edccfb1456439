"""What the agent asks of its trainer and what that answers, in lines of JSON (fedepth.child).

The trainer writes `ready` once; after each `train` request it writes any number of `measure`, `stage_started`,
`progress` and `stage_done`, and then `done` or `failed`. Both sides load this module, so it imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from fedepth.budget import Budget
from fedepth.costs import Calibration
from fedepth.plan import Plan
from fedepth.task import Outcome, PartInfo, Result, StageResult, Task

RESULT = "result.json"  # in the output folder, before `done`: all parts are there, and durable


@dataclass(frozen=True)
class TrainRequest:
    """One task to train. Paths are absolute, on this device.

    Attributes:
        plan: the task's plan, or a smaller one where memory has shrunk.
        graph: path of the job's traced model.
        calibration: of this device.
        enforce: set RLIMIT_DATA, and stop a stage whose first step goes over the budget.
        most_samples: train on the first so many of the data, which may have grown since; 0 for all.
        release_freed: stages give back what they free at once, as in their rehearsals; else they keep a little of it,
            for speed.
        damage: keys of image files to leave out (fedepth.data.damage).
        peers: paths of the device's other models (fedepth.peers), by slot; "" for one to begin anew.
        peers_output: the folder where they go, before the result; "" if nobody keeps them.
        left_out: paths of what the encoding has left out of updates before (fedepth.residuals).
        left_out_output: the folder where it goes, before the result; "" if nobody keeps it.
    """

    task: Task
    plan: Plan
    budget: Budget
    graph: str
    calibration: Calibration
    weights: str
    data: str
    output: str
    cache: str
    device_id: str
    enforce: bool
    most_samples: int = 0
    release_freed: bool = False
    damage: tuple[int, ...] = ()
    peers: tuple[str, ...] = ()
    peers_output: str = ""
    left_out: tuple[str, ...] = ()
    left_out_output: str = ""


class _Event(msgspec.Struct, frozen=True, tag_field="event"):
    """Fields that a newer trainer adds are ignored."""


class Ready(_Event, tag="ready", frozen=True):
    """The trainer is warm. `start_bytes`: what it holds before weights and data."""

    start_bytes: int
    allocator: str


class Measure(_Event, tag="measure", frozen=True):
    """Asks for the budget as it is now.

    Attributes:
        held_bytes: what the trainer holds beyond its baseline.
        baseline_bytes: what it held before weights and data, the model's modules included.
        baseline_anonymous_bytes: the part of that which the kernel cannot drop.
    """

    stage: int
    held_bytes: int
    baseline_bytes: int
    baseline_anonymous_bytes: int


class Rehearsing(_Event, tag="rehearsing", frozen=True):
    """Every stage is tried for one step; until the first stage starts, a death means that the plan needs too much."""


class StageStarted(_Event, tag="stage_started", frozen=True):
    """A stage begins, perhaps with a smaller plan than it was asked for."""

    stage: int
    stage_count: int
    first: int
    last: int
    predicted_peak_bytes: int


class StageProgress(_Event, tag="progress", frozen=True):
    """Where a stage stands."""

    stage: int
    stage_count: int
    first: int
    last: int
    epoch: int
    epochs: int
    loss: float


class Paused(_Event, tag="waiting", frozen=True):
    """A stage pauses: not even its smallest micro-batch fits into what is free now."""

    stage: int
    budget_bytes: int


class StageDone(_Event, tag="stage_done", frozen=True):
    """A stage has ended well; its part lies in the output folder, and is final."""

    result: StageResult
    part: PartInfo


class Done(_Event, tag="done", frozen=True):
    """The task is trained, and its parts lie in the output folder."""

    result: Result


class Failed(_Event, tag="failed", frozen=True):
    """The task ended without an update; the trainer lives on.

    `capped`: a stage met the cap on its heap, perhaps inside its budget; with freed pages released at once it may fit.
    `disk`: a disk did not take what the training writes; `disk_bytes` must be free there, 0 if nobody knows.
    `damaged`: an image file cannot be read; without it the task may go well.
    `peers`: a file of a peer is of another model; without it the task may go well.
    """

    outcome: Outcome
    message: str
    needed_bytes: int = 0
    budget_bytes: int = 0
    stage: int = 0
    miss_bytes: int = 0
    capped: bool = False
    disk: bool = False
    disk_bytes: int = 0
    damaged: bool = False
    peers: bool = False


Event = Measure | Rehearsing | StageStarted | StageProgress | Paused | StageDone | Done | Failed
