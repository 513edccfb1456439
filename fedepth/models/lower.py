"""From what torch.export gives to a flat program: operators in order, with plain names, types and sizes.

torch.export's training IR keeps in-place operators. They become functional ones by renaming, wherever nobody else looks
at the same storage: a unit may then be run twice from the same input, and costs no more memory, since every value is
dropped after its last use.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fedepth.errors import ModelError
from fedepth.models.graph import (
    DTYPE_OF_TORCH,
    Argument,
    DType,
    Extent,
    MemoryFormat,
    Number,
    Operation,
    Scalar,
    Tensor,
    Value,
    scalars_of,
    values_of,
    with_scalars,
)
from fedepth.models.operators import OPERATORS
from fedepth.models.source import user_line

# Checks that torch.export adds; a device checks sizes where it matters.
_ASSERTIONS = ("_assert", "sym_constrain_range", "_guards_fn", "_check")
# Where a tensor lives and how it is laid out follows from the input.
_DROPPED_KEYWORDS = {"device", "layout", "pin_memory", "non_blocking"}
# Fresh memory holds anything, also what another program left behind.
_FILLED = {"empty": "zeros", "empty_like": "zeros_like", "new_empty": "new_zeros"}
# They may hand on their input itself, though their schemas do not say so.
_ALIASING = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "expand_as", "broadcast_tensors"}
_RANDOM = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
_UNBACKED = ("u", "zuf")  # how torch names sizes and numbers that it cannot know before it runs
_BATCH_NORMS = {"batch_norm": (3, 4, 5), "instance_norm": (3, 4, 5)}


@dataclass(frozen=True)
class ValueInfo:
    """One value of a flat program.

    Attributes:
        shape: an Extent where it grows with the batch.
        dtype: as safetensors names it; empty for what is no tensor type of ours.
        depends: on the model's input, not only on parameters and sizes.
        storage: values with the same number may share memory.
    """

    shape: tuple[int | Extent, ...]
    dtype: str
    depends: bool
    storage: int


@dataclass(frozen=True)
class Step:
    """One operation of a flat program.

    Attributes:
        writes: tensors of the model that it writes.
        mutates: the value that it changes in place; None for most.
        random: draws random numbers.
        mixes: its tensors have several types, so that its result would have another one if it worked out of place.
        module: path of the module that it belongs to.
        line: of the user's code, for messages.
    """

    operation: Operation
    writes: frozenset[str]
    mutates: int | None
    random: bool
    module: str
    line: str
    mixes: bool = False

    @property
    def tensors(self) -> frozenset[str]:
        return frozenset(scalar.name for scalar in scalars_of(self.operation) if isinstance(scalar, Tensor))


@dataclass(frozen=True)
class FlatProgram:
    """A whole model in one mode; value 0 is its input.

    Attributes:
        left_out: the steps that draw random numbers for outputs that are left out.
    """

    steps: tuple[Step, ...]
    values: Mapping[int, ValueInfo]
    output: int
    left_out: tuple[Step, ...] = ()


def lower(program: torch.export.ExportedProgram, output: int, names: Mapping[str, str]) -> FlatProgram:
    """The flat program that computes one of an exported program's outputs.

    Args:
        program: exported with a dynamic batch, in training IR.
        output: which of its outputs.
        names: from the name of each parameter, buffer and constant to the one under which it travels; tied tensors
            have one.

    Raises:
        ModelError: it holds what a graph cannot; with the user's line.
    """
    lowering = _Lowering(program, names)
    outputs = lowering.add_graph(program.graph_module, {})
    for spec, value in zip(program.graph_signature.output_specs, outputs, strict=True):
        if spec.kind is torch.export.graph_signature.OutputKind.BUFFER_MUTATION:
            lowering.assign(names[spec.target or ""], value)
    chosen = outputs[output]
    if not isinstance(chosen, Value):
        raise ModelError("the model's output does not depend on its input")
    steps = _without_unused(lowering.steps, lowering.values, chosen.number)
    flat = _functional(steps, lowering.values, chosen.number)
    kept = set(map(id, steps))
    flat = replace(flat, left_out=tuple(each for each in lowering.steps if each.random and id(each) not in kept))
    for step in flat.steps:
        if step.operation.name not in OPERATORS:
            raise ModelError(
                f"torch's operator {step.operation.name} at {step.line} is not one that devices run; write that line "
                "with other functions of torch"
            )
    return flat


@dataclass(frozen=True)
class _Unknown:
    """A number that is known only when the model runs, and no size."""

    node: fx.Node


class _Lowering:
    """Collects steps and values while it walks the graphs."""

    def __init__(self, program: torch.export.ExportedProgram, names: Mapping[str, str]) -> None:
        self.steps: list[Step] = []
        self.values: dict[int, ValueInfo] = {}
        self._given: dict[str, Scalar] = {}
        self._storages: dict[str, int] = {}
        kinds = torch.export.graph_signature.InputKind
        for spec in program.graph_signature.input_specs:
            if spec.kind in (kinds.PARAMETER, kinds.BUFFER, kinds.CONSTANT_TENSOR) and spec.target is not None:
                self._given[spec.arg.name] = Tensor(names[spec.target])
            elif spec.kind is not kinds.USER_INPUT:
                raise ModelError(f"the model reads a {spec.kind.name.lower()}, which a graph cannot hold")

    def add_graph(
        self, module: fx.GraphModule, arguments: Mapping[str, Scalar], *, detached: bool = False
    ) -> tuple[Scalar, ...]:
        """Walks one graph; returns its outputs."""
        known: dict[fx.Node, Any] = {}
        for node in module.graph.nodes:
            if node.op == "placeholder":
                known[node] = arguments[node.name] if arguments else self._placeholder(node)
            elif node.op == "get_attr":
                known[node] = getattr(module, str(node.target))
            elif node.op == "output":
                return tuple(known[each] if isinstance(each, fx.Node) else None for each in node.args[0])
            elif node.op == "call_function":
                known[node] = self._call(node, known, detached)
            else:
                raise ModelError(f"the model's graph holds a {node.op}, which cannot be run on a device")
        raise AssertionError("a graph ends with its output")

    def assign(self, name: str, value: Scalar) -> None:
        """A buffer is another tensor from here on, as after `self.mean = 0.9 * self.mean + …`."""
        operation = Operation("copy_", (Tensor(name), value), (-1,), detached=True)
        self.steps.append(Step(operation, frozenset((name,)), None, False, "", f"the assignment of {name}"))

    def _placeholder(self, node: fx.Node) -> Scalar:
        if node.name in self._given:
            return self._given[node.name]
        return self._value(node.meta["val"], depends=True, storage=None)

    def _call(self, node: fx.Node, known: Mapping[fx.Node, Any], detached: bool) -> Any:
        target = node.target
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | int) and not isinstance(value, bool):
            return _extent(value, node)
        if isinstance(value, torch.SymFloat | torch.SymBool):
            return _Unknown(node)  # for assertions that are dropped; an operator that takes it is refused
        if target is operator.getitem:
            source, index = node.args
            assert isinstance(source, fx.Node)
            return known[source][index]
        name = str(getattr(target, "__name__", target))
        if any(name.startswith(prefix) for prefix in _ASSERTIONS):
            return None
        if name == "wrap_with_set_grad_enabled":
            enabled, inner, *operands = _arguments_of(node, known)
            return self._add_inner(inner, operands, detached=detached or not enabled)
        if name == "wrap_with_autocast":
            _, _, enabled, _, inner, *operands = _arguments_of(node, known)
            if not enabled:
                return self._add_inner(inner, operands, detached=detached)
            raise ModelError(f"it runs under autocast at {user_line(node)}; devices train in float32: leave that out")
        if "functorch" in str(getattr(target, "__module__", "")):
            raise ModelError(
                f"it uses torch.vmap or torch.func at {user_line(node)}; compute on the whole batch at once, with "
                "torch's ordinary functions"
            )
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            raise ModelError(f"the operator {target} at {user_line(node)} is not one that devices can run")
        return self._operator(node, target, known, detached)

    def _add_inner(self, inner: fx.GraphModule, operands: list[Any], *, detached: bool) -> tuple[Scalar, ...]:
        placeholders = [each.name for each in inner.graph.nodes if each.op == "placeholder"]
        return self.add_graph(inner, dict(zip(placeholders, operands, strict=True)), detached=detached)

    def _operator(
        self, node: fx.Node, target: torch._ops.OpOverload, known: Mapping[fx.Node, Any], detached: bool
    ) -> Any:
        name = target._opname if target._overloadname == "default" else f"{target._opname}.{target._overloadname}"
        name = _FILLED.get(target._opname, name) if target._opname in _FILLED else name
        arguments = tuple(_argument(each, known, node) for each in node.args)
        keywords = {
            key: _argument(each, known, node) for key, each in node.kwargs.items() if key not in _DROPPED_KEYWORDS
        }
        if target._opname in _FILLED:
            keywords.pop("memory_format", None)
        if target._opname == "to":
            name, arguments = _without_device(target._overloadname, arguments, keywords)
        places = [each for each in node.all_input_nodes if each is not node.args[0]]
        if name == "index.Tensor" and torch.bool in _types(places):
            raise ModelError(f"a mask as index at {user_line(node)} gives a size that is not known; use the places")
        operation = Operation(name, arguments, (), keywords, detached)
        writes, mutates = _written(target, operation)
        if mutates is not None and self.values[mutates].storage < 0:  # a slice or view of a tensor of the model
            writes.update(each for each, storage in self._storages.items() if storage == self.values[mutates].storage)
        read = [self.values[number] for number in values_of(operation)]
        depends = any(each.depends for each in read)
        value = node.meta.get("val")
        several = isinstance(value, tuple | list)
        alias = self._alias(target, operation)
        results = [
            self._placed(each, depends, alias, node) if isinstance(each, torch.Tensor) else None
            for each in (value if isinstance(value, tuple | list) else (value,))
        ]
        numbers = tuple(result.number if result else -1 for result in results)
        random = target._opname.rstrip("_") in _RANDOM or torch.Tag.nondeterministic_seeded in target.tags
        stack = node.meta.get("nn_module_stack") or {}
        module = next(reversed([path for path, _ in stack.values()]), "")
        operation = Operation(name, arguments, numbers, keywords, detached)
        mixes = len(set(_types(node.all_input_nodes))) > 1
        self.steps.append(Step(operation, frozenset(writes), mutates, random, module, user_line(node), mixes))
        if not several and isinstance(alias, str):  # a written parameter or buffer goes on under its own name
            return Tensor(alias) if mutates is None and writes else results[0]
        return results if several else results[0]

    def _alias(self, target: torch._ops.OpOverload, operation: Operation) -> int | str | None:
        """The storage that the result may share: a value's, a tensor's by name, or none."""
        if target._opname not in _ALIASING and not any(each.alias_info for each in target._schema.returns):
            return None
        first = operation.arguments[0] if operation.arguments else None
        if isinstance(first, tuple):
            first = first[0] if first else None
        if isinstance(first, Value):
            return self.values[first.number].storage
        return first.name if isinstance(first, Tensor) else None

    def _placed(self, value: torch.Tensor, depends: bool, storage: int | str | None, node: fx.Node) -> Value:
        try:
            return self._value(value, depends, storage)
        except ModelError as error:
            raise ModelError(f"{error}, at {user_line(node)}") from None

    def _value(self, value: torch.Tensor, depends: bool, storage: int | str | None) -> Value:
        number = len(self.values)
        if isinstance(storage, str):
            storage = self._storages.setdefault(storage, -1 - len(self._storages))
        shape = tuple(_extent_or_int(each) for each in value.shape)
        dtype = DTYPE_OF_TORCH.get(str(value.dtype).removeprefix("torch."), "")
        self.values[number] = ValueInfo(shape, dtype, depends, number if storage is None else storage)
        return Value(number)


def _arguments_of(node: fx.Node, known: Mapping[fx.Node, Any]) -> list[Any]:
    return [known[each] if isinstance(each, fx.Node) else each for each in node.args]


def _types(nodes: Iterable[fx.Node]) -> Iterator[torch.dtype]:
    """Of those that are tensors, but single numbers."""
    for each in nodes:
        value = each.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim():
            yield value.dtype


def _without_device(
    overload: str, arguments: tuple[Argument, ...], keywords: dict[str, Argument]
) -> tuple[str, tuple[Argument, ...]]:
    """A conversion of type alone: where a tensor lies is the device's own affair."""
    if overload == "device":
        arguments = (arguments[0], *arguments[2:])
    if (len(arguments) > 1 and isinstance(arguments[1], DType)) or isinstance(keywords.get("dtype"), DType):
        return ("to.dtype" if overload != "other" else "to.other"), arguments
    if overload == "other":
        return "to.other", arguments
    keywords.clear()
    return "alias", arguments[:1]


