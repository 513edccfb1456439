"""A model as data: units, each a list of operators with arguments and tensor names. No torch.

A device rebuilds a model from this and needs none of the code that defined it. The same file can later be compiled for
another runtime, so it knows operators by plain names, types as safetensors names them, and shapes without the batch.

    value 0 is a unit's input; every operation gives values with numbers of their own
    {"is": "value", "number": 3}                     an earlier value of the same unit
    {"is": "tensor", "name": "layer1.0.conv1.weight"} a parameter, a buffer or a constant
    {"is": "extent", "per_sample": 4, "fixed": 0}     a size that grows with the batch: 4 · batch + 0

A unit has two programs, one for training and one for evaluation: dropout and BatchNorm do not run alike in both, and a
model may branch on its mode.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

import msgspec
from msgspec import structs

from fedepth.errors import ModelError
from fedepth.files import NOT_JSON
from fedepth.layout import ITEM_BYTES, ModelLayout, TensorInfo, UnitLayout

FORMAT_VERSION = 1
VERSION_WITH_AUXILIARY = 2  # one that does not know of auxiliary heads would train blocks on something else
# A graph comes from the network: more than any model has is refused before it is looked at.
MOST_UNITS = 512
MOST_OPERATIONS = 100_000
MOST_TENSORS = 100_000
MOST_BYTES = 64 << 20

# Places among the arguments of batch_norm and instance_norm.
_RUNNING_MEAN, _RUNNING_VAR, TRAINS = 3, 4, 5
_COUNTER = "num_batches_tracked"

DTYPE_OF_TORCH = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}


class Value(msgspec.Struct, frozen=True, tag_field="is", tag="value"):
    """An earlier value of the same unit."""

    number: int


class Tensor(msgspec.Struct, frozen=True, tag_field="is", tag="tensor"):
    """A parameter, buffer or constant of the unit."""

    name: str


class Extent(msgspec.Struct, frozen=True, tag_field="is", tag="extent"):
    """A size that grows with the batch: `per_sample · batch + fixed`."""

    per_sample: int
    fixed: int = 0


class DType(msgspec.Struct, frozen=True, tag_field="is", tag="dtype"):
    """An element type as safetensors names it, such as "F32"."""

    name: str


class Number(msgspec.Struct, frozen=True, tag_field="is", tag="number"):
    """A float that JSON cannot write: "inf", "-inf" or "nan"."""

    text: str


class MemoryFormat(msgspec.Struct, frozen=True, tag_field="is", tag="memory_format"):
    """How a tensor lies in memory, such as "contiguous_format"."""

    name: str


Scalar = None | bool | int | float | str | Value | Tensor | Extent | DType | Number | MemoryFormat
Argument = Scalar | tuple[Scalar, ...]


class Operation(msgspec.Struct, frozen=True, omit_defaults=True):
    """One operator of a program.

    Attributes:
        name: of the operator and its overload, such as "conv2d" or "add.Tensor".
        results: numbers of the values it gives; -1 for one that nobody reads.
        detached: runs without autograd, as under torch.no_grad().
    """

    name: str
    arguments: tuple[Argument, ...]
    results: tuple[int, ...]
    keywords: dict[str, Argument] = {}
    detached: bool = False


class Program(msgspec.Struct, frozen=True):
    """Operations in order, and the number of the value that they are run for."""

    operations: tuple[Operation, ...]
    output: int


class Unit(msgspec.Struct, frozen=True):
    """A part of a model between two cuts, each a single tensor.

    Attributes:
        name: the module that it belongs to, for people.
        parameters: names of its trainable parameters.
        written: names of the buffers that it writes in training, such as running statistics.
        fixed: names of what it only reads: parameters frozen by the model's author, other buffers, constants.
        input_shape: without the batch.
        training: its program in training mode.
        evaluation: its program in evaluation mode.
    """

    name: str
    parameters: tuple[str, ...]
    written: tuple[str, ...]
    fixed: tuple[str, ...]
    input_shape: tuple[int, ...]
    training: Program
    evaluation: Program

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Of all tensors that it needs to run."""
        return self.parameters + self.written + self.fixed

    @property
    def trained_names(self) -> tuple[str, ...]:
        """Of the tensors that training changes, which an update carries."""
        return self.parameters + self.written


