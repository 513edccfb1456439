"""A model as a job hands it to devices: its graph, and what its units cost. One file, made once per job. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fedepth.costs import ModelCosts
from fedepth.errors import ModelError
from fedepth.files import NOT_JSON, read_regular, write_atomically
from fedepth.models.graph import MOST_BYTES, MOST_UNITS, Graph, check

MOST_COST = 1 << 60  # bytes or floating point operations
MOST_SHARE = 1e6
T = TypeVar("T")


class TracedModel(msgspec.Struct, frozen=True, omit_defaults=True):
    """A graph and its cost table.

    Attributes:
        tokenizer: contents of the job's tokenizer file, where it has one, so that devices have it with the graph.
    """

    graph: Graph
    costs: ModelCosts
    tokenizer: str = ""


class _CostsOnly(msgspec.Struct, frozen=True):
    costs: ModelCosts


def write_traced(path: Path, model: TracedModel) -> None:
    """Writes the file atomically and durably; equal models give equal bytes."""
    write_atomically(path, msgspec.json.encode(model, order="deterministic"))


def read_traced(path: Path) -> TracedModel:
    """Graph and costs, checked.

    Raises:
        ModelError: the file is missing, damaged, or of another version.
    """
    model = _decode(path, TracedModel)
    check(model.graph)
    _checked(model.costs, path)
    if len(model.costs.units) != len(model.graph.units):
        raise ModelError(f"{path} tells the costs of {len(model.costs.units)} units of {len(model.graph.units)}")
    return model


def read_costs(path: Path) -> ModelCosts:
    """The cost table alone: an agent plans with it, and has no use for the graph.

    Raises:
        ModelError: see `read_traced`.
    """
    return _checked(_decode(path, _CostsOnly).costs, path)


def _checked(costs: ModelCosts, path: Path) -> ModelCosts:
    """The planner calculates with these, for every stage that it considers: they have to be numbers that it can."""
    if not 1 <= len(costs.units) <= MOST_UNITS:
        raise ModelError(f"{path} tells the costs of {len(costs.units)} units, allowed are 1 to {MOST_UNITS}")
    if costs.units[-1].exit is None:
        raise ModelError(f"{path} tells the costs of {len(costs.units)} units without a head")
    if any(unit.exit is not None and (unit.exit.exit or unit.exit.frozen) for unit in costs.units):
        raise ModelError(f"{path} tells the costs of an exit that has an exit, or that blocks are trained through")
    if costs.smallest_micro_batch not in (1, 2):
        raise ModelError(f"{path} tells of a smallest micro-batch of {costs.smallest_micro_batch}; it is 1 or 2")
    for number in _numbers(costs):
        if not 0 <= number <= (MOST_SHARE if isinstance(number, float) else MOST_COST):
            raise ModelError(f"{path} tells of costs of {str(number)[:20]}, which no model has")
    return costs


def _numbers(value: Any) -> Iterator[int | float]:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _numbers(getattr(value, field.name))
    elif isinstance(value, tuple):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, int | float):
        yield value


def _decode(path: Path, kind: type[T]) -> T:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ModelError(f"{path} has {path.stat().st_size} bytes; a model's graph has at most {MOST_BYTES}")
        return msgspec.json.decode(read_regular(path, MOST_BYTES), type=kind)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except NOT_JSON as error:
        raise ModelError(f"{path} does not hold a model's graph: {error}") from None
