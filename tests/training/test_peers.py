"""Mutual distillation: the very steps of whole models that learn from each other, and what stays of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedepth.errors import OverBudgetError, PeerError
from fedepth.estimate.peak import needed_bytes
from fedepth.files import file_digest
from fedepth.kept_files import number_and_digest
from fedepth.memory.meter import Meter
from fedepth.models.fixed_statistics import with_fixed_statistics
from fedepth.models.run import Model
from fedepth.plan import CachePlace, Policy, Stage
from fedepth.planning.planner import full_training_peak, make_plan
from fedepth.task import ModelSpec, TrainingSpec
from fedepth.training import stages
from fedepth.training.block import BlockTraining
from fedepth.training.context import TrainingContext, load
from fedepth.training.peers import NOISE, begin_peers
from fedepth.training.prefix import build_inputs
from fedepth.training.pressure import MicroBatch
from fedepth.training.stages import fitted, train
from fedepth.weights import load_numpy, save
from tests.training.jobs import FROZEN, NOTHING, SPEC, Quiet, context, exported, fresh, traced, trained_tensors

COUNT = 6
PRERESNET = ModelSpec("preresnet20", ("a", "b", "c"), (1, 8, 8), (0.5,), (0.5,))
DROPOUT = ModelSpec(f"{__name__}:Dropping", ("a", "b", "c"), (1, 8, 8), (0.5,), (0.5,))
SGD = TrainingSpec(COUNT, 1, "sgd", 0.05, 0.9, 1e-3, 0.0, "none", 5, mutual=2, mutual_weight=0.7, mutual_temperature=2)
ADAMW = replace(SGD, optimizer="adamw", learning_rate=1e-3)


class Dropping(nn.Module):
    """Two convolutions with dropout behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleList(nn.Conv2d(width, 4, 3, padding=1) for width in (1, 4))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 64, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for unit in self.units:
            x = functional.dropout(torch.relu(unit(x)), 0.3, self.training)
        logits: torch.Tensor = self.head(x)
        return logits


def job(folder: Path, spec: ModelSpec, training: TrainingSpec, models: int = 2) -> TrainingContext:
    last = len(exported(spec).graph.units) - 1
    found = context(folder, [Stage(0, last, COUNT, CachePlace.RAM, COUNT, NOTHING)], spec, training, COUNT)
    (folder / "peers").mkdir()
    return replace(found, plan=replace(found.plan, models=models), peers_output=folder / "peers")


def written_peer(folder: Path, spec: ModelSpec, seed: int) -> Path:
    """Another model of the job, as a file of what training changes."""
    random = np.random.default_rng(seed)
    graph = exported(spec).graph
    names = {name for unit in (*graph.units, graph.head) for name in unit.trained_names}
    tensors = {}
    for name, tensor in exported(spec).tensors.items():
        if name in names:
            array = tensor.numpy()
            noise = (
                random.normal(0, 0.05, array.shape) if array.dtype == np.float32 and "running_var" not in name else 0
            )
            tensors[name] = (array + noise).astype(array.dtype)
    path = folder / f"given-{seed}.safetensors"
    save(path, tensors)
    return path


def module_with(spec: ModelSpec, path: Path | None) -> nn.Module:
    module = fresh(spec)
    if path is not None:
        module.load_state_dict({n: torch.from_numpy(a) for n, a in load_numpy(path).items()}, strict=False)
    return module.train()