class Graph(msgspec.Struct, frozen=True):
    """A model.

    Attributes:
        units: in order.
        head: what follows the last unit, and gives logits; without operations where nothing does.
        exits: for every unit, whether a block may end behind it (fedepth.models.exits).
        tensors: all tensors, by name.
        input_type: "F32" for images and vectors, "I64" for token ids.
        smallest_micro_batch: 2 where BatchNorm sees a single value per channel and sample, of which it has no variance.
        channels_last: convolutions run faster in this memory format on a CPU, and are known to be safe in it.
        notes: what a person should know, such as outputs that are left out.
        auxiliary: for every unit the classifier that a block is trained on which ends behind it, None where there is
            none; empty where blocks lead to the head by skip connections (fedepth.models.auxiliary).
    """

    version: int
    units: tuple[Unit, ...]
    head: Unit
    exits: tuple[bool, ...]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    input_type: str
    smallest_micro_batch: int
    channels_last: bool
    notes: tuple[str, ...] = ()
    auxiliary: tuple[Unit | None, ...] = ()

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.units[0].input_shape

    @property
    def head_shape(self) -> tuple[int, ...]:
        """The head's input without the batch, where every skip connection leads."""
        return self.head.input_shape

    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Every unit's output without the batch."""
        return (*(unit.input_shape for unit in self.units[1:]), self.head_shape)

    @property
    def parts(self) -> tuple[Unit, ...]:
        """Everything that has tensors: units, head, auxiliary heads."""
        return (*self.units, self.head, *(each for each in self.auxiliary if each is not None))

    @property
    def without_auxiliary(self) -> Graph:
        """The model alone, as it is evaluated and exported."""
        if not self.auxiliary:
            return self
        names = {name for unit in (*self.units, self.head) for name in unit.tensor_names}
        own = {name: kind for name, kind in self.tensors.items() if name in names}
        version, exits = FORMAT_VERSION, (*(False for _ in self.units[:-1]), True)
        return structs.replace(self, version=version, exits=exits, tensors=own, auxiliary=())

    def info(self, name: str) -> TensorInfo:
        dtype, shape = self.tensors[name]
        return TensorInfo(name, shape, dtype)

    def layout(self) -> ModelLayout:
        """What an update consists of, unit by unit."""
        variances = frozenset(_variances(self))
        statistics = {name for unit in (*self.units, self.head) for name in statistics_of(unit)}

        def tensors(unit: Unit) -> tuple[TensorInfo, ...]:
            return tuple(
                replace(
                    each,
                    not_negative=_is_counter(each) or each.name in variances,
                    parameter=each.name in unit.parameters,
                    statistic=each.name in statistics,
                )
                for each in map(self.info, unit.trained_names)
            )

        return ModelLayout(
            tuple(UnitLayout(unit.name, tensors(unit)) for unit in self.units),
            tensors(self.head),
            tuple(() if unit is None else tensors(unit) for unit in self.auxiliary),
        )


def encode(graph: Graph) -> bytes:
    """The graph as JSON; equal graphs give equal bytes."""
    return msgspec.json.encode(graph, order="deterministic")


def decode(data: bytes) -> Graph:
    """A graph from JSON, checked: every reference leads to something that comes before it.

    Raises:
        ModelError: it is damaged, too large, or of another version.
    """
    if len(data) > MOST_BYTES:
        raise ModelError(f"a model's graph of {len(data)} bytes is not read; at most {MOST_BYTES} are")
    try:
        graph = msgspec.json.decode(data, type=Graph)
    except NOT_JSON as error:
        raise ModelError(f"the model's graph cannot be read: {error}") from None
    check(graph)
    return graph


def check(graph: Graph) -> None:
    """Raises ModelError if the graph refers to what it does not have, or is larger than any model."""
    if graph.version not in (FORMAT_VERSION, VERSION_WITH_AUXILIARY):
        raise ModelError(
            f"the model's graph has format {graph.version}, this version reads up to {VERSION_WITH_AUXILIARY}; install "
            "the same version of fedepth on the coordinator and its devices"
        )
    if not 1 <= len(graph.units) <= MOST_UNITS or len(graph.tensors) > MOST_TENSORS:
        raise ModelError(f"the model's graph has {len(graph.units)} units and {len(graph.tensors)} tensors")
    if len(graph.exits) != len(graph.units) or not graph.exits[-1]:
        raise ModelError("the model's graph does not say of every unit whether a block may end behind it")
    if graph.input_type not in ("F32", "I64") or graph.smallest_micro_batch not in (1, 2):
        raise ModelError("the model's graph has an input type or a smallest micro-batch that does not exist")
    _check_auxiliary(graph)
    for name, (dtype, shape) in graph.tensors.items():
        if dtype not in ITEM_BYTES or any(extent < 0 for extent in shape) or len(shape) > 16:
            raise ModelError(
                f"tensor {name[:80]!r} of the model's graph has type {dtype[:20]!r} and shape {shape[:16]}"
            )
    operations = 0
    owner: dict[str, str] = {}
    for unit in graph.parts:
        for name in unit.tensor_names:
            if name not in graph.tensors:
                raise ModelError(f"unit {unit.name[:80]} of the model's graph names an unknown tensor {name[:80]!r}")
        for name in unit.trained_names:
            if owner.setdefault(name, unit.name) != unit.name or name in unit.fixed:
                raise ModelError(f"tensor {name[:80]!r} of the model's graph belongs to two units")
        for program in (unit.training, unit.evaluation):
            operations += len(program.operations)
            _check_program(unit, program)
    if operations > MOST_OPERATIONS:
        raise ModelError(f"the model's graph has {operations} operations; at most {MOST_OPERATIONS} are run")


