"""The lowest version of ONNX's operators that says what a model computes, and a model written in that version.

A runtime loads versions up to its own, and no later one: what devices have is often years old. torch writes version 18
at the least, though most models need nothing newer than 13. An operator fits an older version if the checker of `onnx`
accepts it there, once what only spells out a default has been taken away; from one version to the next most operators
have only gained types. The comparison with the trained model, which every export has to pass, would show where an
operator had changed its meaning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
from onnx import defs, helper, numpy_helper

from fedepth.errors import ExportError
from fedepth.job_sections import LOWEST_OPSET

# Since this version, reductions take their axes as an input.
_AXES_AS_INPUT = 18
_REDUCTIONS = frozenset(
    f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
)


def opset_of(model: Any) -> int:
    """The version of ONNX's own operators in a model (`onnx.ModelProto`)."""
    return int(next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")))


def lower(model: Any, wanted: int | None, name: str) -> None:
    """Rewrites a model in the version `wanted`, or else in the lowest that it needs, with the oldest format for that.

    Args:
        model: an `onnx.ModelProto`, which is changed.
        wanted: no later than the model's own version.
        name: of the model, for messages.

    Raises:
        ExportError: an operator needs a later version than `wanted`; it is named.
    """
    written, constants = opset_of(model), {each.name: each for each in model.graph.initializer}
    needs: dict[str, int] = {}
    for node in _nodes(model.graph):
        needs[node.op_type] = max(needs.get(node.op_type, 0), _needed(node, written, constants))
    needed = written if model.functions else max(needs.values(), default=LOWEST_OPSET)
    if wanted is not None and wanted < needed:
        newer = sorted((each for each in needs if needs[each] > wanted), key=lambda each: (-needs[each], each))
        raise ExportError(
            f"{name} cannot be exported with opset {wanted}: its operator {newer[0]} needs {needs[newer[0]]}"
            + (f" (others that need more than {wanted}: {', '.join(newer[1:])})" if newer[1:] else "")
            + f"; set opset to {needed} or more, or leave it out"
        )
    target = needed if wanted is None else wanted
    replaced: set[str] = set()
    for node in _nodes(model.graph):
        older = _as_of(node, target, constants)
        if older is not None:
            replaced.update(set(node.input) - set(older.input))
            node.CopyFrom(older)
    replaced.difference_update(name for node in _nodes(model.graph) for name in node.input)
    for index in reversed(range(len(model.graph.initializer))):
        if model.graph.initializer[index].name in replaced:
            del model.graph.initializer[index]
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = target
    model.ir_version = helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)


def strip(model: Any) -> None:
    """Takes away what torch notes of its work, such as lines of source files: no part of the model, and of a format
    that older runtimes do not know."""
    graph = model.graph
    del graph.metadata_props[:]
    for each in (*_nodes(graph), *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        each.ClearField("metadata_props")
        each.ClearField("doc_string")


def _nodes(graph: Any) -> Iterator[Any]:
    """All operators of a graph, also those within others."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _needed(node: Any, written: int, constants: dict[str, Any]) -> int:
    """The lowest version in which an operator can be written as it is used here."""
    if node.domain not in ("", "ai.onnx"):
        return LOWEST_OPSET
    if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
        # The checker would look for values of the graph around it.
        return max(LOWEST_OPSET, defs.get_schema(node.op_type, written).since_version)
    return next((v for v in range(LOWEST_OPSET, written) if _fits(_as_of(node, v, constants) or node, v)), written)


def _fits(node: Any, version: int) -> bool:
    context = onnx.checker.C.CheckerContext()
    context.ir_version = onnx.IR_VERSION
    context.opset_imports = {"": version}
    try:
        onnx.checker.check_node(node, context)
    except onnx.checker.ValidationError:
        return False
    return True


def _as_of(node: Any, version: int, constants: dict[str, Any]) -> Any | None:
    """The operator as it would be written in an older version; None if that is the same, or cannot be said."""
    older = onnx.NodeProto()
    older.CopyFrom(node)
    try:
        schema = defs.get_schema(node.op_type, version)
    except defs.SchemaError:
        return None
    if node.op_type in _REDUCTIONS and version < _AXES_AS_INPUT and len(node.input) == 2:
        if node.input[1] not in constants:
            return None
        axes = numpy_helper.to_array(constants[node.input[1]]).reshape(-1).tolist()
        del older.input[1:]
        older.attribute.append(helper.make_attribute("axes", axes, attr_type=onnx.AttributeProto.INTS))
    latest = defs.get_schema(node.op_type)
    unknown = [each for each in older.attribute if each.name not in schema.attributes]
    for attribute in unknown:
        default = latest.attributes[attribute.name].default_value if attribute.name in latest.attributes else None
        parts = node.op_type == "Split" and attribute.name == "num_outputs"  # equal ones, which older versions assume
        if not parts and (default is None or not default.name or attribute != default):
            return None
        older.attribute.remove(attribute)
    return None if older == node else older
