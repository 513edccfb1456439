"""Tensors that a model makes in its first run, and keeps: caches of positions, statistics of a batch, features."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fedepth.errors import ModelError
from fedepth.models.export import export_model
from fedepth.models.hidden_state import hidden_tensors, undone
from fedepth.models.verify import verify


class Keeping(nn.Module):
    """Series (12, 8) with something kept in `kept`, `table` or `self.late`."""

    step: torch.Tensor

    def __init__(self, between: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.between = between
        self.kept: torch.Tensor | None = None
        self.table: dict[int, torch.Tensor] = {}
        self.register_buffer("empty", None, persistent=False)
        self.register_buffer("step", torch.linspace(0, 1, 8))
        self.first, self.classifier = nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.between(self, torch.tanh(self.first(x))).mean(1))  # type: ignore[no-any-return]


def positions(x: torch.Tensor) -> torch.Tensor:
    return torch.linspace(0, 1, x.shape[1]).unsqueeze(1)


def in_attribute(module: Any, x: torch.Tensor) -> torch.Tensor:
    if module.kept is None:
        module.kept = positions(x)
    return x * module.kept


def in_buffer(module: Any, x: torch.Tensor) -> torch.Tensor:
    if module.empty is None:
        module.empty = positions(x)
    return x * module.empty


def in_new_attribute(module: Any, x: torch.Tensor) -> torch.Tensor:
    if not hasattr(module, "late"):
        module.late = positions(x)
    return x * module.late


def in_new_buffer(module: Any, x: torch.Tensor) -> torch.Tensor:
    if not hasattr(module, "late"):
        module.register_buffer("late", positions(x), persistent=False)
    return x * module.late


def in_table(module: Any, x: torch.Tensor) -> torch.Tensor:
    if x.shape[1] not in module.table:
        module.table[x.shape[1]] = positions(x)
    return x * module.table[x.shape[1]]


def features(module: Any, x: torch.Tensor) -> torch.Tensor:
    module.kept = x
    return x


def of_a_buffer(module: Any, x: torch.Tensor) -> torch.Tensor:
    if module.kept is None:
        module.kept = module.step.cos()
    return x * module.kept


def of_the_first_batch(module: Any, x: torch.Tensor) -> torch.Tensor:
    if "mean" not in module.table:
        module.table["mean"] = x.detach().mean((0, 1))
    return x - module.table["mean"]


@functools.cache
def cached_positions(length: int) -> torch.Tensor:
    return torch.linspace(0, 1, length).unsqueeze(1)


def in_a_function(module: Any, x: torch.Tensor) -> torch.Tensor:
    return x * cached_positions(x.shape[1])


def proved(between: Callable[[Any, torch.Tensor], torch.Tensor]) -> float:
    torch.manual_seed(0)
    module = Keeping(between)
    return verify(module, export_model(module, "keeping", (12, 8), "F32", 10), "keeping")


@pytest.mark.parametrize("between", [in_attribute, in_new_attribute, in_table, features])
def test_what_is_the_same_in_every_run_may_be_kept(between: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    assert proved(between) == 0.0


@pytest.mark.parametrize(
    ("between", "where"), [(of_a_buffer, "kept"), (of_the_first_batch, r"table\['mean'\]")], ids=["buffer", "batch"]
)
def test_what_depends_on_the_first_run_is_named(
    between: Callable[[Any, torch.Tensor], torch.Tensor], where: str
) -> None:
    with pytest.raises(ModelError, match=rf"it keeps {where}, a tensor that it makes in its first run"):
        proved(between)


@pytest.mark.parametrize(("between", "where"), [(in_buffer, "empty"), (in_new_buffer, "late")])
def test_a_buffer_that_comes_late_is_named(between: Callable[[Any, torch.Tensor], torch.Tensor], where: str) -> None:
    with pytest.raises(ModelError, match=f"makes its buffer {where} in its first run"):
        proved(between)


def test_a_cached_function_is_refused_in_words() -> None:
    with pytest.raises(ModelError, match="or in the cache of a function"):
        proved(in_a_function)


def test_what_a_run_leaves_is_undone() -> None:
    module = Keeping(in_table)
    late = torch.zeros(2)
    module.table[1] = late
    before, state = set(vars(module)), module.table
    with undone(module):
        in_new_buffer(module, torch.zeros(1, 12, 8))
        in_table(module, torch.zeros(1, 12, 8))
        features(module, torch.zeros(1))
        late.add_(1)
    assert set(vars(module)) == before and module.table is state and module.kept is None
    assert list(hidden_tensors(module)) == ["table[1]"] and "late" not in dict(module.named_buffers())
    assert late.tolist() == [0.0, 0.0]
