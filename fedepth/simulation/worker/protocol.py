"""What a worker is asked: the dataclasses below, one JSON object a line, with the key "do" to tell which.

It writes {"event": "ready"}, then answers each request with {"ok": {…}} or {"error": {…}}. Both sides load this module,
so it imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedepth.costs import Calibration
from fedepth.data.damage import MOST_DAMAGED
from fedepth.plan import Plan
from fedepth.preparation import Preparation
from fedepth.task import ModelSpec, Task, TrainingSpec

RESULT = "result.json"  # beside the parts of an update: all of them are there, and durable


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
    """Open the data and the model, once, for all requests that follow. `test_data` is empty where a job has none.

    Attributes:
        damage: keys of image files to leave out (fedepth.data.damage).
        most_damaged: share of the test data that may be damaged.
    """

    data: str
    model: ModelSpec
    graph: str
    partition: str
    test_data: str
    scratch: str
    damage: tuple[int, ...] = ()
    most_damaged: float = MOST_DAMAGED


@dataclass(frozen=True)
class Train:
    """Train one client's task.

    Attributes:
        client: its place in the partition.
        budget_bytes: what the session is told that it may take.
        enforce: set RLIMIT_DATA, and stop a stage whose first step goes over the budget.
        release_freed: see `fedepth.training.session.Assignment`.
        peers: paths of the client's other models (fedepth.peers), by slot; "" for one to begin anew.
        peers_output: the folder where they go; "" if there are none.
        left_out: paths of what the encoding has left out of the client's updates before (fedepth.residuals).
        left_out_output: the folder where it goes; "" if nobody keeps it.
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
    peers: tuple[str, ...] = ()
    peers_output: str = ""
    left_out: tuple[str, ...] = ()
    left_out_output: str = ""


@dataclass(frozen=True)
class Evaluate:
    """Figures of the test batches `first` to `last` - 1 under some weights: "figures", one row for each."""

    weights: str
    first: int
    last: int


Request = Preparation | MeasurePeak | Open | Train | Evaluate
NAMES: dict[type[Request], str] = {
    Preparation: "prepare",
    MeasurePeak: "measure_peak",
    Open: "open",
    Train: "train",
    Evaluate: "evaluate",
}
