"""The line that a refusal names: the innermost of the user's own code, not the forward() that called it."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from fedepth.errors import ModelError
from fedepth.models.export import export_model


def transformed(x: torch.Tensor) -> torch.Tensor:
    return torch.special.bessel_j0(x)  # type: ignore[no-any-return]


def decided(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if float(x.sum()) > 0 else x


def flattened(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(len(x), 6)


class Helped(nn.Module):
    """Its forward calls a method, and that a function."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.first, self.classifier = nn.Linear(6, 6), nn.Linear(6, 10)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return {"transformed": transformed, "decided": decided, "flattened": flattened}[self.name](x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.between(self.first(x)))  # type: ignore[no-any-return]


class Multiplied(Helped):
    """The cause is inside a layer of torch's, which a method calls."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.classifier.weight[:, :4])


@pytest.mark.parametrize("name", ["transformed", "decided", "flattened"])
def test_the_line_of_a_helper_is_named(name: str) -> None:
    function = {"transformed": transformed, "decided": decided, "flattened": flattened}[name]
    line = inspect.getsourcelines(function)[1] + 1
    with pytest.raises(ModelError, match=rf"{__file__}:{line}, in {name}"):
        export_model(Helped(name), "helped", (6,), "F32", 10)


def test_the_line_that_calls_torch_is_named_where_torch_fails() -> None:
    with pytest.raises(ModelError, match=r"test_source\.py:\d+, in between: return nn\.functional\.linear"):
        export_model(Multiplied(""), "multiplied", (6,), "F32", 10)