def by_autograd(
    job: TrainingContext,
    peers: list[Path],
    steps: int,
    optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer],
) -> list[dict[str, torch.Tensor]]:
    """The weights and buffers of all models after plain steps: all graphs alive, one loss each, then the steps."""
    spec = job.task.training
    pixels = (torch.from_numpy(job.images.read(np.arange(COUNT))).float() / 255 - 0.5) / 0.5
    labels = torch.from_numpy(job.images.labels.astype(np.int64))
    modules = [module_with(job.task.model, path) for path in (None, *peers)]
    began = [parameter.detach().clone() for parameter in modules[0].parameters()]
    updates = [optimizer(module.parameters()) for module in modules]
    torch.manual_seed(3)
    for _ in range(steps):
        # The order in which random numbers are drawn: those of the first model last.
        said = [module(pixels) for module in modules[1:]]
        logits = [modules[0](pixels), *said]
        losses = []
        for index, own in enumerate(logits):
            loss = functional.cross_entropy(own, labels)
            others = [each.detach() for other, each in enumerate(logits) if other != index]
            temperature = spec.mutual_temperature
            for other in others:
                wanted = functional.softmax(other / temperature, 1)
                found = functional.log_softmax(own / temperature, 1)
                divergence = (wanted * (wanted.log() - found)).sum() / COUNT
                loss = loss + spec.mutual_weight / len(others) * divergence
            if index == 0:
                moved = [(p - q).square().sum() for p, q in zip(modules[0].parameters(), began, strict=True)]
                loss = loss + spec.proximal_mu / 2 * torch.stack(moved).sum()
            losses.append(loss)
        for update, loss in zip(updates, losses, strict=True):
            update.zero_grad()
            loss.backward()
            update.step()
    return [module.state_dict() for module in modules]


def by_blocks(job: TrainingContext, stage: Stage, steps: int) -> list[dict[str, torch.Tensor]]:
    load(job, job.model.head, trainable=True)
    inputs = build_inputs(job, stage, None, None, lambda: None)
    labels = torch.from_numpy(job.images.labels.astype(np.int64))
    micro_batch = MicroBatch(job.costs, job.task.training, stage, COUNT)
    begin = partial(
        BlockTraining, stage=stage, inputs=inputs, labels=labels, index=0, micro_batch=micro_batch, trains_head=True
    )
    block = begin(job)
    block.peers = begin_peers(job, job.plan.models - 1, begin)
    torch.manual_seed(3)
    for _ in range(steps):
        block.step(torch.arange(COUNT))
    inputs.close()
    return [
        {name: tensor.detach() for unit in each.trained for name, tensor in unit.trained().items()}
        for each in (block, *block.peers)
    ]


def assert_alike(got: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> None:
    for mine, its in zip(got, expected, strict=True):
        for name, tensor in mine.items():
            torch.testing.assert_close(
                tensor, its[name], rtol=2e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("spec", "micro_batch", "checkpoint", "models"),
    [
        (SPEC, COUNT, False, 2),
        (SPEC, 4, False, 2),
        (SPEC, 1, True, 2),
        (SPEC, COUNT, False, 3),
        (SPEC, 2, False, 3),
        (PRERESNET, COUNT, False, 2),  # with buffers, which every pass in training may write only once
        (PRERESNET, COUNT, True, 2),
        (DROPOUT, COUNT, False, 2),
        (DROPOUT, COUNT, False, 3),
    ],
)
def test_steps_are_those_of_whole_models_that_learn_from_each_other(
    tmp_path: Path, spec: ModelSpec, micro_batch: int, checkpoint: bool, models: int, steps: int
) -> None:
    one = job(tmp_path, spec, SGD, models)
    peers = [written_peer(tmp_path, spec, seed) for seed in range(1, models)]
    one = replace(one, peers=tuple(peers))
    stage = replace(one.plan.stages[0], micro_batch=micro_batch, checkpoint=checkpoint)
    expected = by_autograd(one, peers, steps, lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=1e-3))
    assert_alike(by_blocks(one, stage, steps), expected)


def test_all_models_see_the_same_views_in_every_epoch(tmp_path: Path) -> None:
    one = job(tmp_path, SPEC, replace(SGD, augmentation="crop-flip"), models=3)
    stage, indices = one.plan.stages[0], torch.arange(COUNT)
    load(one, one.model.head, trainable=True)
    inputs = build_inputs(one, stage, None, None, lambda: None)
    labels = torch.from_numpy(one.images.labels.astype(np.int64))
    micro_batch = MicroBatch(one.costs, one.task.training, stage, COUNT)
    begin = partial(
        BlockTraining, stage=stage, inputs=inputs, labels=labels, index=0, micro_batch=micro_batch, trains_head=True
    )
    block = begin(one)
    block.peers = begin_peers(one, 2, begin)
    seen = []
    for _ in range(2):
        block.epoch_batches()
        mine, *others = (each._read(indices) for each in (block, *block.peers))
        assert all(torch.equal(mine, its) for its in others)
        seen.append(mine)
    assert not torch.equal(*seen)
    inputs.close()


