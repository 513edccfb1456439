"""The file that devices are handed: graph and costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from fedepth.costs import ModelCosts
from fedepth.errors import ModelError
from fedepth.models import traced
from fedepth.models.graph import Graph, Operation, Program, Tensor, Unit, Value
from fedepth.models.traced import CostTables, TracedModel, read_costs, read_traced, write_traced
from tests.unit_costs import unit_cost

LINEAR = Program((Operation("linear", (Value(0), Tensor("w"), None), (1,)),), 1)
NOTHING = Program((), 0)
UNIT = Unit("u", ("w",), (), (), (3,), LINEAR, LINEAR)
HEAD = Unit("head", (), (), (), (3,), NOTHING, NOTHING)
GRAPH = Graph(1, (UNIT,), HEAD, (True,), {"w": ("F32", (3, 3))}, "F32", 1, False)
COSTS = ModelCosts("toy", (unit_cost(exit_=unit_cost("exit")),), 12, 3, 1)


def written(path: Path, graph: Graph = GRAPH, costs: ModelCosts = COSTS) -> Path:
    write_traced(path, TracedModel(graph, costs))
    return path


def test_what_is_written_is_read_and_equal_models_give_equal_files(tmp_path: Path) -> None:
    path = written(tmp_path / "one")
    assert read_traced(path) == TracedModel(GRAPH, COSTS)
    assert read_costs(path) == CostTables(COSTS)
    assert written(tmp_path / "two").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("read", [read_traced, read_costs])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"graph": {}, "costs": 3}'])
def test_a_damaged_file_is_refused(tmp_path: Path, read: object, content: bytes) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ModelError, match="bad does not hold a model's graph"):
        read(tmp_path / "bad")  # type: ignore[operator]


def test_a_missing_or_too_large_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        read_costs(tmp_path / "none")
    monkeypatch.setattr(traced, "MOST_BYTES", 10)
    with pytest.raises(ModelError, match="at most 10"):
        read_costs(written(tmp_path / "large"))


def test_costs_without_a_head_or_of_other_units_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="1 units without a head"):
        read_costs(written(tmp_path / "headless", costs=replace(COSTS, units=(unit_cost(),))))
    with pytest.raises(ModelError, match="the costs of 2 units of 1"):
        read_traced(written(tmp_path / "more", costs=replace(COSTS, units=COSTS.units * 2)))


@pytest.mark.parametrize(
    "damaged",
    [
        structs.replace(GRAPH, version=2),
        structs.replace(GRAPH, units=()),
        structs.replace(GRAPH, exits=(False,)),
        structs.replace(GRAPH, input_type="F16"),
        structs.replace(GRAPH, smallest_micro_batch=3),
        structs.replace(GRAPH, tensors={}),
        structs.replace(GRAPH, tensors={"w": ("F32", (-3, 3))}),
        structs.replace(GRAPH, units=(structs.replace(UNIT, fixed=("w",)),)),
        structs.replace(GRAPH, head=structs.replace(HEAD, parameters=("w",))),
        structs.replace(GRAPH, units=(structs.replace(UNIT, training=structs.replace(LINEAR, output=2)),)),
        structs.replace(GRAPH, units=(structs.replace(UNIT, parameters=()),)),
        structs.replace(
            GRAPH, units=(structs.replace(UNIT, training=Program((Operation("relu", (Value(7),), (1,)),), 1)),)
        ),
        structs.replace(
            GRAPH, units=(structs.replace(UNIT, training=Program((Operation("relu", (Value(0),), (0,)),), 0)),)
        ),
    ],
)
def test_a_graph_that_refers_to_what_it_does_not_have_is_refused(tmp_path: Path, damaged: Graph) -> None:
    with pytest.raises(ModelError):
        read_traced(written(tmp_path / "graph", damaged))


def test_a_layout_knows_variances_and_counters(tmp_path: Path) -> None:
    norm = Operation(
        "batch_norm", (Value(0), Tensor("w"), None, Tensor("mean"), Tensor("spread"), True, 0.1, 1e-5), (1,)
    )
    program = Program((norm,), 1)
    unit = Unit("u", ("w",), ("mean", "spread", "a.num_batches_tracked"), (), (3,), program, program)
    tensors = dict.fromkeys(("w", "mean", "spread"), ("F32", (3,))) | {"a.num_batches_tracked": ("I64", ())}
    graph = Graph(1, (unit,), HEAD, (True,), tensors, "F32", 1, False)
    marked = {each.name: each.not_negative for each in graph.layout().tensors}
    assert marked == {"w": False, "mean": False, "spread": True, "a.num_batches_tracked": True}