def _argument(argument: Any, known: Mapping[fx.Node, Any], node: fx.Node) -> Argument:
    if isinstance(argument, list | tuple):
        return tuple(_scalar(each, known, node) for each in argument)
    return _scalar(argument, known, node)


def _scalar(argument: Any, known: Mapping[fx.Node, Any], node: fx.Node) -> Scalar:
    if isinstance(argument, fx.Node):
        found = known[argument]
        if isinstance(found, _Unknown):
            raise ModelError(
                f"a number computed from the batch size or from a tensor's values is not an integer, at "
                f"{user_line(found.node)}; compute with tensors instead"
            )
        if not isinstance(found, Value | Tensor | Extent | int):
            raise ModelError(f"{node.target} at {user_line(node)} takes what a graph cannot hold")
        return found
    if isinstance(argument, torch.dtype):
        name = str(argument).removeprefix("torch.")
        if name not in DTYPE_OF_TORCH:
            raise ModelError(f"{user_line(node)} uses the type {name}; a model can use {', '.join(DTYPE_OF_TORCH)}")
        return DType(DTYPE_OF_TORCH[name])
    if isinstance(argument, torch.memory_format):
        return MemoryFormat(str(argument).removeprefix("torch."))
    if isinstance(argument, float) and not math.isfinite(argument):
        return Number(str(argument))
    if argument is None or isinstance(argument, bool | int | float | str):
        return argument
    if isinstance(argument, torch.device | torch.layout):
        return None
    raise ModelError(f"{node.target} at {user_line(node)} takes a {type(argument).__name__}, which a graph cannot hold")


