"""What a tracer is asked and what it answers, in lines of JSON. Both sides load this module; nothing heavy in it."""

from __future__ import annotations

import msgspec

from fedepth.costs import ModelCosts
from fedepth.task import ModelSpec, TrainingSpec


class TraceRequest(msgspec.Struct, frozen=True):
    """What to trace. `weights`: where weights go; nowhere if empty. `allowed`: see `zoo.build`."""

    model: ModelSpec
    training: TrainingSpec
    weights: str
    allowed: tuple[str, ...] | None


class TraceAnswer(msgspec.Struct, frozen=True):
    """The cost table, or why there is none."""

    costs: ModelCosts | None = None
    error: str = ""
