"""What the agent asks of its trainer; both sides load this module, so it imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from fedepth.budget import Budget
from fedepth.plan import Plan
from fedepth.task import Task


@dataclass(frozen=True)
class TrainRequest:
    """One task to train. Paths are absolute, on this device.

    Attributes:
        plan: the task's plan, or a smaller one where memory has shrunk.
        allowed_models: every `module:function` that this device may import.
        enforce: set RLIMIT_DATA, and stop a stage whose first step goes over the budget.
        most_samples: train on the first so many of the data, which may have grown since; 0 for all.
        keeping: stages keep a little of what they free, for speed; else nothing, as in their rehearsals.
    """

    task: Task
    plan: Plan
    budget: Budget
    weights: str
    data: str
    output: str
    cache: str
    device_id: str
    allowed_models: tuple[str, ...]
    enforce: bool
    most_samples: int = 0
    keeping: bool = True
