"""Models and real data for benchmarks of a real trainer, without a coordinator."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_client.measure.trial import TrialModel
from fedepth.costs import ModelCosts
from fedepth.data.idx import write_idx
from fedepth.data.read import open_images
from fedepth.errors import ModelError
from fedepth.estimate.tracer.client import tracer
from fedepth.models.traced import read_costs
from fedepth.task import ModelSpec, TrainingSpec


async def prepare(spec: ModelSpec, training: TrainingSpec, folder: Path) -> TrialModel:
    """The model traced at this batch and with these heads, once per folder, and initial weights."""
    shape = "x".join(map(str, spec.input_shape))
    name = f"{spec.name}-{shape}-{training.batch}-{training.heads.value}".replace(":", "-")
    name += "-fixed" if training.fixed_statistics else ""
    graph, weights = folder / f"{name}.json", folder / f"{name}.safetensors"
    costs = _recorded(graph, training) if weights.exists() else None
    if costs is None:
        folder.mkdir(parents=True, exist_ok=True)
        async with tracer() as trace:
            costs = await trace.trace(spec, training, graph, weights)
    return TrialModel(spec, training, costs, graph, weights)


def _recorded(graph: Path, training: TrainingSpec) -> ModelCosts | None:
    """None if there are none, or only those of a version that knew other costs."""
    try:
        return read_costs(graph).of(training)
    except ModelError:
        return None


def write_digits(folder: Path, count: int) -> Path:
    """`count` real images of digits as IDX files, from the start again where there are fewer."""
    folder.mkdir(parents=True, exist_ok=True)
    digits = open_images("digits", ModelSpec("digits-cnn", tuple("0123456789"), (1, 8, 8), (0.3,), (0.35,)))
    indices = np.arange(count) % len(digits)
    write_idx(folder / "train-images-idx3-ubyte", np.ascontiguousarray(digits.read(indices)[:, 0]))
    write_idx(folder / "train-labels-idx1-ubyte", digits.labels[indices].astype(np.uint8))
    return folder
