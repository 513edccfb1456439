"""Recomputing forward passes gives the gradients of plain ones, and buffers that were written once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from fedepth.models.export import export_model
from fedepth.models.graph import Operation, Program, Tensor, Unit, Value
from fedepth.models.run import Model, RunnableUnit
from fedepth.training.checkpoint import forward_backward

Tensors = dict[str, torch.Tensor]


def loaded(module: nn.Module, *input_shape: int) -> Model:
    """The module's graph, with copies of its weights."""
    exported = export_model(module, "test", input_shape, "F32", 3)
    model = Model(exported.graph)
    model.load(lambda name: exported.tensors[name].clone(), trainable=True)
    return model


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, torch.arange(len(logits)) % 3)


def by_autograd(module: nn.Module, x: torch.Tensor) -> tuple[Tensors, Tensors]:
    """Gradients and buffers of one step of the module itself."""
    module.train()
    loss_of(module(x)).backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {n: g for n, g in gradients.items() if g is not None}, dict(module.named_buffers())


def by_recomputing(model: Model, x: torch.Tensor) -> tuple[Tensors, Tensors]:
    before = x.clone()
    forward_backward(model.units, x, lambda output: loss_of(model.head(output)))
    assert torch.equal(x, before)
    gradients: Tensors = {}
    buffers: Tensors = {}
    for unit in (*model.units, model.head):
        gradients.update({n: p.grad for n, p in unit.parameters() if p.grad is not None})
        buffers.update({name: unit.tensors[name] for name in unit.unit.written})
    return gradients, buffers


def assert_same(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_gradients_of_the_square_by_hand() -> None:
    def scale(name: str, value: float) -> RunnableUnit:
        square = Operation("mul.Tensor", (Value(0), Value(0)), (1,))
        scaled = Operation("mul.Tensor", (Tensor(name), Value(1)), (2,))
        program = Program((square, scaled), 2)
        unit = RunnableUnit(Unit(name, (name,), (), (), (), program, program))
        unit.tensors[name] = torch.tensor(value, requires_grad=True)
        return unit

    block = [scale("a", 3.0), scale("b", 5.0)]  # 5·(3·2²)² = 720
    loss = forward_backward(block, torch.tensor([2.0]), torch.sum)
    assert float(loss) == 720
    # d/da b·a²·x⁴ = 2·b·a·x⁴ = 480, d/db = a²·x⁴ = 144
    assert [float(unit.tensors[unit.unit.name].grad) for unit in block] == [480, 144]  # type: ignore[arg-type]


@pytest.mark.parametrize("dropout", [0.5, 0.0], ids=["dropout", "plain"])
def test_the_gradients_are_those_of_the_plain_passes(dropout: float) -> None:
    torch.manual_seed(1)
    layers = (nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 8), nn.Dropout(dropout), nn.Linear(8, 3))
    module = nn.Sequential(*layers)
    model = loaded(module, 6)
    assert len(model.units) == 2
    x = torch.randn(4, 6)
    torch.manual_seed(2)
    expected, _ = by_autograd(module, x)
    drawn = torch.rand(1)
    torch.manual_seed(2)
    got, _ = by_recomputing(model, x)
    assert torch.equal(torch.rand(1), drawn)  # and what is drawn next does not depend on the way
    assert_same(got, expected)


class PreActivation(nn.Module):
    """A residual block that begins with an activation in place, which its skip connection sees as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu_(x)
        output: torch.Tensor = x + self.conv(x)
        return output


def classifier(*body: nn.Module, width: int = 4) -> nn.Module:
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


def leading_in_place() -> nn.Module:
    return classifier(nn.ReLU(inplace=True), nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3))


def in_place_twice() -> nn.Module:
    return classifier(nn.Conv2d(2, 4, 3), PreActivation(), PreActivation())


def spectral() -> nn.Module:
    return classifier(spectral_norm(nn.Conv2d(2, 4, 3)), nn.ReLU(), nn.Conv2d(4, 4, 3))


def spectral_twice() -> nn.Module:
    return classifier(spectral_norm(nn.Conv2d(2, 4, 3)), nn.ReLU(), spectral_norm(nn.Conv2d(4, 4, 3)), nn.ReLU())


def batch_norms() -> nn.Module:
    layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    return classifier(*layers)


@pytest.mark.parametrize("samples", [4, 1])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["standard", "channels_last"])
@pytest.mark.parametrize("build", [leading_in_place, in_place_twice, spectral, spectral_twice, batch_norms])
def test_a_unit_that_writes_is_run_again_as_if_it_had_not(
    build: Callable[[], nn.Module], memory: torch.memory_format, samples: int
) -> None:
    torch.manual_seed(1)
    module = build()
    model = loaded(module, 2, 8, 8)
    assert len(model.units) > 1
    x = (torch.randn(samples, 2, 8, 8) + 1).contiguous(memory_format=memory)
    expected, buffers = by_autograd(module, x.clone())
    got, written = by_recomputing(model, x)
    assert_same(got, expected)
    assert_same(written, buffers)


def test_running_statistics_move_once() -> None:
    torch.manual_seed(1)
    model = loaded(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8), nn.Linear(8, 3)), 6)
    x = torch.randn(4, 6) + 2
    _, buffers = by_recomputing(model, x)
    assert int(buffers["0.num_batches_tracked"]) == 1
    torch.testing.assert_close(buffers["0.running_mean"], 0.1 * x.mean(0))
