"""What stays as it is while a block is trained: units behind it, parameters of its author, statistics of the head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedepth.memory.meter import Meter
from fedepth.models.run import RunnableUnit
from fedepth.plan import Stage
from fedepth.training.block import BlockTraining
from fedepth.training.context import TrainingContext, load
from fedepth.training.prefix import build_inputs
from fedepth.training.pressure import MicroBatch
from fedepth.training.stages import train
from fedepth.weights import load_numpy
from tests.training.jobs import (
    FROZEN,
    PRERESNET,
    TRAINING,
    Quiet,
    Tensors,
    assert_equal,
    context,
    exported,
    fresh,
    parts_of,
    stage,
)

COUNT = 8


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.Tensor]:
    """What reaches the optimizer, by the address of the parameter; nothing is updated."""
    found: dict[int, torch.Tensor] = {}

    def keep(parameter: torch.Tensor, gradient: torch.Tensor, *_: object) -> None:
        found[parameter.data_ptr()] = gradient.clone()

    monkeypatch.setattr("fedepth.training.block.optimizer_step", lambda _: keep)
    return found


def one_step(job: TrainingContext, planned: Stage, *, trains_head: bool = True) -> BlockTraining:
    """The stage after one step on all samples, not closed yet."""
    load(job, job.model.head, trainable=True)
    inputs = build_inputs(job, planned, None, None, lambda: None)
    labels = torch.from_numpy(job.images.labels)
    micro_batch = MicroBatch(job.costs, job.task.training, planned, COUNT)
    block = BlockTraining(job, planned, inputs, labels, 0, micro_batch, trains_head=trains_head)
    block.step(torch.arange(COUNT))
    inputs.close()
    return block


def in_file(job: TrainingContext, unit: RunnableUnit) -> bool:
    """Whether the unit's tensors are those of the weights file still."""
    return all(torch.equal(t, torch.from_numpy(job.weights.read(name))) for name, t in unit.tensors.items())


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("first", "last"), [(0, 2), (3, 5)])
def test_gradients_come_through_the_frozen_suffix(
    tmp_path: Path, gradients: dict[int, torch.Tensor], first: int, last: int, checkpoint: bool
) -> None:
    planned = replace(stage(first, last), frozen_suffix=True, checkpoint=checkpoint)
    job = context(tmp_path, [planned], PRERESNET, count=COUNT)
    block = one_step(job, planned)

    module = fresh(PRERESNET)
    parts, head = parts_of(module)
    prefix, trained, rest = (
        nn.Sequential(*parts[start:end]) for start, end in ((0, first), (first, last + 1), (last + 1, None))
    )
    prefix.eval()
    rest.eval().requires_grad_(False)
    x = (torch.from_numpy(job.images.read(np.arange(COUNT))).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        x = prefix(x)
    functional.cross_entropy(head(rest(trained(x))), torch.from_numpy(job.images.labels)).backward()

    named = [pair for unit in (*job.model.units[first : last + 1], job.model.head) for pair in unit.parameters()]
    assert len(named) == len(gradients)
    for name, parameter in named:
        expected = module.get_parameter(name).grad
        assert expected is not None
        torch.testing.assert_close(
            gradients[parameter.data_ptr()], expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    # The block's statistics move as the module's do; those behind it do not move at all.
    for unit in (*job.model.units[first : last + 1], job.model.head):
        for name in unit.unit.written:
            torch.testing.assert_close(unit.tensors[name], module.get_buffer(name))
    suffix = job.model.units[last + 1 :]
    assert all(unit.tensors and in_file(job, unit) for unit in suffix)
    block.close()
    assert not any(unit.tensors for unit in suffix)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
def test_an_update_through_a_frozen_suffix_holds_the_block_and_the_head(tmp_path: Path, checkpoint: bool) -> None:
    planned = [stage(0, 1), replace(stage(2, 4), frozen_suffix=True, checkpoint=checkpoint)]
    outcome = train(context(tmp_path, planned, PRERESNET), Meter(), Quiet())
    layout = exported(PRERESNET).graph.layout()
    assert [load_numpy(part).keys() for part in outcome.parts] == [
        {tensor.name for unit in units for tensor in unit.tensors} for units in (layout.units[:2], layout.units[2:5])
    ] + [{tensor.name for tensor in layout.head}]
    assert outcome.plan.untrained == (5, 6, 7, 8, 9)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(
    ("planned", "tracks"),
    [
        pytest.param(stage(0, 4), False, id="behind a skip connection"),
        pytest.param(stage(5, 9), True, id="at the last unit"),
        pytest.param(replace(stage(3, 5), frozen_suffix=True), True, id="through a frozen suffix"),
    ],
)
def test_the_heads_statistics_move_only_behind_true_features(
    tmp_path: Path, planned: Stage, tracks: bool, checkpoint: bool
) -> None:
    planned = replace(planned, checkpoint=checkpoint)
    job = context(tmp_path, [planned], PRERESNET, count=COUNT)
    one_step(job, planned)
    written = job.model.head.unit.written
    assert len(written) == 3
    moved = [not np.array_equal(job.model.head.tensors[name].numpy(), job.weights.read(name)) for name in written]
    assert moved == [tracks] * 3


def by_hand(job: TrainingContext, count: int) -> Tensors:
    """The whole model with torch.optim, on the trainable parameters; one batch an epoch."""
    module = fresh(FROZEN)
    x = (torch.from_numpy(job.images.read(np.arange(count))).float() / 255 - 0.5) / 0.5
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.05, momentum=0.9, weight_decay=1e-3)
    for _ in range(job.task.training.local_epochs):
        optimizer.zero_grad()
        functional.cross_entropy(module(x), torch.from_numpy(job.images.labels)).backward()
        optimizer.step()
    return {name: p.detach().numpy() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
def test_parameters_that_the_author_has_frozen_stay_and_do_not_travel(tmp_path: Path, checkpoint: bool) -> None:
    units = exported(FROZEN).graph.units
    assert [unit.fixed for unit in units] == [(), ("units.1.bias", "units.1.weight"), ("units.2.weight",), ()]
    job = context(tmp_path, [replace(stage(0, 3), checkpoint=checkpoint)], FROZEN, TRAINING, COUNT)
    outcome = train(job, Meter(), Quiet())
    got = {name: tensor for part in outcome.parts for name, tensor in load_numpy(part).items()}
    assert_equal(got, by_hand(job, COUNT))


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
def test_a_block_without_anything_to_train_still_trains_the_head(tmp_path: Path, checkpoint: bool) -> None:
    stages = [replace(stage(1, 1), checkpoint=checkpoint), replace(stage(2, 3), checkpoint=checkpoint)]
    job = context(tmp_path, stages, FROZEN, TRAINING, COUNT)
    block, _, head = train(job, Meter(), Quiet()).parts
    assert load_numpy(block) == {}
    assert all((tensor != job.weights.read(name)).any() for name, tensor in load_numpy(head).items())


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
def test_a_head_that_keeps_its_global_value_has_no_gradients(tmp_path: Path, checkpoint: bool) -> None:
    planned = replace(stage(0, 2), checkpoint=checkpoint)
    job = context(tmp_path, [planned], PRERESNET, count=COUNT)
    one_step(job, planned, trains_head=False)
    assert all(parameter.grad is None for _, parameter in job.model.head.parameters())
    assert in_file(job, job.model.head)
    assert not in_file(job, job.model.units[0])


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
def test_a_task_that_trains_nothing_delivers_nothing(tmp_path: Path, checkpoint: bool) -> None:
    job = context(tmp_path, [replace(stage(1, 1), checkpoint=checkpoint)], FROZEN, TRAINING, COUNT)
    (block,) = train(job, Meter(), Quiet()).parts
    assert load_numpy(block) == {}
