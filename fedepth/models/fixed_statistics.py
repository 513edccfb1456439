"""The same model with BatchNorm's statistics fixed (FixBN, arXiv 2303.06530). No torch.

In training a BatchNorm then normalises with its running statistics, as in evaluation; its weight and bias are trained
all the same, and dropout stays on. No sample's result depends on the others of its batch, so that micro-batches and
checkpointing give the gradients of the whole batch.

Coordinator and devices derive this form from the graph by the one rule below. What an update consists of, what units
cost and how they run all follow from the graph that it gives.
"""

from __future__ import annotations

from msgspec import structs

from fedepth.models.graph import (
    TRAINS,
    Graph,
    Operation,
    Program,
    Unit,
    averages_of,
    counts,
    learns_statistics,
    statistics_of,
    uses_the_batch,
)


def with_fixed_statistics(graph: Graph) -> Graph:
    """The graph with the training programs of its units changed; the same graph if it has no BatchNorm to fix.

    A BatchNorm that keeps no running statistics goes on with those of the batch.
    """
    units, head = tuple(map(_fixed, graph.units)), _fixed(graph.head)
    if (units, head) == (graph.units, graph.head):
        return graph
    return with_units(graph, units, head)


def with_units(graph: Graph, units: tuple[Unit, ...], head: Unit) -> Graph:
    """The graph with other programs, in which no BatchNorm uses the batch that did not before; where none does, a
    single sample can be trained on."""
    needs_several = any(uses_the_batch(each) for unit in (*units, head) for each in unit.training.operations)
    smallest = graph.smallest_micro_batch if needs_several else 1
    return structs.replace(graph, units=units, head=head, smallest_micro_batch=smallest)


def has_statistics(graph: Graph) -> bool:
    """Whether there is anything to fix."""
    return any(map(statistics_of, (*graph.units, graph.head)))


def _fixed(unit: Unit) -> Unit:
    statistics = statistics_of(unit)
    if not statistics:
        return unit

    def is_fixed(operation: Operation) -> bool:
        return learns_statistics(operation, unit) and averages_of(operation) <= statistics

    operations = tuple(
        _evaluating(each) if is_fixed(each) else each
        for each in unit.training.operations
        if not counts(each, statistics)
    )
    return structs.replace(
        unit,
        written=tuple(name for name in unit.written if name not in statistics),
        fixed=(*unit.fixed, *(name for name in unit.written if name in statistics)),
        training=Program(operations, unit.training.output),
    )


def _evaluating(operation: Operation) -> Operation:
    before, after = operation.arguments[:TRAINS], operation.arguments[TRAINS + 1 :]
    return structs.replace(operation, arguments=(*before, False, *after))
