"""What a worker is asked: the dataclasses below, one JSON object a line, with the key "do" to tell which.

It writes {"event": "ready"}, then answers each request with {"ok": {…}} or {"error": {…}}. Both sides load this module,
so it imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedepth.costs import Calibration
from fedepth.plan import Plan
from fedepth.task import ModelSpec, Task, TrainingSpec

RESULT = "result.json"  # beside the parts of an update: all of them are there, and durable


@dataclass(frozen=True)
class Prepare:
    """Turn a job's model into a graph, write that to `graph` and its first weights to `output`.

    `weights` is a file to begin with, or empty; `folder` is where a custom model's module may lie. Answers "layout"
    (ModelLayout), "notes", "digest", "graph_digest" and "graph_bytes".
    """

    model: ModelSpec
    training: TrainingSpec
    seed: int
    weights: str
    graph: str
    output: str
    folder: str = ""


@dataclass(frozen=True)
class MeasurePeak:
    """Train the job's model for two steps in full, its layers `numerator` / `denominator` as wide, and measure.

    Answers "measured_peak_bytes" and "predicted_peak_bytes". Where the model has no setting for its width, `share` is 1
    and the model is the one in `graph`; "scales" says whether it has.
    """

    model: ModelSpec
    training: TrainingSpec
    numerator: int
    denominator: int
    graph: str
    weights: str
    scratch: str


@dataclass(frozen=True)
class Open:
    """Open the data and the model, once, for all requests that follow. `test_data` is empty where a job has none."""

    data: str
    model: ModelSpec
    graph: str
    partition: str
    test_data: str
    scratch: str


@dataclass(frozen=True)
class Train:
    """Train one client's task.

    Attributes:
        client: its place in the partition.
        budget_bytes: what the session is told that it may take.
        enforce: set RLIMIT_DATA, and stop a stage whose first step goes over the budget.
        release_freed: see `fedepth.training.session.Assignment`.
    """

    task: Task
    plan: Plan
    client: int
    device_id: str
    calibration: Calibration
    budget_bytes: int
    weights: str
    output: str
    cache: str
    enforce: bool
    release_freed: bool = False


@dataclass(frozen=True)
class Evaluate:
    """Figures of the test batches `first` to `last` - 1 under some weights: "figures", one row for each."""

    weights: str
    first: int
    last: int


Request = Prepare | MeasurePeak | Open | Train | Evaluate
NAMES: dict[type[Request], str] = {
    Prepare: "prepare",
    MeasurePeak: "measure_peak",
    Open: "open",
    Train: "train",
    Evaluate: "evaluate",
}
