"""Model graphs and cost tables from the network: whatever they hold, they are run, planned with, or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from torch import nn

from fedepth.errors import FedepthError, ModelError
from fedepth.estimate.tracing import trace_costs
from fedepth.models.export import export_model
from fedepth.models.fixed_statistics import with_fixed_statistics
from fedepth.models.run import Model
from fedepth.models.traced import TracedModel, read_costs, read_traced
from fedepth.plan import Policy
from fedepth.planning.check import check_plan
from fedepth.planning.planner import make_plan
from fedepth.task import TrainingSpec
from tests.fuzz.damage import changed, damaged, fuzzing

TRAINING = TrainingSpec(8, 1, "sgd", 0.1, 0.9, 0.0, 0.0, "none", 1)
FIXED = replace(TRAINING, fixed_statistics=True)


@pytest.fixture(scope="module")
def document() -> Any:
    """A convolution with BatchNorm, a second one, and a head."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    graph = export_model(module, "small", (1, 8, 8), "F32", 2).graph
    tables = (trace_costs(each, "small", TRAINING.batch) for each in (graph, with_fixed_statistics(graph)))
    return json.loads(msgspec.json.encode(TracedModel(graph, *tables)))


def use(path: Path, document: bytes) -> None:
    """What a device does with the file before it trains."""
    path.write_bytes(document)
    try:
        traced = read_traced(path)
        traced.graph.layout()
        Model(traced.graph)
        Model(traced.in_training(FIXED).graph)
    except ModelError as error:
        assert len(str(error)) < 500 + len(str(path))
    try:
        tables = read_costs(path)
        for policy, training in product(Policy, (TRAINING, FIXED)):
            costs = tables.of(training)
            for budget_bytes in (1 << 14, 1 << 30):
                check_plan(
                    costs,
                    make_plan(costs, budget_bytes=budget_bytes, training=training, sample_count=64, policy=policy),
                )
    except FedepthError as error:
        assert len(str(error)) < 1000 + len(str(path))


def test_the_model_that_is_damaged_below_is_one(tmp_path: Path, document: Any) -> None:
    path = tmp_path / "model.json"
    path.write_bytes(json.dumps(document).encode())
    traced = read_traced(path)
    Model(traced.graph)
    assert len(traced.graph.units) > 1
    assert any(tensor.not_negative for tensor in traced.graph.layout().tensors)


def test_changed_documents(tmp_path: Path, document: Any) -> None:
    @fuzzing(300)
    @given(changed(document))
    def try_one(other: Any) -> None:
        use(tmp_path / "model.json", json.dumps(other).encode("utf-8", "surrogatepass"))

    try_one()


def test_changed_costs(tmp_path: Path, document: Any) -> None:
    @fuzzing(300)
    @given(changed(document["costs"]))
    def try_one(other: Any) -> None:
        use(tmp_path / "model.json", json.dumps({**document, "costs": other}).encode("utf-8", "surrogatepass"))

    try_one()


def test_damaged_bytes(tmp_path: Path, document: Any) -> None:
    @fuzzing(100)
    @given(damaged(json.dumps(document).encode()))
    def try_one(data: bytes) -> None:
        use(tmp_path / "model.json", data)

    try_one()
