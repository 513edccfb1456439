"""A tracer answers one request after the other, also after one that cannot be fulfilled."""

import asyncio
from pathlib import Path

import pytest

from fedepth.errors import ModelError
from fedepth.estimate.tracer.client import tracer
from fedepth.models.catalog import named_spec
from fedepth.models.digits import DigitsCNN
from fedepth.models.traced import read_costs, read_traced
from fedepth.task import TrainingSpec
from fedepth.weights import load_numpy

TRAINING = TrainingSpec(16, 1, "sgd", 0.1, 0.9, 0.0, 0.0, "none", 1)


def test_one_child_traces_several_models(tmp_path: Path) -> None:
    graph, weights = tmp_path / "graph.json", tmp_path / "weights.safetensors"

    async def trace() -> None:
        async with tracer() as asked:
            costs = await asked.trace(named_spec("digits-cnn", None, 10), TRAINING, graph, weights)
            assert read_costs(graph).of(TRAINING) == costs
            with pytest.raises(ModelError, match="os:getcwd"):
                await asked.trace(named_spec("os:getcwd", "1x8x8", 10), TRAINING, tmp_path / "no", tmp_path / "none")
            again = await asked.trace(named_spec("digits-cnn", "1x16x16", 10), TRAINING, graph, weights)
            assert len(again.units) == 6
            assert again.input_bytes == 4 * costs.input_bytes

    asyncio.run(trace())
    traced = read_traced(graph)
    assert traced.graph.input_shape == (1, 16, 16)
    fresh = DigitsCNN(1, 10).state_dict()
    found = load_numpy(weights)
    assert {name: array.shape for name, array in found.items()} == {n: tuple(t.shape) for n, t in fresh.items()}
    assert found.keys() == traced.graph.tensors.keys()
    assert not (tmp_path / "no").exists()
