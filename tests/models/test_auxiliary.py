"""Auxiliary heads of models: where they are, what a graph with them says, and what one may not say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from msgspec import structs
from torch import nn

from fedepth.errors import ModelError
from fedepth.models.auxiliary import AuxiliaryClassifier, with_auxiliary
from fedepth.models.export import export_model
from fedepth.models.graph import Graph, check, decode, encode
from fedepth.task import Heads
from tests.training.jobs import SPEC, exported_with


@pytest.mark.parametrize(
    ("shape", "channels", "normed", "positions"),
    [
        ((4, 6, 5), 0, (1, 2, 3), (2, 3)),
        ((6, 5, 4), 2, (3,), (1, 2)),
        ((7, 4), 1, (2,), (1,)),
        ((4, 7), 0, (1, 2), (2,)),
        ((4,), 0, (1,), ()),
    ],
    ids=["a map", "channels last", "tokens", "a series", "a vector"],
)
def test_a_classifier_is_norm_mean_and_linear_layer(
    shape: tuple[int, ...], channels: int, normed: tuple[int, ...], positions: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    module = AuxiliaryClassifier(shape, channels, 3).double()
    x = torch.randn(5, *shape).double()
    with torch.no_grad():
        found = module(x)
        mean, variance = x.mean(normed, keepdim=True), x.var(normed, correction=0, keepdim=True)
        features = (x - mean) / (variance + 1e-5).sqrt()
        expected = module.linear(features.mean(positions) if positions else features)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module(x[:1]), found[:1], rtol=1e-12, atol=1e-12)  # of one sample, as of many


class Permuting(nn.Module):
    """Maps of 1×1 that leave a unit with channels last, as ConvNeXt's do at 32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 4)
        self.second = nn.Linear(8, 8)
        self.third = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).permute(0, 2, 3, 1)
        x = self.second(x).permute(0, 3, 1, 2)
        logits: torch.Tensor = self.head(torch.relu(self.third(x)).flatten(1))
        return logits


def test_every_unit_has_a_head_that_tells_inputs_apart() -> None:
    torch.manual_seed(0)
    plain = export_model(Permuting(), "permuting", (3, 4, 4), "F32", 3)
    found = with_auxiliary(plain, 3, seed=0)
    assert len(found.graph.units) > 2
    assert all(found.graph.exits)


def test_a_unit_whose_output_tells_nothing_has_none() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(12, 1)
            self.second = nn.Linear(1, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(torch.relu(self.second(self.first(x))))
            return logits

    torch.manual_seed(0)
    found = with_auxiliary(export_model(Constant(), "constant", (12,), "F32", 3), 3, seed=0)
    narrow = [index for index, shape in enumerate(found.graph.output_shapes) if shape == (1,)]
    assert narrow
    assert not any(found.graph.exits[index] for index in narrow)  # a norm of one number is its shift
    assert not any(name.startswith(f"auxiliary.{narrow[0]}.") for name in (*found.tensors, *found.graph.tensors))


def test_a_graph_with_heads_travels_and_an_older_reader_is_told_so() -> None:
    graph = exported_with(SPEC, Heads.AUXILIARY).graph
    assert decode(encode(graph)) == graph
    assert (graph.version, exported_with(SPEC, Heads.SHARED).graph.version) == (2, 1)
    names = {tensor.name for tensor in graph.layout().tensors}
    assert names == {name for unit in graph.parts for name in unit.trained_names}
    assert graph.layout().parameters >= {name for name in names if name.startswith("auxiliary.")}


CHANGES: list[tuple[Callable[[Graph], Graph], str]] = [
    (lambda graph: structs.replace(graph, version=1), "format 1 and 6 auxiliary heads"),
    (lambda graph: structs.replace(graph, auxiliary=()), "format 2 and 0 auxiliary heads"),
    (lambda graph: structs.replace(graph, version=3), "reads up to 2"),
    (lambda graph: structs.replace(graph, auxiliary=graph.auxiliary[:-1]), "does not have an auxiliary head, or none"),
    (
        lambda graph: structs.replace(graph, auxiliary=(*graph.auxiliary[:-1], graph.auxiliary[0])),
        "does not have an auxiliary head, or none",
    ),
    (
        lambda graph: structs.replace(graph, auxiliary=(None, *graph.auxiliary[1:])),
        "may not end behind a unit of the model's graph that has no auxiliary head",
    ),
    (
        lambda graph: structs.replace(graph, auxiliary=(*graph.auxiliary[-2::-1], None)),
        "does not take what comes out of its unit",
    ),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_a_damaged_graph_is_refused(change: Callable[[Graph], Graph], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        check(change(exported_with(SPEC, Heads.AUXILIARY).graph))


def test_two_heads_do_not_share_a_tensor() -> None:
    graph = exported_with(SPEC, Heads.AUXILIARY).graph
    one, other = graph.auxiliary[2], graph.auxiliary[3]
    assert one is not None and other is not None
    shared = structs.replace(other, parameters=one.parameters, training=one.training, evaluation=one.evaluation)
    with pytest.raises(ModelError, match="belongs to two units"):
        check(structs.replace(graph, auxiliary=(*graph.auxiliary[:3], shared, *graph.auxiliary[4:])))