def _extent(value: Any, node: fx.Node) -> int | Extent:
    try:
        found = _extent_or_int(value)
    except ModelError as error:
        raise ModelError(f"{error}, at {user_line(node)}") from None
    if isinstance(found, Extent) and found.per_sample < 0:
        raise ModelError(f"a size at {user_line(node)} shrinks as the batch grows")
    return found


def _extent_or_int(value: Any) -> int | Extent:
    """A size as a number, or as a·batch + b.

    Raises:
        ModelError: it is anything else.
    """
    if isinstance(value, int):
        return value
    import sympy  # type: ignore[import-untyped]

    expression = sympy.expand(value.node.expr)
    symbols = list(expression.free_symbols)
    if not symbols:
        return int(expression)
    if any(symbol.name.startswith(_UNBACKED) for symbol in symbols):
        raise ModelError("a size depends on the values of a tensor, as with a mask as index; use torch.where")
    polynomial = sympy.Poly(expression, *symbols) if expression.is_polynomial(*symbols) else None
    if polynomial is None or len(symbols) != 1 or polynomial.degree() != 1:
        raise ModelError(f"a size in the model is {expression}; it must be a · batch + b with integers a and b")
    per_sample, fixed = polynomial.coeff_monomial(symbols[0]), polynomial.coeff_monomial(1)
    if not (per_sample.is_Integer and fixed.is_Integer):
        raise ModelError(f"a size in the model is {expression}; it must be a · batch + b with integers a and b")
    return Extent(int(per_sample), int(fixed))


