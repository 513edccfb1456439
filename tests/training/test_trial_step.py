"""The step that is tried before devices see a job: ordinary models pass it, units that would fail there do not."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from fedepth.errors import ModelError
from fedepth.models.graph import Extent, Graph, Operation, Program, Tensor, Unit, Value, check
from fedepth.task import ModelSpec
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
