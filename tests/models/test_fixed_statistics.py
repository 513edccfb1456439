"""BatchNorm with fixed statistics: the graph in that form is the module with its BatchNorms in evaluation mode."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from torch import nn

from fedepth.models.catalog import named_spec
from fedepth.models.export import Exported, example_inputs, export_model
from fedepth.models.fixed_statistics import has_statistics, with_fixed_statistics
from fedepth.models.graph import Graph, check, statistics_of
from fedepth.models.run import Model
from fedepth.models.zoo import build
from fedepth.training import checkpoint
from fedepth.training.objective import objective, shared_head
from fedepth.training.trial_step import try_one_step

Tensors = dict[str, torch.Tensor]


class Net(nn.Module):
    """Dropout, a BatchNorm that learns statistics, one that keeps none, and one that somebody else writes as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bare = nn.BatchNorm2d(4, track_running_stats=False)
        self.conv3 = nn.Conv2d(4, 4, 3, padding=1)
        self.shared = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.norm(self.conv(x)).relu())
        x = self.bare(self.conv2(x)).relu()
        if self.training:
            self.shared.running_mean.add_(1.0)  # type: ignore[union-attr,operator]
        x = self.shared(self.conv3(x)).relu()
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


@cache
def exported(name: str) -> tuple[nn.Module, Exported]:
    torch.manual_seed(3)
    spec = named_spec(name, {"preresnet20": "3x16x16"}.get(name, "3x32x32"), 5)
    module = build(spec)
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.running_mean.uniform_(-0.3, 0.3)  # type: ignore[union-attr,operator]
            each.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr,operator]
        if isinstance(each, nn.Dropout):
            each.p = 0.0  # other masks are drawn for other pieces of a batch
    return module, export_model(module, name, spec.input_shape, "F32", 5)


def loaded(graph: Graph, tensors: Tensors, *, channels_last: bool = False) -> Model:
    model = Model(graph)

    def fresh(name: str) -> torch.Tensor:
        tensor = tensors[name].detach().clone()
        return tensor.contiguous(memory_format=torch.channels_last) if channels_last and tensor.dim() == 4 else tensor

    model.load(fresh, trainable=True)
    return model


def tensors_of(model: Model) -> Tensors:
    return {name: each for unit in (*model.units, model.head) for name, each in unit.tensors.items()}


def gradients(model: Model, x: torch.Tensor, pieces: int, *, checkpointed: bool) -> Tensors:
    """Of one step on `x`, cut into pieces, as a device adds them up."""
    targets = torch.arange(len(x)) % 5
    for piece, labels in zip(x.tensor_split(pieces), targets.tensor_split(pieces), strict=True):
        loss_of = partial(_loss, model=model, labels=labels, batch=len(x))
        if checkpointed:
            checkpoint.forward_backward(model.units, piece, loss_of)
        else:
            out = piece
            for unit in model.units:
                out = unit(out)
            torch.autograd.backward(loss_of(out))
    return {name: each.grad for name, each in tensors_of(model).items() if each.grad is not None}


def _loss(out: torch.Tensor, *, model: Model, labels: torch.Tensor, batch: int) -> torch.Tensor:
    return objective(shared_head(out, head=model.head, head_shape=model.graph.head_shape), targets=labels, batch=batch)


def apart(one: Tensors, other: Tensors) -> float:
    """The largest difference, relative to the largest value of its tensor."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max() / one[name].abs().max().clamp_min(1e-6)) for name in one)


@pytest.mark.parametrize("name", ["preresnet20", "mobilenet-v3-small"])
def test_it_is_the_module_with_its_batch_norms_in_evaluation_mode(name: str) -> None:
    module, found = exported(name)
    graph = with_fixed_statistics(found.graph)
    check(graph)
    assert graph.smallest_micro_batch == 1
    assert not any(unit.written for unit in (*graph.units, graph.head))
    model, x = loaded(graph, dict(found.tensors)), example_inputs(graph.input_shape, "F32", 0, 6)
    ours = gradients(model, x, 1, checkpointed=False)
    module.train()
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.eval()
    module.zero_grad()
    loss = nn.functional.cross_entropy(module(x), torch.arange(6) % 5)
    loss.backward()  # type: ignore[no-untyped-call]
    theirs = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    assert apart(theirs, ours) < 1e-4
    assert all(torch.equal(each, found.tensors[n]) for n, each in tensors_of(model).items() if n not in theirs)


@pytest.mark.parametrize("name", ["preresnet20", "mobilenet-v3-small"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pieces_of_a_batch_give_its_gradients(name: str, channels_last: bool) -> None:
    """With fixed statistics down to single samples, also checkpointed; with trained ones they give others."""
    _, found = exported(name)
    fixed, x = with_fixed_statistics(found.graph), example_inputs(found.graph.input_shape, "F32", 0, 6)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)

    def step(graph: Graph, pieces: int, *, checkpointed: bool) -> Tensors:
        model = loaded(graph, dict(found.tensors), channels_last=channels_last)
        return gradients(model, x, pieces, checkpointed=checkpointed)

    whole = step(fixed, 1, checkpointed=False)
    for pieces, checkpointed in ((2, False), (3, True), (6, False), (6, True)):
        assert apart(whole, step(fixed, pieces, checkpointed=checkpointed)) < 1e-4, (pieces, checkpointed)
    trained = step(found.graph, 1, checkpointed=False)
    assert apart(trained, step(found.graph, 3, checkpointed=False)) > 0.05


def test_only_batch_norms_that_alone_write_their_statistics_are_fixed() -> None:
    module = Net()
    graph = export_model(module, "net", (2, 4, 4), "F32", 3).graph
    before = {name for unit in (*graph.units, graph.head) for name in unit.written}
    assert {f"{n}.{b}" for n in ("norm", "shared") for b in ("running_mean", "running_var")} <= before
    fixed = with_fixed_statistics(graph)
    written = {name for unit in (*fixed.units, fixed.head) for name in unit.written}
    assert not any(name.startswith("norm.") for name in written)
    assert "shared.running_mean" in written
    assert fixed.tensors == graph.tensors
    names = [each.name for unit in fixed.units for each in unit.training.operations]
    assert "dropout" in names
    assert fixed.smallest_micro_batch == graph.smallest_micro_batch


def test_the_layout_says_what_the_form_leaves_out() -> None:
    for name in ("preresnet20", "mobilenet-v3-small"):
        graph = exported(name)[1].graph
        assert with_fixed_statistics(graph).layout() == graph.layout().without_statistics()
        marked = {each.name for each in graph.layout().tensors if each.statistic}
        assert marked == {each for unit in (*graph.units, graph.head) for each in statistics_of(unit)}
        assert marked == {each for unit in (*graph.units, graph.head) for each in unit.written}


def test_it_is_itself_where_there_is_nothing_to_fix() -> None:
    _, found = exported("preresnet20")
    fixed = with_fixed_statistics(found.graph)
    assert with_fixed_statistics(fixed) is fixed
    assert has_statistics(found.graph)
    assert not has_statistics(fixed)
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(8, 2))
    graph = export_model(plain, "plain", (1, 4, 4), "F32", 2).graph
    assert with_fixed_statistics(graph) is graph


def test_single_samples_can_be_trained_on() -> None:
    """MobileNetV3 at 32 px has a BatchNorm over single values, of which there is no variance."""
    _, found = exported("mobilenet-v3-small")
    assert found.graph.smallest_micro_batch == 2
    try_one_step(with_fixed_statistics(found.graph), found.tensors, found.examples(1))
