"""A tracer answers one request after the other, also after one that cannot be fulfilled."""

import asyncio
import math
from pathlib import Path

import pytest

from fedepth.errors import ModelError
from fedepth.estimate.tracer.client import tracer
from fedepth.models.catalog import named_spec
from fedepth.models.digits import DigitsCNN
from fedepth.models.preresnet import PreResNet
from fedepth.task import TrainingSpec
from fedepth.weights import open_weights

TRAINING = TrainingSpec(16, 1, "sgd", 0.1, 0.9, 0.0, 0.0, "none", 1)


def test_one_child_traces_several_models(tmp_path: Path) -> None:
    async def trace() -> tuple[int, int]:
        async with tracer() as asked:
            digits = await asked.costs(named_spec("digits-cnn", None, 10), TRAINING, tmp_path / "digits", ())
            with pytest.raises(ModelError, match="may not import"):
                await asked.costs(named_spec("os:getcwd", "1x8x8", 10), TRAINING, None, ())
            other = await asked.costs(named_spec("preresnet20", None, 10), TRAINING, None, ())
        return len(digits.units), len(other.units)

    assert asyncio.run(trace()) == (6, 10)
    with open_weights(tmp_path / "digits") as weights:
        values = sum(math.prod(weights.info(name)[1]) for name in weights.names)
    assert values == sum(parameter.numel() for parameter in DigitsCNN(1, 10).parameters())


def test_weights_to_try_are_as_large_as_fresh_ones(tmp_path: Path) -> None:
    async def trace() -> None:
        async with tracer() as asked:
            await asked.costs(named_spec("preresnet20", None, 10), TRAINING, tmp_path / "weights", ())

    asyncio.run(trace())
    with open_weights(tmp_path / "weights") as weights:
        assert set(weights.names) == set(PreResNet(3, 10).state_dict())
        convolution = weights.read("blocks.8.conv1.weight")  # 64 channels in, 3 x 3
        assert convolution.std() == pytest.approx(1 / math.sqrt(64 * 9), rel=0.02)
        for name in ("blocks.8.norm2.weight", "blocks.8.norm2.running_var"):
            assert (weights.read(name) == 1).all()
        for name in ("blocks.8.norm2.bias", "blocks.8.norm2.running_mean", "blocks.8.norm2.num_batches_tracked"):
            assert (weights.read(name) == 0).all()
