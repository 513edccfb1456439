"""What training a model of another width really takes: the memory that a tier of clients stands for."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedepth.costs import Calibration
from fedepth.estimate.peak import needed_bytes
from fedepth.layout import DTYPES
from fedepth.models.traced import read_traced, write_traced
from fedepth.models.zoo import has_width
from fedepth.plan import Policy
from fedepth.planning.planner import make_plan
from fedepth.planning.shared import kept_budget
from fedepth.prepare import trace_model
from fedepth.simulation.worker.protocol import MeasurePeak
from fedepth.task import Distil, InputType, ModelSpec, Task
from fedepth.training.session import Assignment, Granted, Known, run
from fedepth.weights import save

_STEPS = 2
_EVERYTHING = 1 << 50


@dataclass(frozen=True)
class Noise:
    """Random samples as a model's are stored; the class of each is its place modulo the classes."""

    spec: ModelSpec
    count: int

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return np.arange(self.count, dtype=np.int64) % len(self.spec.classes)

    def __len__(self) -> int:
        return self.count

    def read(self, indices: npt.NDArray[Any]) -> npt.NDArray[Any]:
        # Every model knows two token ids, and every column with categories has two places: a value, and any other.
        most = 256 if self.spec.columns is None and self.spec.input_type is InputType.FLOAT else 2
        shape = (len(indices), *self.spec.sample_shape)
        return np.random.default_rng(0).integers(0, most, shape).astype(DTYPES[self.spec.sample_type])


def measure_peak(request: MeasurePeak) -> dict[str, Any]:
    """Raises ModelError: a model of that width cannot be built or run."""
    share = Fraction(request.numerator, request.denominator)
    training = replace(request.training, mutual=1, distil=Distil.NONE)  # a tier is what one model takes
    scales = has_width(request.model)
    folder = Path(request.scratch)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    graph, weights = Path(request.graph), Path(request.weights)
    if scales and share != 1:
        prepared = trace_model(request.model, training, seed=0, width=share)
        graph, weights = folder / "graph.json", folder / "weights.safetensors"
        write_traced(graph, prepared.traced)
        save(weights, {name: tensor.detach().numpy() for name, tensor in prepared.tensors.items()})
    costs = read_traced(graph).in_training(training).costs
    count = _STEPS * training.batch
    plan = make_plan(costs, budget_bytes=_EVERYTHING, training=training, sample_count=count, policy=Policy.PAPER)
    task = Task("peak", 1, "peak", 1, request.model, training, Policy.PAPER, plan, "", 0, "", 0, "")
    assignment = Assignment(
        task=task,
        plan=plan,
        graph=graph,
        calibration=Calibration(),
        weights=weights,
        data=folder,
        output=folder / "output",
        cache=folder / "cache",
        device_id="peak",
        enforce=False,
        release_freed=True,  # the high-water mark is then that of the tensors, and not what an allocator keeps
        images=Noise(request.model, count),
        rehearse=False,
    )
    result = run(assignment, Granted(_EVERYTHING), torch.device("cpu"), Known())
    shutil.rmtree(folder)
    measured = max(stage.measured_peak_bytes for stage in result.stages)
    return {
        "scales": scales,
        "measured_peak_bytes": measured,
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        # Such that it still holds the network after the planner's rounding.
        "needed_bytes": kept_budget(needed_bytes(max(measured, plan.predicted_peak_bytes))),
    }
