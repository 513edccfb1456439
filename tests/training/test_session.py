"""A session without a trainer around it: what a simulation calls."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace as replace_struct

from fedepth.errors import ModelError, PlanError
from fedepth.files import file_digest
from fedepth.memory.meter import Baseline
from fedepth.models.traced import TracedModel, write_traced
from fedepth.plan import Stage
from fedepth.task import ModelSpec, PartInfo, Result, StageResult
from fedepth.training.session import Assignment, Known, run
from fedepth.weights import load_numpy
from tests.training.jobs import (
    PRERESNET,
    SPEC,
    TOKENS,
    TRAINING,
    TRANSFORMER,
    VECTORS,
    Quiet,
    assignment,
    exported,
    stage,
    traced,
)

CPU = torch.device("cpu")


class Noting(Quiet):
    """Notes what a session says, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []
        self.parts: list[PartInfo] = []

    def begin(self, epochs: int, baseline: Baseline) -> None:
        assert baseline.resident_bytes > 0
        self.heard.append(f"begin {epochs}")

    def rehearsing(self) -> None:
        self.heard.append("rehearsing")

    def stage_done(self, result: StageResult, part: PartInfo) -> None:
        self.heard.append("stage_done")
        self.parts.append(part)


def test_a_task_is_rehearsed_once_and_its_parts_are_as_they_are_told(tmp_path: Path) -> None:
    known, hooks = Known(), Noting()
    asked = replace(assignment(tmp_path, [stage(0, 2), stage(3, 5)], count=12), most_samples=10)
    result = run(asked, hooks, CPU, known)
    assert hooks.heard == ["begin 2", "rehearsing", "stage_done", "stage_done"]
    assert (result.sample_count, result.trained_units) == (10, (0, 1, 2, 3, 4, 5))
    assert result.parts[:2] == tuple(hooks.parts) and len(result.parts) == 3
    for part in result.parts:
        path = asked.output / f"part-{part.part:04d}.safetensors"
        assert (part.size_bytes, part.digest) == (path.stat().st_size, file_digest(path))
    again = Noting()
    run(replace(asked, output=tmp_path / "again"), again, CPU, known)
    assert again.heard == ["begin 2", "stage_done", "stage_done"]


def last_of(spec: ModelSpec) -> int:
    return len(exported(spec).graph.units) - 1


def assert_all_moved(asked: Assignment, result: Result) -> None:
    before = load_numpy(asked.weights)
    moved = {
        name: bool((tensor != before[name]).any())
        for part in result.parts
        for name, tensor in load_numpy(asked.output / f"part-{part.part:04d}.safetensors").items()
    }
    assert moved.keys() == before.keys()
    assert all(moved.values())


@pytest.mark.parametrize("spec", [TOKENS, VECTORS], ids=["token ids", "vectors"])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
def test_other_inputs_than_images_are_trained(tmp_path: Path, spec: ModelSpec, checkpoint: bool) -> None:
    planned = [replace(stage(0, 0), checkpoint=checkpoint), replace(stage(1, last_of(spec)), checkpoint=checkpoint)]
    asked = assignment(tmp_path, planned, spec)
    result = run(asked, Noting(), CPU, Known())
    assert_all_moved(asked, result)
    assert all(each.loss_last < each.loss_first for each in result.stages)


def refused(asked: Assignment, error: type[Exception], says: str) -> None:
    hooks = Noting()
    with pytest.raises(error, match=says):
        run(asked, hooks, CPU, Known())
    assert hooks.heard == []
    assert not list(asked.output.iterdir())


def test_a_block_that_ends_where_there_is_no_exit_is_refused(tmp_path: Path) -> None:
    last = last_of(TRANSFORMER)
    assert not exported(TRANSFORMER).graph.exits[0]  # the class token has met no patch there
    refused(assignment(tmp_path, [stage(0, 0), stage(1, last)], TRANSFORMER), PlanError, "has the blocks 0, which")