def test_adamw_moves_every_model_by_moments_of_its_own(tmp_path: Path) -> None:
    one = job(tmp_path, SPEC, ADAMW)
    peers = [written_peer(tmp_path, SPEC, 1)]
    expected = by_autograd(one, peers, 3, lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=1e-3))
    assert_alike(by_blocks(replace(one, peers=tuple(peers)), one.plan.stages[0], 3), expected)


def names_in(folder: Path) -> list[tuple[int, str]]:
    return sorted(found for path in folder.iterdir() if (found := number_and_digest(path.name)))


def test_a_task_leaves_its_peers_under_their_digests_and_the_update_is_the_first_model(tmp_path: Path) -> None:
    one = job(tmp_path, SPEC, SGD, models=3)
    tensors = trained_tensors(one)
    assert tensors.keys() == exported(SPEC).tensors.keys()
    names = names_in(tmp_path / "peers")
    assert [slot for slot, _ in names] == [1, 2]
    for slot, digest in names:
        assert file_digest(tmp_path / "peers" / f"{slot}-{digest}.safetensors") == digest
    first, second = (load_numpy(tmp_path / "peers" / f"{slot}-{digest}.safetensors") for slot, digest in names)
    assert first.keys() == second.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert not np.array_equal(first[name], tensor) or name.endswith("num_batches_tracked")
        assert not np.array_equal(first[name], second[name])


def test_equal_tasks_leave_equal_peers_and_a_given_peer_goes_on(tmp_path: Path) -> None:
    found = []
    given: tuple[Path, ...] = ()
    for name in ("one", "two", "three"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "three":
            given = (tmp_path / "two" / "peers" / "1-{1}.safetensors".format(*found[-1][1][0]),)
        one = replace(job(folder, SPEC, SGD), peers=given)
        found.append((trained_tensors(one), names_in(folder / "peers")))
    assert found[0][1] == found[1][1] != found[2][1]
    for name, tensor in found[0][0].items():
        np.testing.assert_array_equal(tensor, found[1][0][name])


def test_a_new_peer_is_the_global_model_with_noise_on_what_is_spread(tmp_path: Path) -> None:
    one = job(tmp_path, SPEC, SGD)
    stage = one.plan.stages[0]
    load(one, one.model.head, trainable=True)
    inputs = build_inputs(one, stage, None, None, lambda: None)
    labels = torch.from_numpy(one.images.labels.astype(np.int64))
    micro_batch = MicroBatch(one.costs, SGD, stage, COUNT)
    begin = partial(
        BlockTraining, stage=stage, inputs=inputs, labels=labels, index=0, micro_batch=micro_batch, trains_head=True
    )
    begin(one)
    (peer,) = begin_peers(one, 1, begin)
    spreads = []
    for unit in peer.trained:
        for name, parameter in unit.parameters():
            given = exported(SPEC).tensors[name]
            if float(given.std(correction=0)) == 0:
                torch.testing.assert_close(parameter.detach(), given)
            elif given.numel() > 500:
                spreads.append(float((parameter.detach() - given).std() / given.std()))
    assert spreads == [pytest.approx(NOISE, rel=0.1)] * len(spreads)
    assert spreads


def test_what_the_author_froze_is_shared_and_stays(tmp_path: Path) -> None:
    one = job(tmp_path, FROZEN, SGD)
    tensors = trained_tensors(one)
    ((slot, digest),) = names_in(tmp_path / "peers")
    peer = load_numpy(tmp_path / "peers" / f"{slot}-{digest}.safetensors")
    assert (
        peer.keys()
        == tensors.keys()
        == {name for unit in (*one.model.units, one.model.head) for name in unit.unit.trained_names}
    )


def test_fedprox_holds_the_update_alone(tmp_path: Path) -> None:
    one = job(tmp_path, SPEC, replace(SGD, proximal_mu=2.0))
    peers = [written_peer(tmp_path, SPEC, 1)]
    expected = by_autograd(one, peers, 3, lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=1e-3))
    assert_alike(by_blocks(replace(one, peers=tuple(peers)), one.plan.stages[0], 3), expected)


