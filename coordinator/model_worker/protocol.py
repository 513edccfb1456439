"""What the model worker is asked: `Preparation` (fedepth.preparation) or a dataclass below, one JSON object a
line, with the key "do" to tell which.

Both sides may load this module, so it imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedepth.data.damage import MOST_DAMAGED
from fedepth.job_sections import ExportSection
from fedepth.task import ModelSpec


@dataclass(frozen=True)
class Evaluate:
    """Test weights. `test_data` is a path, or "digits". Answers "accuracy" (0..1), "loss" and "samples".

    Up to the share `most_damaged` of the images or rows may be damaged: they are left out, and not among "samples".
    """

    model: ModelSpec
    graph: str
    weights: str
    test_data: str
    most_damaged: float = MOST_DAMAGED


@dataclass(frozen=True)
class CheckExport:
    """Find out whether the model can be exported with the operator set that `choices` name. Answers nothing."""

    model: ModelSpec
    graph: str
    weights: str
    choices: ExportSection


@dataclass(frozen=True)
class Export:
    """Export weights to ONNX as `choices` say, compared on test data, or on random inputs where there are none.

    `test_data` is a path, "digits", or empty. Answers the fields of ExportReport, and "compared_on" for people.
    """

    model: ModelSpec
    graph: str
    weights: str
    weights_digest: str
    job: str
    round: int
    test_data: str
    output: str
    choices: ExportSection = field(default_factory=ExportSection)
