"""Which token ids a model takes: those that every table has a row for, in which it looks them up as they come in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fedepth.models.graph import Argument, Graph, Operation, Tensor, Value
from fedepth.models.lower import FlatProgram

# Below this, or the smallest embedding's size, where no table can be found.
_FEW = 8

# Operators whose result holds the ids of their first argument, and nothing else.
_CARRYING = {
    *("alias", "clone", "contiguous", "copy", "detach", "expand", "expand_as", "flatten", "flip", "movedim", "narrow"),
    *("permute", "ravel", "repeat", "reshape", "roll", "select", "slice", "split", "split_with_sizes", "squeeze"),
    *("swapaxes", "t", "tile", "to", "transpose", "type_as", "unbind", "unflatten", "unsqueeze", "view", "view_as"),
}
# Operators that look up rows: (which argument is the table, the dimension, the ids); a dimension is given or fixed.
_EMBEDDINGS = {"embedding", "embedding_bag"}
_ALONG_A_DIMENSION = {"index_select", "gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce"}
_WITH_SEVERAL_INDICES = {"index", "index_put", "index_put_"}


def largest_id(module: nn.Module, programs: Iterable[FlatProgram], tensors: Mapping[str, torch.Tensor]) -> int:
    """The largest token id that suits every table of a model; a small one if no table takes ids as they come in.

    Args:
        programs: the model's, whose input is ids.
        tensors: that they name.
    """
    found: list[int] = []
    for program in programs:
        values = program.values

        def shape_of(table: Argument, values: Any = values) -> Sequence[Any]:
            if isinstance(table, Tensor):
                return tensors[table.name].shape
            return values[table.number].shape if isinstance(table, Value) else ()

        found += _limits((step.operation for step in program.steps), shape_of)
    if found:
        return max(0, min(found))
    sizes = [each.num_embeddings for each in module.modules() if isinstance(each, nn.Embedding | nn.EmbeddingBag)]
    return min([_FEW, *sizes]) - 1


def largest_id_of(graph: Graph) -> int:
    """The same of a model whose module is not at hand, as far as its first unit tells."""

    def shape_of(table: Argument) -> tuple[int, ...]:
        return graph.tensors[table.name][1] if isinstance(table, Tensor) else ()

    if (known := largest_row(graph)) is not None:
        return max(0, known)
    lookups = (
        each for unit in (*graph.units, graph.head) for step in unit.evaluation.operations for each in _lookups(step)
    )
    return min([_FEW, *(shape_of(table)[0] for table, _, _ in lookups if shape_of(table))]) - 1


def largest_row(graph: Graph) -> int | None:
    """The largest token id that every table has a row for in which the first unit looks ids up as they come in; None
    where there is no such table."""

    def shape_of(table: Argument) -> tuple[int, ...]:
        return graph.tensors[table.name][1] if isinstance(table, Tensor) else ()

    return min(_limits(graph.units[0].evaluation.operations, shape_of), default=None)


def _limits(operations: Iterable[Operation], shape_of: Callable[[Argument], Sequence[Any]]) -> Iterator[int]:
    """For every table that is read at ids, the largest one that it has a row for.

    Args:
        operations: in order; value 0 holds the ids.
        shape_of: a table's shape, in which what depends on the batch is no int; empty where it is not known.
    """
    added = {0: 0}  # from each value that holds ids to what has been added to them

    def of(argument: Argument) -> int | None:
        return added.get(argument.number) if isinstance(argument, Value) else None

    for operation in operations:
        for table, dimension, ids in _lookups(operation):
            shape = shape_of(table)
            rows = shape[dimension] if -len(shape) <= dimension < len(shape) else None
            if (shift := of(ids)) is not None and isinstance(rows, int):
                yield rows - 1 - shift
        if operation.name == "one_hot" and (shift := of(operation.arguments[0])) is not None:
            classes = operation.arguments[1] if len(operation.arguments) > 1 else -1
            if isinstance(classes, int) and classes > 0:
                yield classes - 1 - shift
        first = of(operation.arguments[0]) if operation.arguments else None
        if first is not None and (more := _added(operation)) is not None:
            added.update((number, first + more) for number in operation.results)


def _lookups(operation: Operation) -> Iterator[tuple[Argument, int, Argument]]:
    """Tables, the dimension in which they are read, and the ids at which."""
    name, arguments = operation.name.split(".")[0], operation.arguments
    if name in _EMBEDDINGS:
        yield arguments[0], 0, arguments[1]
    elif name in _ALONG_A_DIMENSION and isinstance(arguments[1], int):
        yield arguments[0], arguments[1], arguments[2]
    elif name in _WITH_SEVERAL_INDICES and isinstance(arguments[1], tuple):
        for dimension, index in enumerate(arguments[1]):
            yield arguments[0], dimension, index


def _added(operation: Operation) -> int | None:
    """What an operator adds to ids; none if it makes something else of them."""
    name = operation.name.split(".")[0]
    if name in _CARRYING:
        return 0
    if name in ("add", "sub") and len(operation.arguments) == 2 and not operation.keywords:
        number = operation.arguments[1]
        if isinstance(number, int) and not isinstance(number, bool):
            return number if name == "add" else -number
    return None
