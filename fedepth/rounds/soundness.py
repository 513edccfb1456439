"""Whether the average of a round may become the global model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedepth.job_sections import GuardSection


@dataclass(frozen=True)
class Evaluation:
    """What a model does on the job's test data: accuracy as a fraction, mean cross-entropy. None: it is no number."""

    accuracy: float
    loss: float | None


def objection(found: Evaluation | None, before: float | None, guard: GuardSection) -> str:
    """Why the model is not to be published; empty if it may be.

    Args:
        found: None if it could not be evaluated.
        before: the last known accuracy of a published model; None if there is none.
    """
    if found is None:
        return "" if guard.largest_drop == 1 else "it could not be evaluated, which [guard] largest_drop asks for"
    if found.loss is None or not math.isfinite(found.loss) or not math.isfinite(found.accuracy):
        return "its loss on the test data is not a finite number"
    if before is not None and before - found.accuracy > guard.largest_drop:
        return (
            f"its accuracy on the test data is {found.accuracy:.1%}, {before - found.accuracy:.1%} less than the "
            f"{before:.1%} of the model in force; at most {guard.largest_drop:.1%} are allowed ([guard] largest_drop)"
        )
    return ""
