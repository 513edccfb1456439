"""Which of a model's outputs are its logits: the one of that name, else the first tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

NAMES = ("logits", "out")


def plain(output: Any) -> Any:
    """A dataclass, which torch.export does not know, as the dict of its fields."""
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return output


def logits_of(output: Any, is_tensor: Callable[[Any], bool] = lambda each: isinstance(each, torch.Tensor)) -> Any:
    """The logits in what a model returns; none if there is no tensor.

    Args:
        is_tensor: tells tensors, or what stands for them in a structure of the same form.
    """
    output = plain(output)
    named = output if isinstance(output, Mapping) else getattr(output, "_asdict", dict)()
    if (name := next((each for each in NAMES if is_tensor(named.get(each))), None)) is not None:
        return named[name]
    return next((leaf for leaf in torch.utils._pytree.tree_leaves(output) if is_tensor(leaf)), None)
