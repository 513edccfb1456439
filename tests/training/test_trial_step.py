"""The step that is tried before devices see a job: ordinary models pass it, units that would fail there do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch

from fedepth.errors import ModelError
from fedepth.models import zoo
from fedepth.models.export import export_model
from fedepth.models.graph import Extent, Graph, Operation, Program, Tensor, Unit, Value, check
from fedepth.models.run import RunnableUnit
from fedepth.task import ModelSpec
from fedepth.training import checkpoint
from fedepth.training.trial_step import try_one_step
from tests.training.jobs import FROZEN, PRERESNET, SPEC, TOKENS, TRANSFORMER, VECTORS, exported


@pytest.mark.parametrize("spec", [SPEC, PRERESNET, TRANSFORMER, TOKENS, VECTORS, FROZEN], ids=lambda spec: spec.name)
def test_ordinary_models_pass_and_stay_as_they_are(spec: ModelSpec) -> None:
    found = exported(spec)
    before = {name: tensor.clone() for name, tensor in found.tensors.items()}
    try_one_step(found.graph, found.tensors, found.examples(2))
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, before[name]), name
        assert not tensor.requires_grad


WIDTH = 3
WEIGHTS = {name: torch.full((WIDTH,), 0.5) + torch.arange(WIDTH) for name in ("a", "b")}


def two_units(*second: Operation) -> Graph:
    """Units that scale what they are given; the second one works as it is told."""

    def unit(name: str, *operations: Operation) -> Unit:
        program = Program(operations, operations[-1].results[0])
        return Unit(name, (name,), (), (), (WIDTH,), program, program)

    nothing = Program((), 0)
    graph = Graph(
        version=1,
        units=(unit("a", Operation("mul.Tensor", (Value(0), Tensor("a")), (1,))), unit("b", *second)),
        head=Unit("head", (), (), (), (WIDTH,), nothing, nothing),
        exits=(True, True),
        tensors=dict.fromkeys(WEIGHTS, ("F32", (WIDTH,))),
        input_type="F32",
        smallest_micro_batch=1,
        channels_last=False,
    )
    check(graph)
    return graph


def tried(graph: Graph, weights: Mapping[str, torch.Tensor] = WEIGHTS) -> None:
    try_one_step(graph, weights, torch.randn(2, WIDTH))


SQUARE = Operation("square", (Value(1),), (2,))


def test_a_unit_by_hand_passes() -> None:
    tried(two_units(Operation("mul.Tensor", (Value(0), Tensor("b")), (1,)), SQUARE))


def test_a_unit_that_fails_is_named_with_the_reason() -> None:
    wrong = Operation("view", (Value(0), (Extent(1), 2)), (1,))
    with pytest.raises(
        ModelError, match=r"unit b of the model fails in one training step.*shape '\[2, 2\]' is invalid"
    ):
        tried(two_units(wrong, SQUARE))


def test_a_unit_that_fails_in_its_backward_pass_only_is_named() -> None:
    # The square needs the value that is overwritten afterwards.
    scaled = Operation("mul.Tensor", (Value(0), Tensor("b")), (1,))
    overwritten = Operation("mul_.Tensor", (Value(1), Value(2)), (3,))
    with pytest.raises(ModelError, match=r"unit b of the model fails in one training step.*modified by an inplace"):
        tried(two_units(scaled, SQUARE, overwritten))


def test_a_unit_that_changes_what_it_is_given_is_found_out() -> None:
    changing = Operation("add_.Tensor", (Value(0), Tensor("b")), (1,))
    with pytest.raises(ModelError, match=r"of the model fails in one training step.*inplace"):
        tried(two_units(changing, SQUARE))


def test_what_rounding_leaves_of_a_gradient_that_is_zero_may_differ() -> None:
    """With one channel, the scale of the first norm is taken out again by the second: its gradient is rounding."""
    torch.manual_seed(1)
    narrow = zoo.build_width(replace(PRERESNET, input_shape=(1, 8, 8)), Fraction(1, 16))
    found = export_model(narrow, "narrow", (1, 8, 8), "F32", len(PRERESNET.classes))
    for samples in (2, 4):
        try_one_step(found.graph, found.tensors, found.examples(samples))


@pytest.mark.parametrize("times", [0.99, 1.01, float("nan")])
@pytest.mark.parametrize("spec", [SPEC, PRERESNET], ids=lambda spec: spec.name)
def test_a_gradient_that_differs_by_more_than_rounding_is_refused_and_named(
    spec: ModelSpec, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = exported(spec)
    unit = found.graph.units[-1]
    right = checkpoint.forward_backward

    def wrong(units: Sequence[RunnableUnit], *others: Any) -> torch.Tensor:
        loss = right(units, *others)
        gradient = units[-1].tensors[unit.parameters[0]].grad
        assert gradient is not None
        gradient *= times
        return loss

    monkeypatch.setattr(checkpoint, "forward_backward", wrong)
    says = f"unit {unit.name} of the model gives other results .* {unit.parameters[0]} differs by (0.01|nan) of its"
    with pytest.raises(ModelError, match=says):
        try_one_step(found.graph, found.tensors, found.examples(2))
