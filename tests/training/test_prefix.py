"""The inputs of a stage are the same, whether the preceding units are loaded together or one after the other."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedepth.errors import StateError
from fedepth.models.run import RunnableUnit
from fedepth.training import prefix
from fedepth.training.context import TrainingContext
from fedepth.training.prefix import build_inputs
from tests.training.jobs import PRERESNET, assert_equal, context, stage, trained_tensors
from tests.training.open_files import open_files


def nothing() -> None: ...


def inputs(folder: Path, *, streamed: bool) -> torch.Tensor:
    folder.mkdir()
    job = context(folder, [stage(4, 9)], PRERESNET, count=10)
    cache = build_inputs(job, replace(stage(4, 9), build_streamed=streamed), None, None, nothing)
    assert not any(unit.tensors for unit in job.model.units)  # nothing stays loaded
    assert open_files(folder / "cache") == []  # the inputs lie in RAM; what lay between the units is gone
    samples = cache.read(torch.arange(10))
    cache.close()
    return samples


def test_one_unit_at_a_time_gives_what_all_units_at_once_give(tmp_path: Path) -> None:
    together, streamed = inputs(tmp_path / "a", streamed=False), inputs(tmp_path / "b", streamed=True)
    assert together.shape == (10, 16, 8, 8)
    assert torch.equal(together, streamed)


def test_units_that_were_trained_are_read_back_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = context(tmp_path, [stage(0, 2), replace(stage(4, 5), build_streamed=True)])
    loaded: list[list[int]] = []
    given_up: list[weakref.ref[torch.Tensor]] = []
    fill, release = prefix._fill, RunnableUnit.release

    def released(unit: RunnableUnit) -> None:
        given_up.extend(map(weakref.ref, unit.trained().values()))
        release(unit)

    def look(context: TrainingContext, *arguments: Any, **more: Any) -> None:
        loaded.append([index for index, unit in enumerate(context.model.units) if unit.tensors])
        assert all(tensor() is None for tensor in given_up)  # nothing else holds what was trained
        fill(context, *arguments, **more)

    monkeypatch.setattr(prefix, "_fill", look)
    monkeypatch.setattr(RunnableUnit, "release", released)
    streamed = trained_tensors(job)
    assert given_up
    assert loaded == [[], [0], [1], [2], [3]]
    monkeypatch.setattr(prefix, "_fill", fill)
    (tmp_path / "b").mkdir()
    assert_equal(trained_tensors(context(tmp_path / "b", [stage(0, 2), stage(4, 5)])), streamed, 0)


def test_a_failure_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = context(tmp_path, [stage(4, 9)], PRERESNET, count=10)
    read = type(job.weights).read

    def fails_at_the_third_unit(reader: object, name: str):  # type: ignore[no-untyped-def]
        if name.startswith("blocks.1."):
            raise StateError("gone")
        return read(job.weights, name)

    monkeypatch.setattr(type(job.weights), "read", fails_at_the_third_unit)
    with pytest.raises(StateError):
        build_inputs(job, replace(stage(4, 9), build_streamed=True), None, None, nothing)
    assert open_files(tmp_path / "cache") == []
