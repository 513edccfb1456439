"""Training that leaves the finite numbers is stopped, and says at which step; what only measures goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedepth.errors import DivergedError, StateError
from fedepth.memory.meter import Meter
from fedepth.plan import CachePlace, CacheType, Stage
from fedepth.task import PartInfo, StageResult, TrainingSpec
from fedepth.training import stages
from fedepth.training.block import BlockTraining
from fedepth.training.cache import RowFormat
from fedepth.training.rehearsal import rehearse
from fedepth.training.session import Known, run
from fedepth.training.stages import train
from tests.training.jobs import SPEC, TRAINING, Quiet, assignment, context, stage
from tests.training.open_files import open_files
from tests.training.test_session import Noting

CPU = torch.device("cpu")


def at_rate(learning_rate: float, cache_type: CacheType = CacheType.FLOAT32) -> TrainingSpec:
    return replace(TRAINING, learning_rate=learning_rate, cache_type=cache_type)


class Told(Quiet):
    """Notes the losses and the stages that it hears of."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.done: list[StageResult] = []

    def progress(self, index: int, count: int, stage: Stage, epoch: int, loss: float) -> None:
        self.losses.append(loss)

    def stage_done(self, result: StageResult, part: PartInfo) -> None:
        self.done.append(result)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_the_first_loss_that_is_not_finite_ends_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    real, taken = BlockTraining.step, []

    def stepping(block: BlockTraining, indices: torch.Tensor) -> float:
        taken.append(block)
        loss = real(block, indices)
        return float("nan") if block.steps == step else loss

    monkeypatch.setattr(BlockTraining, "step", stepping)
    monkeypatch.setattr(stages, "LOOK_S", -1.0)  # every step reports
    hooks = Told()
    job = context(tmp_path, [stage(0, 5)], training=at_rate(0.25), count=16)  # two steps in each of two epochs
    with pytest.raises(DivergedError) as caught:
        train(job, Meter(), hooks)
    assert str(caught.value) == (
        f"loss is not finite after step {step} at learning rate 0.25; lower training.learning_rate"
    )
    assert len(taken) == step
    assert all(torch.isfinite(torch.tensor(hooks.losses)))
    assert hooks.done == [] and not list(job.output.iterdir())


@pytest.mark.parametrize("cache", list(CachePlace))
def test_a_learning_rate_far_too_high_is_named_and_nothing_stays_open(tmp_path: Path, cache: CachePlace) -> None:
    hooks = Told()
    job = context(tmp_path, [stage(0, 2), stage(3, 5, cache=cache)], training=at_rate(1e30))
    before = open_files(job.cache)
    with pytest.raises(DivergedError, match=r"at learning rate 1e\+30; lower training\.learning_rate"):
        train(job, Meter(), hooks)
    assert all(torch.isfinite(torch.tensor(hooks.losses)))
    assert open_files(job.cache) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_the_last_step_has_made_infinite_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    real = BlockTraining.step

    def last_step_spoils(block: BlockTraining, indices: torch.Tensor) -> float:
        loss = real(block, indices)
        if block.steps == 4:
            with torch.no_grad():
                block._parameters[0].view(-1)[0] = value
        return loss

    monkeypatch.setattr(BlockTraining, "step", last_step_spoils)
    job = context(tmp_path, [stage(0, 5)], training=at_rate(0.05), count=16)
    with pytest.raises(DivergedError, match=r"\w+ is not finite after step 4 at learning rate 0\.05"):
        train(job, Meter(), Quiet())
    assert not list(job.output.iterdir())


def test_a_cache_that_cannot_hold_the_values_is_told_from_a_learning_rate(tmp_path: Path) -> None:
    spec = at_rate(0.05, CacheType.FLOAT16)
    job = context(tmp_path, [stage(0, 2), stage(3, 5)], training=spec)
    with pytest.MonkeyPatch.context() as patch:
        real = RowFormat.encode
        # float16 ends at 65504.
        patch.setattr(RowFormat, "encode", lambda rows, batch: real(rows, batch if rows.kind is None else batch + 1e5))
        with pytest.raises(DivergedError) as caught:
            train(job, Meter(), Quiet())
    assert str(caught.value) == (
        "the inputs of units 3-5 are too large for float16 after training at learning rate 0.05; set "
        "training.cache_type to float32, or lower training.learning_rate"
    )


def test_a_rehearsal_measures_and_does_not_judge(tmp_path: Path) -> None:
    planned = [stage(0, 2), stage(3, 5)]
    job = context(tmp_path, planned, training=at_rate(1e30), count=40)
    assert rehearse(job, Meter(), Quiet()).keys() == set(planned)


def test_a_session_goes_on_to_the_next_task_after_one_that_diverged(tmp_path: Path) -> None:
    known, hooks = Known(), Noting()
    good = assignment(tmp_path, [stage(0, 5)], SPEC)
    bad = replace(good, task=replace(good.task, training=at_rate(1e30)))
    with pytest.raises(DivergedError):
        run(bad, hooks, CPU, known)
    assert hooks.heard == ["begin 2", "rehearsing"]
    assert run(good, hooks, CPU, known).trained_units == (0, 1, 2, 3, 4, 5)


def test_a_part_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    job = context(tmp_path, [stage(0, 5)])
    job.output.rmdir()
    with pytest.raises(StateError, match=r"blocks cannot be written: .*/out/\S+: No such file or directory"):
        train(job, Meter(), Quiet())
