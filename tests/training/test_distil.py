"""Distillation from the global model, against plain torch loops: its logits, once for a task, in every stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedepth.data.transforms import augment, views_key
from fedepth.estimate import teachers
from fedepth.memory.meter import Meter
from fedepth.models.skip import skip
from fedepth.plan import CachePlace, CacheType, Stage
from fedepth.task import Distil, Heads, ModelSpec, TrainingSpec
from fedepth.training import stages
from fedepth.training.cache import Cache, RowFormat, open_cache
from fedepth.training.context import TrainingContext
from fedepth.training.prefix import build_inputs, global_logits
from fedepth.training.stages import train
from tests.training.jobs import (
    FROZEN,
    PRERESNET,
    SPEC,
    TOKENS,
    TRAINING,
    TRANSFORMER,
    Quiet,
    Tensors,
    assert_equal,
    context,
    fresh,
    parts_of,
    stage,
    traced,
    trained_tensors,
)
from tests.training.open_files import open_files
from tests.training.test_stages import order


def job_of(folder: Path, planned: list[Stage], spec: ModelSpec, training: TrainingSpec) -> TrainingContext:
    """A task with what its model really costs, which decides how the logits are computed."""
    return replace(context(folder, planned, spec, training), costs=traced(spec, training.heads).costs)


DISTILLING = replace(TRAINING, distil=Distil.GLOBAL, distil_weight=0.5, distil_temperature=3.0)


def pixels(job_images: np.ndarray) -> torch.Tensor:  # type: ignore[type-arg]
    return (torch.from_numpy(job_images).float() / 255 - 0.5) / 0.5


def by_hand(folder: Path, spec: ModelSpec, blocks: list[tuple[int, int]], training: TrainingSpec) -> Tensors:
    """Blocks with a shared head, cross-entropy, and the divergence from what the model said before the task."""
    job = context(folder, [stage(*block) for block in blocks], spec, training)
    module = fresh(spec)
    units, head = parts_of(module)
    raw, key = job.images.read(np.arange(16)), views_key(training.seed, 1, "d")
    x = pixels(augment(raw, training.augmentation, key, np.arange(16)))
    y = torch.from_numpy(job.images.labels)
    with torch.no_grad():
        wanted = functional.softmax(module.eval()(x) / 3, 1)
    for index, (first, last) in enumerate(blocks):
        block = nn.Sequential(*units[first : last + 1])
        optimizer = torch.optim.SGD([*block.parameters(), *head.parameters()], lr=0.05, momentum=0.9, weight_decay=1e-3)
        block.train()
        head.train()
        for batch in order(job, index, 16):
            optimizer.zero_grad()
            logits = head(skip(block(x[batch]), job.model.graph.head_shape))
            apart = functional.kl_div(functional.log_softmax(logits / 3, 1), wanted[batch], reduction="batchmean")
            (functional.cross_entropy(logits, y[batch]) + 0.5 * apart).backward()
            optimizer.step()
        block.eval()
        with torch.no_grad():
            x = block(x)
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("augmentation", ["none", "crop-flip"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["logits in RAM", "logits on disk"])
def test_every_stage_learns_from_what_the_model_said_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_disk: bool, augmentation: str
) -> None:
    """Of one view of each sample, the one that the model spoke of."""
    training = replace(DISTILLING, augmentation=augmentation)
    if on_disk:
        monkeypatch.setattr(teachers, "LOGITS_IN_RAM_BYTES", 0)
    blocks = [(0, 1), (2, 3), (4, 5)]
    job = job_of(tmp_path, [stage(*block, micro_batch=3) for block in blocks], SPEC, training)
    assert_equal(trained_tensors(job), by_hand(tmp_path, SPEC, blocks, training))
    assert open_files(tmp_path / "cache") == []


def test_weights_change_by_what_is_distilled(tmp_path: Path) -> None:
    plain, taught = (
        trained_tensors(job_of(tmp_path, [stage(0, 5)], SPEC, training)) for training in (TRAINING, DISTILLING)
    )
    assert any(not np.array_equal(plain[name], taught[name]) for name in plain)


@pytest.mark.parametrize("spec", [SPEC, PRERESNET, TRANSFORMER, TOKENS, FROZEN], ids=lambda spec: spec.name)
@pytest.mark.parametrize("roomy", [True, False], ids=["at once", "unit by unit"])
@pytest.mark.parametrize("first", [0, 1])
def test_the_logits_are_those_of_the_whole_model(tmp_path: Path, spec: ModelSpec, roomy: bool, first: int) -> None:
    room = replace(stage(0, 0).predicted, parameters=1 << 40 if roomy else 0)
    planned = replace(stage(first, first), predicted=room)
    job = job_of(tmp_path, [planned], spec, DISTILLING)
    source = build_inputs(job, planned, None, None, lambda: None)
    before = source.read(torch.arange(16)).clone()
    logits = global_logits(job, planned, source, lambda: None)
    found = logits.read(torch.arange(16))
    raw = job.images.read(np.arange(16))
    inputs = torch.from_numpy(raw).long() if spec is TOKENS else pixels(raw)
    with torch.no_grad():
        expected = fresh(spec).eval()(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        source.read(torch.arange(16)), before, rtol=0, atol=0
    )  # the stage has yet to train on it
    assert not any(unit.tensors for unit in (*job.model.units, job.model.head))
    for cache in (source, logits):
        cache.close()
    assert open_files(tmp_path / "cache") == []


def test_the_logits_are_those_of_the_views_that_are_trained_on(tmp_path: Path) -> None:
    training = replace(DISTILLING, augmentation="crop-flip")
    for first in (0, 2):
        planned = stage(first, 5)
        job = job_of(tmp_path, [planned], SPEC, training)
        source = build_inputs(job, planned, None, None, lambda: None)
        logits = global_logits(job, planned, source, lambda: None)
        views = augment(job.images.read(np.arange(16)), "crop-flip", views_key(training.seed, 1, "d"), np.arange(16))
        with torch.no_grad():
            expected = fresh(SPEC).eval()(pixels(views))
        torch.testing.assert_close(logits.read(torch.arange(16)), expected, rtol=1e-4, atol=1e-5)
        source.close()
        logits.close()


def test_they_are_computed_once_for_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(job: TrainingContext, first: Stage, source: Cache, between: Callable[[], None]) -> Cache:
        calls.append(first.first)
        return global_logits(job, first, source, between)

    monkeypatch.setattr(stages, "global_logits", counted)
    job = job_of(tmp_path, [stage(0, 2), stage(3, 5)], SPEC, replace(DISTILLING, heads=Heads.AUXILIARY))
    train(job, Meter(), Quiet())
    assert calls == [0]


def test_a_file_for_logits_is_closed_when_training_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "LOGITS_IN_RAM_BYTES", 0)
    job = job_of(tmp_path, [stage(0, 5)], SPEC, DISTILLING)

    class Failing(Quiet):
        def progress(self, *_: object) -> None:
            raise ValueError

    with pytest.raises(ValueError):
        train(job, Meter(), Failing())
    assert open_files(tmp_path / "cache") == []


def test_partial_training_distils_too(tmp_path: Path) -> None:
    """In the features of a frozen prefix the whole model goes on, whatever is trained of it."""
    job = job_of(tmp_path, [stage(2, 3)], SPEC, DISTILLING)
    names = trained_tensors(job).keys()
    assert all(name.startswith(("units.2.", "units.3.")) for name in names)


@pytest.mark.parametrize("place", CachePlace)
@pytest.mark.parametrize("kind", CacheType)
def test_logits_are_kept_in_full_precision(tmp_path: Path, place: CachePlace, kind: CacheType) -> None:
    planned = stage(3, 5, cache=place)
    job = job_of(tmp_path, [planned], SPEC, replace(DISTILLING, cache_type=kind))
    source = build_inputs(job, planned, None, None, lambda: None)
    logits = global_logits(job, planned, source, lambda: None)
    assert logits.rows == RowFormat((3,), CacheType.FLOAT32)
    again = open_cache(CachePlace.RAM, tmp_path, 16, logits.rows)
    again.write(0, logits.read(torch.arange(16)))
    torch.testing.assert_close(again.read(torch.arange(16)), logits.read(torch.arange(16)), rtol=0, atol=0)
    source.close()
    logits.close()
