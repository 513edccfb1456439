"""What the model worker is asked: the dataclasses below, one JSON object a line, with the key "do" to tell which.

Both sides may load this module, so it imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedepth.task import ModelSpec, TrainingSpec

ALIVE_S = 5.0  # how often a worker says that it lives, while it works


@dataclass(frozen=True)
class Prepare:
    """Turn a model into a graph, prove it, write the traced model to `graph` and its first weights to `output`.

    `weights` is a file to begin with, or empty; `folder` is where a custom model's module may lie, besides where Python
    looks. Answers "layout" (ModelLayout), "notes", "digest" and "size_bytes" of
    the weights, "graph_digest" and "graph_bytes".
    """

    model: ModelSpec
    training: TrainingSpec
    seed: int
    weights: str
    graph: str
    output: str
    folder: str = ""


@dataclass(frozen=True)
class Evaluate:
    """Test weights. `test_data` is a path, or "digits". Answers "accuracy" (0..1), "loss" and "samples"."""

    model: ModelSpec
    graph: str
    weights: str
    test_data: str


@dataclass(frozen=True)
class Export:
    """Export weights to ONNX, compared on the first test images. Answers the fields of ExportReport."""

    model: ModelSpec
    graph: str
    weights: str
    weights_digest: str
    job: str
    round: int
    test_data: str
    output: str
