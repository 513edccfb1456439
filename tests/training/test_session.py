"""A session without a trainer around it: what a simulation calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fedepth.estimate.tracing import trace_costs
from fedepth.files import file_digest
from fedepth.memory.meter import Baseline
from fedepth.task import PartInfo, StageResult
from fedepth.training.session import Assignment, Known, run
from tests.training.test_stages import SPEC, TRAINING, Quiet, context, stage


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


def assignment(folder: Path) -> Assignment:
    job = context(folder, [stage(0, 2), stage(3, 5)], count=12)
    return Assignment(
        task=replace(job.task, costs=trace_costs(SPEC, TRAINING)),
        plan=job.plan,
        weights=folder / "weights.safetensors",
        data=folder,
        output=folder / "out",
        cache=folder / "cache",
        device_id="device",
        allowed_models=(),
        enforce=False,
        most_samples=10,
    )


def test_a_task_is_rehearsed_once_and_its_parts_are_as_they_are_told(tmp_path: Path) -> None:
    known, asked, hooks = Known(), assignment(tmp_path), Noting()
    result = run(asked, hooks, torch.device("cpu"), known)
    assert hooks.heard == ["begin 2", "rehearsing", "stage_done", "stage_done"]
    assert (result.sample_count, result.trained_units) == (10, (0, 1, 2, 3, 4, 5))
    assert result.parts[:2] == tuple(hooks.parts) and len(result.parts) == 3
    for part in result.parts:
        path = asked.output / f"part-{part.part:04d}.safetensors"
        assert (part.size_bytes, part.digest) == (path.stat().st_size, file_digest(path))
    again = Noting()
    run(replace(asked, output=tmp_path / "again"), again, torch.device("cpu"), known)
    assert again.heard == ["begin 2", "stage_done", "stage_done"]
