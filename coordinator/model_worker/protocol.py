"""What the model worker is asked: the dataclasses below, one JSON object a line, with the key "do" to tell which.

Both sides may load this module, so it imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedepth.task import ModelSpec, TrainingSpec


@dataclass(frozen=True)
class Prepare:
    """Build a model, write its first weights to `output`, and say what it costs.

    Answers "costs" (ModelCosts), "layout" (ModelLayout), "digest" and "size_bytes" of the weights.
    """

    model: ModelSpec
    training: TrainingSpec
    seed: int
    output: str


@dataclass(frozen=True)
class Evaluate:
    """Test weights. `test_data` is a path, or "digits". Answers "accuracy" (0..1), "loss" and "samples"."""

    model: ModelSpec
    weights: str
    test_data: str


@dataclass(frozen=True)
class Export:
    """Export weights to ONNX, compared on the first test images. Answers the fields of ExportReport."""

    model: ModelSpec
    weights: str
    weights_digest: str
    job: str
    round: int
    test_data: str
    output: str