def test_a_block_may_end_there_if_its_loss_comes_through_a_frozen_suffix(tmp_path: Path) -> None:
    asked = assignment(tmp_path, [replace(stage(0, 0), frozen_suffix=True)], TRANSFORMER)
    assert run(asked, Noting(), CPU, Known()).trained_units == (0,)


@pytest.mark.parametrize("odd", [stage(0, 6), stage(3, 2), stage(-1, 5)])
def test_a_plan_for_another_model_is_refused(tmp_path: Path, odd: Stage) -> None:
    refused(assignment(tmp_path, [odd]), PlanError, "with its 6 units cannot be trained in")


@pytest.mark.parametrize("other", [{"input_shape": (1, 28, 28)}, {"classes": ("a", "b")}])
def test_a_graph_for_other_inputs_or_classes_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    """Its maps are pooled: it would run on images of any size, and learn labels of fewer classes."""
    asked = assignment(tmp_path, [stage(0, 5)])
    spec = replace(SPEC, **other)
    shape, classes = re.escape(str(spec.input_shape)), len(spec.classes)
    says = rf"graph is for inputs of shape \(.*\) and 3 classes, and .* of shape {shape} and {classes} classes"
    refused(replace(asked, task=replace(asked.task, model=spec)), ModelError, says)


def test_a_graph_that_asks_for_what_is_not_run_here_is_refused(tmp_path: Path) -> None:
    asked = assignment(tmp_path, [stage(0, 1)], VECTORS)
    real = traced(VECTORS)
    unit = real.graph.units[0]
    (first, *others) = unit.training.operations
    program = replace_struct(unit.training, operations=(replace_struct(first, name="from_file"), *others))
    units = (replace_struct(unit, training=program), *real.graph.units[1:])
    write_traced(asked.graph, TracedModel(replace_struct(real.graph, units=units), real.costs))
    refused(asked, ModelError, "'from_file', which is not run here")


FIXED = replace(TRAINING, fixed_statistics=True)


def delivered(asked: Assignment, result: Result) -> set[str]:
    parts = (asked.output / f"part-{part.part:04d}.safetensors" for part in result.parts)
    return {name for part in parts for name in load_numpy(part)}


def test_fixed_statistics_stay_and_do_not_travel_and_one_process_trains_both_ways(tmp_path: Path) -> None:
    """The second task has the units warm that the first trained, but not as it runs them."""
    layout, known = exported(PRERESNET).graph.layout(), Known()
    for training, expected in ((TRAINING, layout), (FIXED, layout.without_statistics())):
        hooks = Noting()
        asked = assignment(tmp_path, [stage(0, 4, 3), stage(5, 9, 3)], PRERESNET, training=training)
        result = run(replace(asked, output=tmp_path / f"out-{training.fixed_statistics}"), hooks, CPU, known)
        assert hooks.heard[:2] == ["begin 2", "rehearsing"]
        asked = replace(asked, output=tmp_path / f"out-{training.fixed_statistics}")
        assert delivered(asked, result) == {tensor.name for tensor in expected.tensors}
    assert [len(units) for units in known.warm.values()] == [10, 10]


def test_costs_that_are_not_known_are_told(tmp_path: Path) -> None:
    asked = assignment(tmp_path, [stage(0, 9)], PRERESNET, training=FIXED)
    write_traced(asked.graph, replace_struct(traced(PRERESNET), fixed_costs=None))
    refused(asked, ModelError, "the costs of preresnet20 with fixed BatchNorm statistics are not known")


def test_a_model_without_statistics_is_trained_as_ever(tmp_path: Path) -> None:
    asked = assignment(tmp_path, [stage(0, 5)], training=FIXED)
    assert traced(SPEC).fixed_costs is None
    assert delivered(asked, run(asked, Noting(), CPU, Known())) == set(exported(SPEC).tensors)
