"""Running a unit's programs with torch: a plain interpreter over an allow-list of operators.

Generated code would gain nothing and need exec. Every value is dropped after its last use, so that a step takes the
memory that the module it came from would take.

    model = Model(graph)                      # no weights yet
    model.units[3].tensors[name] = tensor     # for each name in unit.tensor_names
    y = model.units[3](x)
    model.units[3].release()                  # memory given back
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedepth.errors import DataError, ModelError
from fedepth.models.channels import channels_of
from fedepth.models.graph import (
    Argument,
    DType,
    Extent,
    Graph,
    MemoryFormat,
    Number,
    Operation,
    Program,
    Tensor,
    Unit,
    Value,
    values_of,
)
from fedepth.models.operators import CREATION, OPERATORS

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_MEMORY_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "preserve_format": torch.preserve_format,
}

# What torch says of an embedding, of a table that is indexed, and of one_hot.
_NO_ROW = ("index out of range", "out of bounds for dimension", "Class values must be smaller than num_classes")

Tensors = Mapping[str, torch.Tensor]


class RunnableUnit:
    """A unit, or the head, with the tensors that are loaded.

    Attributes:
        unit: what it runs.
        tensors: those that are loaded, by name; parameters, buffers and constants.
        training: which of its programs it runs.
        channels: the dimension of its output that holds its channels, where the operators of its model tell.
    """

    def __init__(self, unit: Unit) -> None:
        """Raises ModelError if the unit asks for an operator that is not on the list."""
        self.unit = unit
        self.tensors: dict[str, torch.Tensor] = {}
        self.training = True
        self.channels: int | None = None
        self._programs = {True: _compile(unit.training, unit.name), False: _compile(unit.evaluation, unit.name)}

    def __call__(self, x: torch.Tensor, written: Tensors | None = None) -> torch.Tensor:
        """The unit's output.

        Args:
            x: (B, *unit.input_shape).
            written: used in place of the buffers that it writes, which then stay as they are.

        Raises:
            DataError: an input holds an id that an embedding has not.
        """
        tensors = {**self.tensors, **written} if written else self.tensors
        try:
            return _run(self._programs[self.training], x, tensors)
        except (IndexError, RuntimeError) as error:
            if not any(words in str(error) for words in _NO_ROW):
                raise
            raise DataError(
                f"unit {self.unit.name}: an input holds an id that the model has no row for; ids have to be below the "
                "size of the model's vocabulary"
            ) from error

    def parameters(self) -> list[tuple[str, torch.Tensor]]:
        """Names and trainable parameters, as loaded."""
        return [(name, self.tensors[name]) for name in self.unit.parameters]

    def trained(self) -> dict[str, torch.Tensor]:
        """What training changes: parameters, and the buffers that it writes."""
        return {name: self.tensors[name] for name in self.unit.trained_names}

    def copies_of_written(self) -> dict[str, torch.Tensor]:
        """Copies of the buffers that it writes."""
        return {name: self.tensors[name].clone() for name in self.unit.written}

    def release(self) -> None:
        """Lets go of all tensors."""
        self.tensors.clear()


class Model:
    """A graph that can be run, unit by unit or as a whole."""

    def __init__(self, graph: Graph) -> None:
        """Raises ModelError if it asks for an operator that is not on the list."""
        self.graph = graph
        self.units = tuple(map(RunnableUnit, graph.units))
        for unit, channels in zip(self.units, channels_of(graph.units), strict=True):
            unit.channels = channels
        self.head = RunnableUnit(graph.head)
        self.auxiliary = tuple(None if unit is None else RunnableUnit(unit) for unit in graph.auxiliary)

    def exit(self, last: int, *, frozen_suffix: bool = False) -> RunnableUnit:
        """What a block leads to that ends with unit `last`: an auxiliary head, or the head; through a frozen suffix
        always the head."""
        auxiliary = self.auxiliary[last] if self.auxiliary and not frozen_suffix else None
        return self.head if auxiliary is None else auxiliary

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(B, *input_shape) to (B, classes) logits."""
        for unit in (*self.units, self.head):
            x = unit(x)
        return x

    def train(self, mode: bool = True) -> None:
        for unit in (*self.units, self.head):
            unit.training = mode

    def load(self, read: Callable[[str], torch.Tensor], *, trainable: bool = False) -> None:
        """Loads every tensor of it, without auxiliary heads; `read` is called once for each."""
        parts = (*self.units, self.head)
        known = {name: read(name) for name in dict.fromkeys(name for part in parts for name in part.unit.tensor_names)}
        for unit in parts:
            for name in unit.unit.tensor_names:
                tensor = known[name]
                unit.tensors[name] = tensor.requires_grad_() if trainable and name in unit.unit.parameters else tensor


