"""What a tracer is asked and what it answers, in lines of JSON. Both sides load this module; nothing heavy in it."""

from __future__ import annotations

import msgspec

from fedepth.costs import ModelCosts
from fedepth.task import ModelSpec, TrainingSpec


class TraceRequest(msgspec.Struct, frozen=True):
    """What to trace. `graph` and `weights`: where the traced model and random weights for it go."""

    model: ModelSpec
    training: TrainingSpec
    graph: str
    weights: str


class TraceAnswer(msgspec.Struct, frozen=True):
    """Either the costs, or why there are none."""

    costs: ModelCosts | None = None
    error: str = ""
