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
from fedepth.models.fixed_statistics import has_statistics, with_fixed_statistics
from fedepth.models.graph import MOST_BYTES, MOST_UNITS, Graph, check
from fedepth.task import TrainingSpec

MOST_COST = 1 << 60  # bytes or floating point operations
MOST_SHARE = 1e6
T = TypeVar("T")


class TracedModel(msgspec.Struct, frozen=True, omit_defaults=True):
    """A graph and its cost table.

    Attributes:
        fixed_costs: the table of the graph with fixed statistics (fedepth.models.fixed_statistics); None where the job
             never fixes them, or there are none.
        tokenizer: contents of the job's tokenizer file, where it has one, so that devices have it with the graph.
    """

    graph: Graph
    costs: ModelCosts
    fixed_costs: ModelCosts | None = None
    tokenizer: str = ""

    def in_training(self, training: TrainingSpec) -> TracedModel:
        """Graph and costs as this training runs them.

        Raises:
            ModelError: it fixes statistics, and the costs of that are not known.
        """
        if not training.fixed_statistics:
            return TracedModel(self.graph, self.costs, tokenizer=self.tokenizer)
        if self.fixed_costs is not None:
            return TracedModel(with_fixed_statistics(self.graph), self.fixed_costs, tokenizer=self.tokenizer)
        if has_statistics(self.graph):
            raise ModelError(
                f"the costs of {self.costs.model} with fixed BatchNorm statistics are not known; prepare it for "
                'batch_norm = "fixed"'
            )
        return TracedModel(self.graph, self.costs, tokenizer=self.tokenizer)


class CostTables(msgspec.Struct, frozen=True):
    """What a traced model tells a planner, which has no use for the graph. Attributes as of TracedModel."""

    costs: ModelCosts
    fixed_costs: ModelCosts | None = None

    def of(self, training: TrainingSpec) -> ModelCosts:
        """The table of this training. Whether one is missing shows where the graph is read."""
        fixed = self.fixed_costs if training.fixed_statistics else None
        return self.costs if fixed is None else fixed


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
    for costs in _tables(model):
        _checked(costs, path)
        if len(costs.units) != len(model.graph.units):
            raise ModelError(f"{path} tells the costs of {len(costs.units)} units of {len(model.graph.units)}")
    return model


def read_costs(path: Path) -> CostTables:
    """The cost tables alone.

    Raises:
        ModelError: see `read_traced`.
    """
    tables = _decode(path, CostTables)
    for costs in _tables(tables):
        _checked(costs, path)
    return tables


def _tables(found: TracedModel | CostTables) -> tuple[ModelCosts, ...]:
    return (found.costs,) if found.fixed_costs is None else (found.costs, found.fixed_costs)


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