@dataclass(frozen=True)
class _Instruction:
    """An operation, ready to run.

    Attributes:
        arguments: what does not change from call to call; the rest is put in its place.
        moving: places in `arguments` of values, tensors and extents, single or in lists.
        dead: values that nobody reads afterwards.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    moving: tuple[tuple[int, Argument], ...]
    keywords: dict[str, Any]
    moving_keywords: tuple[tuple[str, Argument], ...]
    results: tuple[int, ...]
    dead: tuple[int, ...]
    detached: bool
    creates: bool


def _compile(program: Program, unit: str) -> tuple[tuple[_Instruction, ...], int]:
    last = {number: at for at, operation in enumerate(program.operations) for number in values_of(operation)}
    dead: dict[int, list[int]] = {}
    for number, at in last.items():
        if number != program.output:
            dead.setdefault(at, []).append(number)
    instructions = tuple(
        _instruction(operation, tuple(dead.get(at, ())), unit) for at, operation in enumerate(program.operations)
    )
    return instructions, program.output


def _instruction(operation: Operation, dead: tuple[int, ...], unit: str) -> _Instruction:
    if operation.name not in OPERATORS:
        raise ModelError(f"unit {unit[:80]} asks for the operator {operation.name[:80]!r}, which is not run here")
    try:
        return _ready(operation, dead)
    except (KeyError, ValueError) as error:  # a type, a number or a memory format that does not exist
        raise ModelError(
            f"{operation.name} in unit {unit[:80]} has an argument that does not exist: {str(error)[:80]}"
        ) from None


def _ready(operation: Operation, dead: tuple[int, ...]) -> _Instruction:
    packet, _, overload = operation.name.partition(".")
    function = getattr(getattr(torch.ops.aten, packet), overload or "default")
    moving = tuple((at, each) for at, each in enumerate(operation.arguments) if _moves(each))
    arguments = tuple(None if _moves(each) else _constant(each) for each in operation.arguments)
    return _Instruction(
        function=function,
        arguments=arguments,
        moving=moving,
        keywords={key: _constant(each) for key, each in operation.keywords.items() if not _moves(each)},
        moving_keywords=tuple((key, each) for key, each in operation.keywords.items() if _moves(each)),
        results=operation.results,
        dead=dead,
        detached=operation.detached,
        creates=not CREATION.isdisjoint((packet, operation.name)),
    )


def _moves(argument: Argument) -> bool:
    if isinstance(argument, tuple):
        return any(map(_moves, argument))
    return isinstance(argument, Value | Tensor | Extent)


def _constant(argument: Argument) -> Any:
    if isinstance(argument, tuple):
        return [_constant(each) for each in argument]
    if isinstance(argument, DType):
        return DTYPES[argument.name]
    if isinstance(argument, Number):
        return float(argument.text)
    if isinstance(argument, MemoryFormat):
        return _MEMORY_FORMATS[argument.name]
    return argument


# At module level on purpose: a closure that refers to itself is a reference cycle, which keeps every output alive.
def _resolve(argument: Argument, values: dict[int, Any], tensors: Tensors, batch: int) -> Any:
    if isinstance(argument, Value):
        return values[argument.number]
    if isinstance(argument, Tensor):
        return tensors[argument.name]
    if isinstance(argument, Extent):
        return argument.per_sample * batch + argument.fixed
    if isinstance(argument, tuple):
        return [_resolve(each, values, tensors, batch) for each in argument]
    return _constant(argument)


def _run(program: tuple[tuple[_Instruction, ...], int], x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    instructions, output = program
    values: dict[int, Any] = {0: x}
    batch, device = x.shape[0], x.device
    del x
    for each in instructions:
        arguments = list(each.arguments)
        for at, argument in each.moving:
            arguments[at] = _resolve(argument, values, tensors, batch)
        keywords = each.keywords
        if each.moving_keywords or each.creates:
            keywords = {**keywords, **{k: _resolve(a, values, tensors, batch) for k, a in each.moving_keywords}}
            if each.creates:
                keywords["device"] = device
        if each.detached:
            with torch.no_grad():
                found = each.function(*arguments, **keywords)
        else:
            found = each.function(*arguments, **keywords)
        for number in each.dead:
            del values[number]
        if isinstance(found, torch.Tensor):
            if each.results[0] >= 0:
                values[each.results[0]] = found
        else:
            for number, value in zip(each.results, found, strict=False):
                if number >= 0:
                    values[number] = value
        del found, arguments, keywords
    result: torch.Tensor = values[output]
    return result