def test_a_peer_of_another_model_is_refused(tmp_path: Path) -> None:
    one = job(tmp_path, SPEC, SGD)
    with pytest.raises(PeerError, match="holds another model than the one of this task"):
        trained_tensors(replace(one, peers=(written_peer(tmp_path, PRERESNET, 1),)))


def test_a_peer_of_a_round_with_fixed_statistics_goes_on_with_those_of_the_global_model(tmp_path: Path) -> None:
    given: tuple[Path, ...] = ()
    held = []
    for name in ("fixed", "trained", "fixed again"):
        folder = tmp_path / name
        folder.mkdir()
        one = replace(job(folder, PRERESNET, SGD), peers=given)
        if name.startswith("fixed"):
            one = replace(one, model=Model(with_fixed_statistics(one.model.graph)))
        trained_tensors(one)
        given = (folder / "peers" / "1-{1}.safetensors".format(*names_in(folder / "peers")[0]),)
        held.append({tensor for tensor in load_numpy(given[0]) if "running" in tensor})
    assert held[0] == held[2] == set()
    assert held[1] == {tensor for tensor in exported(PRERESNET).tensors if "running" in tensor}


def planned(folder: Path, hooks: Quiet) -> TrainingContext:
    """A task whose plan has two models, with the real costs; inside `hooks.budget` afterwards."""
    one = job(folder, SPEC, SGD)
    costs = traced(SPEC).costs
    plan = make_plan(costs, budget_bytes=1 << 40, training=SGD, sample_count=COUNT, policy=Policy.PAPER)
    assert plan.models == 2
    hooks.budget = needed_bytes(plan.predicted_peak_bytes)
    return replace(one, costs=costs, plan=plan)


def test_with_less_memory_than_two_models_need_one_is_trained(tmp_path: Path) -> None:
    hooks = Quiet()
    one = planned(tmp_path, hooks)
    assert fitted(one, Meter(), hooks).plan.models == 2
    # One byte less than two models need with their inputs on disk.
    hooks.budget = needed_bytes(full_training_peak(one.costs, SGD, COUNT, models=2).total) - 1
    fewer = fitted(one, Meter(), hooks).plan
    assert (fewer.models, fewer.blocks, fewer.untrained) == (1, "0-5", ())
    outcome = train(one, Meter(), hooks)
    assert outcome.plan.models == outcome.stages[0].models == 1
    assert names_in(tmp_path / "peers") == []


def test_in_the_middle_nobody_waits_for_memory_that_one_model_does_not_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = Quiet()
    one = planned(tmp_path, hooks)
    monkeypatch.setattr(stages, "LOOK_S", 0.0)
    monkeypatch.setattr(stages, "peak_bytes", lambda meter, device: 100 << 20)
    steps: list[int] = []
    real = BlockTraining.step

    def step(block: BlockTraining, indices: torch.Tensor) -> float:
        steps.append(len(indices))
        hooks.budget = 0
        return real(block, indices)

    monkeypatch.setattr(BlockTraining, "step", step)
    monkeypatch.setattr(stages, "check_first_step", lambda *_: None)
    hooks.budget = 200 << 20
    with pytest.raises(OverBudgetError, match="trains 2 models, for which 0 B is not enough any more") as met:
        train(replace(one, enforce=True), Meter(), hooks)
    assert met.value.miss_bytes == one.plan.predicted_peak_bytes
    assert len(steps) == 1


def test_a_plan_of_one_model_leaves_peers_alone(tmp_path: Path) -> None:
    one = replace(job(tmp_path, SPEC, SGD, models=1), peers=(tmp_path / "missing",))
    trained_tensors(one, Quiet())
    assert names_in(tmp_path / "peers") == []
