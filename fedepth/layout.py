"""Which tensors a model consists of, unit by unit. No torch, no numpy: the server process averages by it.

The names are the names of the model's own state dict, so that a global weights file is an ordinary
checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from fedepth.plan import Plan

# How safetensors names a type → kind and size in bytes of its elements, as numpy's array protocol writes them. The one
# table of types: whoever needs numpy's or torch's own derives them from it.
DTYPES = {
    "BOOL": "|b1",
    "U8": "|u1",
    "I8": "|i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}
ITEM_BYTES = {name: int(code[2:]) for name, code in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a model.

    Attributes:
        name: its name in the model's state dict.
        shape: its shape; () for a scalar.
        dtype: its type as safetensors names it, such as "F32" or "I64".
        not_negative: no value of it can be below 0: a variance, or a counter.
        parameter: trained by gradients; else a buffer that training writes.
        statistic: written by BatchNorm alone, and only while its statistics are trained.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    not_negative: bool = False
    parameter: bool = True
    statistic: bool = False

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class UnitLayout:
    """The tensors of one unit, parameters first, then buffers, both in state-dict order."""

    name: str
    tensors: tuple[TensorInfo, ...]

    @property
    def size_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors)


@dataclass(frozen=True)
class ModelLayout:
    """Every tensor of a model, each in exactly one unit, in the head, or in one auxiliary head.

    Attributes:
        units: in the order of the forward pass.
        head: the tensors of the head.
        auxiliary: by unit the tensors of the auxiliary head behind it; empty where there are no such heads.
    """

    units: tuple[UnitLayout, ...]
    head: tuple[TensorInfo, ...]
    auxiliary: tuple[tuple[TensorInfo, ...], ...] = ()

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """All tensors: units in order, then the head, then auxiliary heads."""
        units = tuple(tensor for unit in self.units for tensor in unit.tensors)
        return units + self.head + tuple(tensor for tensors in self.auxiliary for tensor in tensors)

    @property
    def parameters(self) -> frozenset[str]:
        """The names of all trainable parameters."""
        return frozenset(tensor.name for tensor in self.tensors if tensor.parameter)

    @property
    def by_name(self) -> dict[str, TensorInfo]:
        return {tensor.name: tensor for tensor in self.tensors}

    @property
    def size_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors)

    def without_statistics(self) -> ModelLayout:
        """What updates consist of where BatchNorm's statistics are fixed."""

        def others(tensors: tuple[TensorInfo, ...]) -> tuple[TensorInfo, ...]:
            return tuple(tensor for tensor in tensors if not tensor.statistic)

        units = tuple(UnitLayout(unit.name, others(unit.tensors)) for unit in self.units)
        return ModelLayout(units, others(self.head), tuple(map(others, self.auxiliary)))

    def trained_tensors(self, plan: Plan) -> tuple[TensorInfo, ...]:
        """The tensors of an update that a plan leads to: those of the trained units, of the auxiliary heads that blocks
        end with, and the head's where it is trained."""
        units = tuple(tensor for index in plan.trained_units for tensor in self.units[index].tensors)
        ends = (stage.last for stage in plan.stages if not stage.frozen_suffix)
        auxiliary = tuple(tensor for last in ends if self.auxiliary for tensor in self.auxiliary[last])
        return units + auxiliary + (self.head if plan.trains_head else ())
