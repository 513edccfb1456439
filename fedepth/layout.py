"""Which tensors a model consists of, unit by unit. No torch, no numpy: the server process averages by it.

The names are the names of the model's own state dict, so that a global weights file is an ordinary
checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
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

SCALES = "..scales"  # behind a tensor's name; torch lets no name of a tensor have two dots in a row
LARGEST_SCALE = 2.0**120  # above it, changes of -128 scales, which nobody sends, would not be finite in float32
LEAST_ENCODED = 256  # elements: what encoding smaller tensors would save is less than a header's entry
LEAST_CHANNEL = 64  # elements: of smaller channels, one scale each would cost more than 6 %


class Encoding(str, Enum):
    """How updates go up (fedepth.encoding)."""

    FLOAT32 = "float32"  # weights, as they are
    FLOAT16 = "float16"  # the change against the weights that a task begins with
    INT8 = "int8"  # the same with scales; what rounding leaves out is added to the next change


def is_encoded(dtype: str, shape: tuple[int, ...], *, parameter: bool) -> bool:
    """Whether a tensor is one that encodings change: biases, norms and buffers are small, and go up as they are."""
    return parameter and dtype == "F32" and len(shape) > 1 and prod(shape) >= LEAST_ENCODED


def scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of an int8 tensor: one for every output channel, or for all of it where those are
    small."""
    return (shape[0],) if prod(shape[1:]) >= LEAST_CHANNEL else ()


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

    def as_sent(self, encoding: Encoding) -> tuple[TensorInfo, ...]:
        """The tensors that it takes in an update: itself, or its change and the scales of that."""
        if encoding is Encoding.FLOAT32 or not is_encoded(self.dtype, self.shape, parameter=self.parameter):
            return (self,)
        if encoding is Encoding.FLOAT16:
            return (replace(self, dtype="F16", not_negative=False),)
        scales = TensorInfo(self.name + SCALES, scales_shape(self.shape), "F32", not_negative=True, parameter=False)
        return (replace(self, dtype="I8", not_negative=False), scales)


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

    def as_sent(self, encoding: Encoding) -> ModelLayout:
        """What updates in this encoding consist of."""
        if encoding is Encoding.FLOAT32:
            return self

        def sent(tensors: Iterable[TensorInfo]) -> tuple[TensorInfo, ...]:
            return tuple(each for tensor in tensors for each in tensor.as_sent(encoding))

        units = tuple(UnitLayout(unit.name, sent(unit.tensors)) for unit in self.units)
        return ModelLayout(units, sent(self.head), tuple(map(sent, self.auxiliary)))

    def trained_tensors(self, plan: Plan) -> tuple[TensorInfo, ...]:
        """The tensors of an update that a plan leads to: those of the trained units, of the auxiliary heads that blocks
        end with, and the head's where it is trained."""
        units = tuple(tensor for index in plan.trained_units for tensor in self.units[index].tensors)
        ends = (stage.last for stage in plan.stages if not stage.frozen_suffix)
        auxiliary = tuple(tensor for last in ends if self.auxiliary for tensor in self.auxiliary[last])
        return units + auxiliary + (self.head if plan.trains_head else ())
