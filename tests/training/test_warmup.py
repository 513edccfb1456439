"""A warm-up stays within what its plan needs, and leaves nothing behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedepth.task import Distil, Heads, ModelSpec
from fedepth.training import context, prefix
from fedepth.training.block import BlockTraining
from fedepth.training.warmup import warm_up
from tests.training import jobs
from tests.training.jobs import stage


@pytest.mark.parametrize(("micro_batch", "samples"), [(8, 2), (1, 1)])
def test_it_goes_through_the_units_of_the_plan_with_at_most_its_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int, samples: int
) -> None:
    read: set[str] = set()
    sizes: set[int] = set()
    load, step = context.load, BlockTraining.step

    def loaded(job: Any, unit: Any, *, trainable: bool) -> None:
        if trainable:
            read.add(unit.unit.name)
        load(job, unit, trainable=trainable)

    def stepped(block: BlockTraining, indices: Any) -> float:
        sizes.add(len(indices))
        return step(block, indices)

    monkeypatch.setattr(prefix, "load", loaded)
    monkeypatch.setattr("fedepth.training.block.load", loaded)
    monkeypatch.setattr(BlockTraining, "step", stepped)
    job = jobs.context(tmp_path, [stage(1, 2, micro_batch), stage(4, 4, micro_batch)])
    before = sorted(path.name for path in tmp_path.rglob("*"))
    warm_up(job, job.plan.trained_units)
    assert read == {job.model.units[unit].unit.name for unit in (1, 2, 4)} | {job.model.graph.head.name}
    assert sizes == {samples}
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert not any(unit.tensors for unit in (*job.model.units, job.model.head))


@pytest.mark.parametrize("heads", Heads)
@pytest.mark.parametrize("distil", Distil)
@pytest.mark.parametrize("spec", [jobs.SPEC, jobs.TRANSFORMER], ids=["images", "tokens"])
def test_it_may_end_with_any_unit(tmp_path: Path, heads: Heads, distil: Distil, spec: ModelSpec) -> None:
    training = replace(jobs.TRAINING, heads=heads, distil=distil)
    job = jobs.context(tmp_path, [stage(0, 1)], spec, training)
    job = replace(job, costs=jobs.traced(spec, heads).costs)
    warm_up(job, job.plan.trained_units)
    parts = (*job.model.units, job.model.head, *filter(None, job.model.auxiliary))
    assert not any(unit.tensors for unit in parts)
