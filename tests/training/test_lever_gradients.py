"""Every exact lever gives the gradients of plain training, through the very code that trains.

Plain means: one forward pass over the whole batch, the mean loss, one backward pass, then the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedepth.plan import CachePlace, Stage
from fedepth.task import ModelSpec, TrainingSpec
from fedepth.training import block as stage_module
from fedepth.training.block import BlockTraining
from fedepth.training.context import TrainingContext, load
from fedepth.training.prefix import build_inputs
from fedepth.training.pressure import MicroBatch
from tests.training.jobs import NOTHING, TRANSFORMER, context, exported, fresh

COUNT = 6
TOLERANCE = 1e-5
SGD = TrainingSpec(COUNT, 1, "sgd", 0.05, 0.9, 1e-3, 0.0, "none", 5)
GROUP_NORM = ModelSpec("digits-cnn", ("a", "b", "c"), (1, 16, 16), (0.5,), (0.5,))
BATCH_NORM = ModelSpec("preresnet20", ("a", "b", "c"), (3, 16, 16), (0.5,) * 3, (0.5,) * 3)
# With BatchNorm a micro-batch has statistics of its own, unless they are fixed.
EXACT = [
    *((spec, size, False) for spec in (GROUP_NORM, TRANSFORMER) for size in (COUNT, 4, 1)),
    (BATCH_NORM, COUNT, False),
    *((BATCH_NORM, size, True) for size in (COUNT, 4, 1)),
]


def job(folder: Path, spec: ModelSpec, training: TrainingSpec) -> TrainingContext:
    # The images on disk are gray; models that take colours get them in three equal channels.
    last = len(exported(spec).graph.units) - 1
    return context(folder, [Stage(0, last, COUNT, CachePlace.RAM, COUNT, NOTHING)], spec, training, COUNT)


def by_lever(
    job: TrainingContext, stage: Stage, monkeypatch: pytest.MonkeyPatch, steps: int = 1
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The gradients that reach the optimizer in the last step, and the weights after it, by name."""
    gradients: dict[int, torch.Tensor] = {}
    real = stage_module.optimizer_step

    def recording(name: str) -> Callable[..., None]:
        update = real(name)

        def recorded(parameter: torch.Tensor, gradient: torch.Tensor, *rest: object) -> None:
            gradients[parameter.data_ptr()] = gradient.clone()
            update(parameter, gradient, *rest)  # type: ignore[arg-type]

        return recorded

    monkeypatch.setattr(stage_module, "optimizer_step", recording)
    load(job, job.model.head, trainable=True)
    inputs = build_inputs(job, stage, None, None, lambda: None)
    labels = torch.from_numpy(job.images.labels.astype(np.int64))
    micro_batch = MicroBatch(job.costs, job.task.training, stage, COUNT)
    block = BlockTraining(job, stage, inputs, labels, 0, micro_batch, trains_head=True)
    for _ in range(steps):
        block.step(torch.arange(COUNT))
    inputs.close()
    named = [pair for unit in (*job.model.units, job.model.head) for pair in unit.parameters()]
    return (
        {name: gradients[parameter.data_ptr()] for name, parameter in named},
        {name: parameter.detach().clone() for name, parameter in named},
    )


def plainly(
    job: TrainingContext, optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], steps: int = 1
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    module = fresh(job.task.model)
    pixels = torch.from_numpy(job.images.read(np.arange(COUNT))).float()
    labels = torch.from_numpy(job.images.labels.astype(np.int64))
    named = dict(module.named_parameters())
    update = optimizer(list(named.values()))
    module.train()
    for each in module.modules():
        if isinstance(each, torch.nn.BatchNorm2d) and job.task.training.fixed_statistics:
            each.eval()
    for _ in range(steps):
        update.zero_grad()
        functional.cross_entropy(module((pixels / 255 - 0.5) / 0.5), labels).backward()
        update.step()
    gradients = {name: parameter.grad for name, parameter in named.items()}
    return (
        {name: gradient for name, gradient in gradients.items() if gradient is not None},
        {name: parameter.detach() for name, parameter in named.items()},
    )


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("channels_last", [False, True], ids=["standard", "channels_last"])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(
    ("spec", "micro_batch", "fixed_statistics"), EXACT, ids=lambda value: getattr(value, "name", str(value))
)
def test_the_gradients_are_those_of_plain_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spec: ModelSpec,
    micro_batch: int,
    fixed_statistics: bool,
    checkpoint: bool,
    channels_last: bool,
) -> None:
    training = replace(SGD, fixed_statistics=fixed_statistics)
    one = replace(job(tmp_path, spec, training), channels_last=channels_last)
    stage = replace(one.plan.stages[0], micro_batch=micro_batch, checkpoint=checkpoint)
    got, _ = by_lever(one, stage, monkeypatch)
    expected, _ = plainly(one, lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3))
    assert_same(got, expected)


def test_adamw_within_the_backward_pass_gives_the_weights_of_plain_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = replace(SGD, optimizer="adamw", learning_rate=1e-3, weight_decay=0.01)
    one = job(tmp_path, TRANSFORMER, training)
    _, got = by_lever(one, one.plan.stages[0], monkeypatch, steps=3)
    _, expected = plainly(one, lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01), steps=3)
    assert_same(got, expected)
