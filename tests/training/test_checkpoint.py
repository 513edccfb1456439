"""Recomputing forward passes gives the gradients of plain ones."""

import pytest
import torch
from fedepth.models.split import Unit
from torch import nn
from torch.nn import functional

from fedepth.training.checkpoint import forward_backward


def units(*modules: nn.Module) -> list[Unit]:
    model = nn.Sequential(*modules)
    return [
        Unit(
            str(place),
            (str(place),),
            (module,),
            (module,),
            tuple(f"{place}.{name}" for name, _ in module.named_parameters()),
            (),
            model,
        )
        for place, module in enumerate(modules)
    ]


def finish(output: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(output, torch.tensor([0, 1, 2, 0]))


def gradients(block: list[Unit]) -> list[torch.Tensor]:
    found = [parameter.grad for unit in block for _, parameter in unit.parameters()]
    for unit in block:
        for _, parameter in unit.parameters():
            parameter.grad = None
    return [gradient for gradient in found if gradient is not None]


def test_gradients_of_the_square_by_hand() -> None:
    class Scale(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(value))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x * x

    block = units(Scale(3.0), Scale(5.0))  # 5·(3·2²)² = 720
    loss = forward_backward(block, torch.tensor(2.0), lambda output: output)
    assert float(loss) == 720
    # d/da b·a²·x⁴ = 2·b·a·x⁴ = 480, d/db = a²·x⁴ = 144
    assert [float(gradient) for gradient in gradients(block)] == [480, 144]


@pytest.mark.parametrize("module", [nn.Dropout(0.5), nn.Identity()], ids=["dropout", "plain"])
def test_the_gradients_are_those_of_the_plain_passes(module: nn.Module) -> None:
    torch.manual_seed(1)
    block = units(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), module), nn.Linear(8, 8), nn.Sequential(module, nn.Linear(8, 3))
    )
    x = torch.randn(4, 6)
    torch.manual_seed(2)
    output = x
    for unit in block:
        output = unit(output)
    finish(output).backward()
    plain, drawn_plain = gradients(block), torch.rand(1)
    torch.manual_seed(2)
    loss = forward_backward(block, x, finish)
    again = gradients(block)
    assert torch.equal(torch.rand(1), drawn_plain)  # and what is drawn next does not depend on the way
    torch.testing.assert_close(loss, finish(output).detach())
    assert len(plain) == len(again) == 6
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_running_statistics_move_once() -> None:
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(6)
    block = units(norm, nn.Linear(6, 3))
    x = torch.randn(4, 6) + 2
    forward_backward(block, x, finish)
    assert norm.track_running_stats and int(norm.num_batches_tracked or 0) == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean(0))