def _written(target: torch._ops.OpOverload, operation: Operation) -> tuple[set[str], int | None]:
    """The tensors of the model that an operator writes, and the value that it changes in place."""
    writes: set[str] = set()
    mutates: int | None = None
    for position, argument in enumerate(target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = (
            operation.arguments[position]
            if position < len(operation.arguments)
            else operation.keywords.get(argument.name)
        )
        if isinstance(given, Tensor):
            writes.add(given.name)
        elif isinstance(given, Value):
            mutates = given.number
    # The kernel of BatchNorm writes its running statistics, which its schema does not say.
    mean, variance, training = _BATCH_NORMS.get(target._opname, (0, 0, 0))
    if training and operation.arguments[training] is True:
        for position in (mean, variance):
            given = operation.arguments[position]
            if isinstance(given, Tensor):
                writes.add(given.name)
    return writes, mutates


def _without_unused(steps: list[Step], values: Mapping[int, ValueInfo], output: int) -> list[Step]:
    """What the output needs, and what writes a tensor of the model."""
    kept: list[Step] = []
    needed, storages = {output}, {values[output].storage}
    for step in reversed(steps):
        changes = step.mutates is not None and values[step.mutates].storage in storages
        if step.writes or changes or not needed.isdisjoint(step.operation.results):
            needed.update(values_of(step.operation))
            storages.update(values[number].storage for number in values_of(step.operation))
            kept.append(step)
    return kept[::-1]


def _functional(steps: list[Step], values: dict[int, ValueInfo], output: int) -> FlatProgram:
    """In-place operators as functional ones, where nobody else looks at the storage later."""
    new: list[Step] = []
    names: dict[int, int] = {}  # from a value to the one that has taken its place
    last_use = {number: at for at, step in enumerate(steps) for number in values_of(step.operation)}
    last_use[output] = len(steps)
    members: dict[int, list[int]] = {}
    for number, info in values.items():
        members.setdefault(info.storage, []).append(number)
    for at, step in enumerate(steps):
        operation = _renamed(step.operation, names)
        target, changed = step.mutates, replace(step, operation=operation)
        functional = operation.name.split(".")[0]
        if target is not None and functional.endswith("_") and not step.writes:
            storage = values[target].storage
            before = (n for n in members[storage] if n < step.operation.results[0] and n != target)
            others = [n for n in before if last_use.get(n, -1) > at]
            name = operation.name.replace(functional, functional[:-1], 1)
            random_fill = step.random and functional[:-1] not in _RANDOM
            if not others and storage >= 0 and not random_fill and not step.mixes and _exists(name):
                result = step.operation.results[0]
                names[target] = result
                values[result] = replace(values[result], storage=result)
                for later in members[storage]:
                    if later > result:  # views of it that are taken later
                        values[later] = replace(values[later], storage=result)
                members[result] = [result, *(n for n in members[storage] if n > result)]
                members[storage] = [n for n in members[storage] if n < result]
                changed = replace(step, operation=_as_functional(operation, name), mutates=None)
        new.append(changed)
    written = {values[step.mutates].storage for step in new if step.mutates is not None}
    final = tuple(_reshaped(step, values, written) for step in new)
    return FlatProgram(final, values, names.get(output, output))


def _exists(name: str) -> bool:
    packet, _, overload = name.partition(".")
    return hasattr(torch.ops.aten, packet) and hasattr(getattr(torch.ops.aten, packet), overload or "default")


def _as_functional(operation: Operation, name: str) -> Operation:
    return Operation(name, operation.arguments, operation.results, operation.keywords, operation.detached)


def _reshaped(step: Step, values: Mapping[int, ValueInfo], written: Iterable[int]) -> Step:
    """A view needs the layout that the module was exported in; reshape takes any, and copies only where it must."""
    operation = step.operation
    if operation.name not in ("view", "_unsafe_view") or not isinstance(operation.arguments[0], Value):
        return step
    if values[operation.results[0]].storage in written:
        return step
    return replace(step, operation=_as_functional(operation, "reshape"))


def _renamed(operation: Operation, names: Mapping[int, int]) -> Operation:
    if not names or not any(number in names for number in values_of(operation)):
        return operation

    def scalar(each: Scalar) -> Scalar:
        while isinstance(each, Value) and each.number in names:
            each = Value(names[each.number])
        return each

    return with_scalars(operation, scalar, operation.results)