def _check_auxiliary(graph: Graph) -> None:
    if bool(graph.auxiliary) != (graph.version == VERSION_WITH_AUXILIARY):
        raise ModelError(f"the model's graph has format {graph.version} and {len(graph.auxiliary)} auxiliary heads")
    if not graph.auxiliary:
        return
    if len(graph.auxiliary) != len(graph.units) or graph.auxiliary[-1] is not None:
        raise ModelError("the model's graph does not have an auxiliary head, or none, behind every unit but the last")
    for has_exit, unit, shape in zip(graph.exits[:-1], graph.auxiliary, graph.output_shapes, strict=False):
        if has_exit != (unit is not None):
            raise ModelError("a block may not end behind a unit of the model's graph that has no auxiliary head")
        if unit is not None and unit.input_shape != shape:
            raise ModelError(f"{unit.name[:80]} of the model's graph does not take what comes out of its unit")


def values_of(operation: Operation) -> Iterator[int]:
    """The numbers of the values that an operation reads."""
    for scalar in scalars_of(operation):
        if isinstance(scalar, Value):
            yield scalar.number


def scalars_of(operation: Operation) -> Iterator[Scalar]:
    """All arguments, with lists opened."""
    for argument in (*operation.arguments, *operation.keywords.values()):
        if isinstance(argument, tuple):
            yield from argument
        else:
            yield argument


def with_scalars(operation: Operation, change: Callable[[Scalar], Scalar], results: tuple[int, ...]) -> Operation:
    """The operation with every argument changed, also inside lists, and other results."""

    def argument(each: Argument) -> Argument:
        return tuple(map(change, each)) if isinstance(each, tuple) else change(each)

    return Operation(
        operation.name,
        tuple(map(argument, operation.arguments)),
        results,
        {key: argument(each) for key, each in operation.keywords.items()},
        operation.detached,
    )


def statistics_of(unit: Unit) -> frozenset[str]:
    """The names of the buffers that only BatchNorm writes: running statistics, and the counters beside them."""
    averages = {
        name for each in unit.training.operations if learns_statistics(each, unit) for name in averages_of(each)
    }
    counters = {f"{name.rpartition('.')[0]}.{_COUNTER}".lstrip(".") for name in averages} & set(unit.written)
    others = {written_by(each) for each in unit.training.operations if not counts(each, counters)}
    return frozenset((averages | counters) - others)


def learns_statistics(operation: Operation, unit: Unit) -> bool:
    """Whether it is a BatchNorm in training that writes running statistics."""
    averages = averages_of(operation)
    return uses_the_batch(operation) and bool(averages) and averages <= set(unit.written)


def uses_the_batch(operation: Operation) -> bool:
    """Whether it is a BatchNorm that normalises with the statistics of the batch."""
    given = operation.arguments
    return operation.name == "batch_norm" and len(given) > TRAINS and given[TRAINS] is True


def averages_of(operation: Operation) -> set[str]:
    """The running statistics that a BatchNorm names."""
    given = operation.arguments[_RUNNING_MEAN : _RUNNING_VAR + 1]
    return {each.name for each in given if isinstance(each, Tensor)}


def counts(operation: Operation, counters: Collection[str]) -> bool:
    """Whether all that an operation does is to add to one of these counters."""
    packet = operation.name.split(".")[0]
    return packet == "add_" and written_by(operation) in counters and all(each < 0 for each in operation.results)


def written_by(operation: Operation) -> str:
    """The tensor that an operator writes in place; empty for most, and for BatchNorm, whose name does not say so."""
    first = operation.arguments[0] if operation.arguments else None
    return first.name if operation.name.split(".")[0].endswith("_") and isinstance(first, Tensor) else ""


def _variances(graph: Graph) -> Iterator[str]:
    """Names of the tensors that are some normalisation's running variance."""
    for unit in graph.parts:
        for operation in (*unit.training.operations, *unit.evaluation.operations):
            if operation.name in ("batch_norm", "instance_norm"):
                variance = operation.arguments[_RUNNING_VAR : _RUNNING_VAR + 1]
                yield from (each.name for each in variance if isinstance(each, Tensor))


def _is_counter(tensor: TensorInfo) -> bool:
    """torch's name for how many batches a BatchNorm has seen."""
    return tensor.name.endswith(_COUNTER) and tensor.dtype == "I64"


def _check_program(unit: Unit, program: Program) -> None:
    known, tensors = {0}, set(unit.tensor_names)
    for operation in program.operations:
        for scalar in scalars_of(operation):
            if isinstance(scalar, Value) and scalar.number not in known:
                raise ModelError(
                    f"{operation.name[:40]} in unit {unit.name[:80]} reads a value that does not exist yet"
                )
            if isinstance(scalar, Tensor) and scalar.name not in tensors:
                raise ModelError(f"{operation.name[:40]} in unit {unit.name[:80]} reads a tensor of another unit")
        given = [number for number in operation.results if number >= 0]
        if known.intersection(given) or len(set(given)) != len(given) or max(given, default=0) > MOST_OPERATIONS * 16:
            raise ModelError(f"{operation.name[:40]} in unit {unit.name[:80]} gives a value that exists already")
        known.update(given)
    if program.output not in known:
        raise ModelError(f"unit {unit.name[:80]} ends with a value that does not exist")
