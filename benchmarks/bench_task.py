"""Models and real data for benchmarks of a real trainer, without a coordinator."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from edge_client.measure.trial import TrialModel
from fedepth.costs import ModelCosts
from fedepth.data.idx import write_idx
from fedepth.data.read import open_images
from fedepth.estimate.tracer.client import tracer
from fedepth.task import ModelSpec, TrainingSpec


async def prepare(spec: ModelSpec, training: TrainingSpec, folder: Path) -> TrialModel:
    """Costs at this batch, traced once per folder, and initial weights."""
    name = f"{spec.name}-{spec.input_shape[-1]}".replace(":", "-")
    weights, costs_file = folder / f"{name}.safetensors", folder / f"{name}-{training.batch}.costs.json"
    costs = _recorded(costs_file) if weights.exists() else None
    if costs is None:
        folder.mkdir(parents=True, exist_ok=True)
        async with tracer() as trace:
            costs = await trace.costs(spec, training, weights, None)
        costs_file.write_bytes(msgspec.json.encode(costs))
    return TrialModel(spec, training, costs, weights)


def _recorded(costs_file: Path) -> ModelCosts | None:
    """None if there are none, or only those of a version that knew other costs."""
    try:
        return msgspec.json.decode(costs_file.read_bytes(), type=ModelCosts)
    except (FileNotFoundError, msgspec.ValidationError):
        return None


def write_digits(folder: Path, count: int) -> Path:
    """`count` real images of digits as IDX files, from the start again where there are fewer."""
    folder.mkdir(parents=True, exist_ok=True)
    digits = open_images("digits", ModelSpec("digits-cnn", tuple("0123456789"), (1, 8, 8), (0.3,), (0.35,)))
    indices = np.arange(count) % len(digits)
    write_idx(folder / "train-images-idx3-ubyte", np.ascontiguousarray(digits.read(indices)[:, 0]))
    write_idx(folder / "train-labels-idx1-ubyte", digits.labels[indices].astype(np.uint8))
    return folder
