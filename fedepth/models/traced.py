"""A model as a job hands it to devices: its graph, and what its units cost. One file, made once per job. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from fedepth.costs import ModelCosts
from fedepth.errors import ModelError
from fedepth.files import NOT_JSON, write_atomically
from fedepth.models.graph import MOST_BYTES, Graph, check

T = TypeVar("T")


class TracedModel(msgspec.Struct, frozen=True):
    """A graph and its cost table."""

    graph: Graph
    costs: ModelCosts


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
    _with_head(model.costs, path)
    if len(model.costs.units) != len(model.graph.units):
        raise ModelError(f"{path} tells the costs of {len(model.costs.units)} units of {len(model.graph.units)}")
    return model


def read_costs(path: Path) -> ModelCosts:
    """The cost table alone: an agent plans with it, and has no use for the graph.

    Raises:
        ModelError: see `read_traced`.
    """
    return _with_head(_decode(path, _CostsOnly).costs, path)


def _with_head(costs: ModelCosts, path: Path) -> ModelCosts:
    if not costs.units or costs.units[-1].exit is None:
        raise ModelError(f"{path} tells the costs of {len(costs.units)} units without a head")
    return costs


def _decode(path: Path, kind: type[T]) -> T:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ModelError(f"{path} has {path.stat().st_size} bytes; a model's graph has at most {MOST_BYTES}")
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except NOT_JSON as error:
        raise ModelError(f"{path} does not hold a model's graph: {error}") from None
