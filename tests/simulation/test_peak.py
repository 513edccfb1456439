"""What the memory of a tier is measured on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedepth.costs import Calibration
from fedepth.data.transforms import model_inputs
from fedepth.models.traced import read_costs, write_traced
from fedepth.plan import Plan, Policy
from fedepth.planning.shared import SharedPlanner, question, rounded_budget
from fedepth.prepare import trace_model
from fedepth.simulation.worker.peak import Noise, measure_peak
from fedepth.simulation.worker.protocol import MeasurePeak
from fedepth.task import Category, InputType, ModelSpec, TableSpec, TextSpec, TrainingSpec
from fedepth.weights import save

COLUMNS = TableSpec("label", ("x", "y"), (1.0, 2.0), (2.0, 3.0), (Category("c", ("r",)), Category("d", ("s", "t"))))


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (ModelSpec("images", ("a", "b"), (3, 4, 4), (0.5,) * 3, (0.5,) * 3), np.uint8),
        (ModelSpec("bytes", ("a", "b"), (6,), (), (), InputType.TOKENS), np.uint8),
        (ModelSpec("texts", ("a", "b"), (6,), (), (), InputType.TOKENS, text=TextSpec("l", ("t",), 1000)), np.uint16),
        (ModelSpec("long", ("a", "b"), (6,), (), (), InputType.TOKENS, text=TextSpec("l", ("t",), 1 << 20)), np.int32),
        (ModelSpec("table", ("a", "b"), (COLUMNS.features,), (), (), table=COLUMNS), np.float64),
    ],
)
def test_noise_is_of_the_shape_and_type_of_a_model_s_samples(spec: ModelSpec, dtype: type) -> None:
    noise = Noise(spec, 5)
    found = noise.read(np.arange(5))
    assert found.shape == (5, *spec.sample_shape) and found.dtype == dtype
    assert found.std() > 0
    assert model_inputs(found, spec).shape == (5, *spec.input_shape)
    assert noise.labels.tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("batch", [10, 16])
def test_a_tier_holds_the_network_that_it_was_measured_by(tmp_path: Path, batch: int) -> None:
    """Also after its budget is rounded for the planner: a client of tier 1 would be split else."""
    spec = ModelSpec("digits-cnn", ("a", "b", "c"), (1, 8, 8), (0.5,), (0.5,))
    training = TrainingSpec(batch, 1, "sgd", 0.05, 0.9, 0.0, 0.0, "none", 1)
    graph = tmp_path / "graph.json"
    prepared = trace_model(spec, training, seed=0)
    write_traced(graph, prepared.traced)
    weights = tmp_path / "weights.safetensors"
    save(weights, {name: tensor.detach().numpy() for name, tensor in prepared.tensors.items()})
    request = MeasurePeak(spec, training, 1, 1, str(graph), str(weights), str(tmp_path / "scratch"))
    budget = measure_peak(request)["needed_bytes"]
    assert rounded_budget(budget) == budget
    tables = read_costs(graph)
    asked = question(tables.of(training), Calibration(), training, 360, budget)
    answer = SharedPlanner(tables, Policy.PAPER).answer(asked)
    assert isinstance(answer, Plan) and len(answer.stages) == 1 and not answer.untrained
