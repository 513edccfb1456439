"""A rehearsal measures every stage as it will be, and leaves nothing of itself."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedepth.data.read import Images
from fedepth.errors import OverBudgetError
from fedepth.memory.meter import Meter
from fedepth.plan import CachePlace, Plan, Policy
from fedepth.task import Distil, PartInfo, StageResult
from fedepth.training import stages
from fedepth.training.block import BlockTraining
from fedepth.training.rehearsal import FirstImages, rehearse
from fedepth.training.stages import train
from tests.training.jobs import NOTHING, SPEC, TRAINING, Quiet, context, stage, traced, trained_tensors

MIB = 1 << 20


class Counting(Quiet):
    def __init__(self, budget: int = 1 << 40) -> None:
        super().__init__(budget)
        self.results: list[StageResult] = []

    def stage_done(self, result: StageResult, part: PartInfo) -> None:
        self.results.append(result)


def test_every_stage_has_a_peak_that_goes_into_its_result(tmp_path: Path) -> None:
    job = context(tmp_path, [stage(0, 2), stage(3, 5)], count=40)
    hooks = Counting()
    peaks = rehearse(job, Meter(), hooks)
    assert peaks.keys() == {stage(0, 2), stage(3, 5)}
    assert hooks.results == []  # nobody is told of stages that are not trained
    # A peak belongs to a stage as it was rehearsed: another micro-batch needs something else.
    results = train(job, Meter(), hooks, {stage(0, 2): 7, stage(3, 5, micro_batch=4): 9}).stages
    assert [result.rehearsed_peak_bytes for result in results] == [7, 0]


class Falling(Counting):
    """Grants a TiB at the first look and less than the plan needs from then on."""

    def measure(self, stage: int, held_bytes: int) -> int:
        self.budget, now = 20 * MIB, self.budget
        return now


def test_peaks_of_stages_that_the_plan_does_not_have_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, smaller = replace(stage(3, 5), predicted=replace(NOTHING, cache=100 * MIB)), stage(3, 5, micro_batch=4)
    monkeypatch.setattr(stages, "make_plan", lambda *_, **__: Plan((smaller,), (), Policy.PAPER, 20 * MIB))
    job = context(tmp_path, [stage(0, 2), planned], count=40)
    assert rehearse(job, Meter(), Quiet()).keys() == {stage(0, 2), planned}
    job = replace(job, enforce=True)
    assert rehearse(job, Meter(), Falling()).keys() == {stage(0, 2)}
    fits = stages.fitted(job, Meter(), Quiet(20 * MIB))
    assert fits.plan.stages == (smaller,)
    assert stages.fitted(job, Meter(), Quiet()).plan.stages == job.plan.stages


def test_it_changes_nothing_and_leaves_no_file(tmp_path: Path) -> None:
    def job(folder: Path):  # type: ignore[no-untyped-def]
        folder.mkdir()
        return context(folder, [stage(0, 2), stage(3, 5)], count=40)

    fresh, rehearsed = job(tmp_path / "a"), job(tmp_path / "b")
    before = sorted(path.name for path in (tmp_path / "b").rglob("*"))
    rehearse(rehearsed, Meter(), Quiet())
    assert sorted(path.name for path in (tmp_path / "b").rglob("*")) == before
    one, other = trained_tensors(fresh), trained_tensors(rehearsed)
    assert all((one[name] == other[name]).all() for name in one)


@dataclass(frozen=True)
class Recorded:
    """Images that remember which of them were asked for."""

    images: Images
    asked: set[int] = field(default_factory=set)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return self.images.labels

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        self.asked.update(indices.tolist())
        return self.images.read(indices)


@pytest.mark.parametrize(
    ("micro_batch", "expected"),
    [
        (8, 8),  # the batch in one piece
        (4, 8),  # in two
        (3, 6),  # in three of 3, 3 and 2: two of the largest
        (1, 2),
    ],
)
def test_two_micro_batches_are_enough(tmp_path: Path, micro_batch: int, expected: int) -> None:
    job = context(tmp_path, [stage(0, 5, micro_batch=micro_batch)], count=40)
    images = Recorded(job.images)
    rehearse(replace(job, images=images), Meter(), Quiet())
    assert images.asked == set(range(expected))


def test_inputs_are_computed_for_a_whole_batch_and_trained_on_for_a_step(tmp_path: Path) -> None:
    stages = [stage(0, 2, micro_batch=1), replace(stage(3, 5, micro_batch=1), build_batch=16)]
    job = context(tmp_path, stages, count=40)
    images = Recorded(job.images)
    hooks = Counting()
    rehearse(replace(job, images=images), Meter(), hooks)
    assert images.asked == set(range(16))
    few = replace(job, images=FirstImages(job.images, 16), first_samples=2)
    assert [result.samples_seen for result in train(few, Meter(), hooks).stages] == [4, 4]  # two epochs of two samples


def test_a_cache_in_memory_has_its_full_size(tmp_path: Path) -> None:
    large = replace(SPEC, input_shape=(1, 128, 128))
    stages = [stage(0, 0, micro_batch=1), stage(1, 1, micro_batch=1, cache=CachePlace.RAM)]
    job = context(tmp_path, stages, large, replace(TRAINING, batch=1), count=60)
    values = job.model.graph.units[1].input_shape
    cached = 4 * values[0] * values[1] * values[2] * 60  # tens of MiB, though two samples are all that is trained
    assert cached == 30 * MIB
    assert rehearse(job, Meter(), Quiet())[stages[1]] > 0.9 * cached


def test_the_order_of_an_epoch_has_its_full_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    epoch_batches = BlockTraining.epoch_batches

    def counted(block: BlockTraining) -> tuple[torch.Tensor, ...]:
        sizes.append((len(block._labels), len(block._order_beyond)))
        return epoch_batches(block)

    monkeypatch.setattr(BlockTraining, "epoch_batches", counted)
    job = context(tmp_path, [stage(0, 5)], training=replace(TRAINING, local_epochs=1), count=40)
    train(job, Meter(), Quiet(), rehearse(job, Meter(), Quiet()))
    assert sizes == [(8, 32), (40, 0)]  # of the rehearsal, and of training


def test_a_plan_that_needs_too_much_is_found_out(tmp_path: Path) -> None:
    large = replace(SPEC, input_shape=(1, 64, 64))
    job = context(tmp_path, [stage(0, 5, micro_batch=64)], large, replace(TRAINING, batch=64), count=64)
    with pytest.raises(OverBudgetError):
        rehearse(replace(job, enforce=True), Meter(), Quiet(budget=4 << 20))


def test_logits_are_computed_for_as_many_samples_at_once_as_in_training(tmp_path: Path) -> None:
    training = replace(TRAINING, distil=Distil.GLOBAL)
    roomy = replace(stage(0, 5, micro_batch=2), predicted=replace(NOTHING, cache=1 << 40))
    job = context(tmp_path, [roomy], SPEC, training, count=40)
    job = replace(job, costs=traced(SPEC).costs, images=Recorded(job.images))
    rehearse(job, Meter(), Quiet())
    assert job.images.asked == set(range(8))  # a batch, of which two micro-batches would be four
