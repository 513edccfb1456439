"""Training whose parts go up encoded: what they hold, what is left out, and that only they are different."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedepth.encoding import DecodedPart
from fedepth.errors import DivergedError, StateError
from fedepth.files import file_digest
from fedepth.kept_files import number_and_digest
from fedepth.layout import SCALES, Encoding, is_encoded
from fedepth.memory.meter import Meter
from fedepth.plan import Stage
from fedepth.training.context import TrainingContext, load
from fedepth.training.parts import write_part
from fedepth.training.session import Granted, Known, run
from fedepth.training.stages import Trained, train
from fedepth.weights import load_numpy, open_weights, save
from tests.training.jobs import (
    SPEC,
    TRAINING,
    Quiet,
    Tensors,
    assert_equal,
    assignment,
    context,
    stage,
    trained_tensors,
)

UNITS = 6  # of digits-cnn


def job(folder: Path, encoding: Encoding, *stages: Stage, before: Sequence[Path] = ()) -> TrainingContext:
    """With what the files `before` hold left out before."""
    folder.mkdir(exist_ok=True)
    (folder / "left").mkdir(exist_ok=True)
    found = context(folder, stages, training=replace(TRAINING, encoding=encoding))
    held = {name: reader for reader in map(open_weights, before) for name in reader.names}
    return replace(found, left_out=held, left_out_output=folder / "left")


def decoded(job: TrainingContext, trained: Trained) -> Tensors:
    return {
        name: part.read(name)
        for part in (DecodedPart(job.weights, path) for path in trained.parts)
        for name in part.names
    }


def left_out(job: TrainingContext) -> tuple[list[Path], Tensors]:
    assert job.left_out_output is not None
    paths = sorted(job.left_out_output.iterdir())
    for path in paths:
        name = number_and_digest(path.name)
        assert name is not None and name[1] == file_digest(path)
    return paths, {name: tensor for path in paths for name, tensor in load_numpy(path).items()}


def encoded_names(job: TrainingContext) -> set[str]:
    units = (*job.model.units, job.model.head)
    names = {name for unit in units for name in unit.unit.parameters}
    return {name for name in names if is_encoded(*job.weights.info(name), parameter=True)}


@pytest.mark.parametrize("encoding", [Encoding.FLOAT16, Encoding.INT8])
def test_one_block_is_trained_as_without_and_only_its_part_is_rounded(tmp_path: Path, encoding: Encoding) -> None:
    plain = trained_tensors(job(tmp_path / "plain", Encoding.FLOAT32, stage(0, UNITS - 1)))
    mine = job(tmp_path / "mine", encoding, stage(0, UNITS - 1))
    trained = train(mine, Meter(), Quiet())
    found = decoded(mine, trained)
    held = {name: tensor for path in trained.parts for name, tensor in load_numpy(path).items()}
    assert found.keys() == plain.keys()
    rounded = encoded_names(mine)
    assert 0 < len(rounded) < len(plain)
    for name, tensor in plain.items():
        change = tensor - mine.weights.read(name)
        if name not in rounded:
            assert np.array_equal(found[name], tensor) and held[name].dtype == tensor.dtype
        elif encoding is Encoding.FLOAT16:
            assert np.array_equal(held[name], change.astype(np.float16))
        else:
            scales = held[name + SCALES].reshape(-1, *(1,) * (change.ndim - 1))
            assert (np.abs(held[name] * scales - change) <= scales * 0.5001).all()
    _, left = left_out(mine)
    assert left.keys() == (rounded if encoding is Encoding.INT8 else set())
    for name, tensor in left.items():
        np.testing.assert_allclose(found[name] + tensor, plain[name], rtol=0, atol=1e-6)
        assert tensor.any()


def test_later_blocks_learn_from_earlier_ones_as_they_go_up(tmp_path: Path) -> None:
    """The second block's inputs are those of the first block decoded: it does not learn from weights that nobody
    gets."""
    stages = (stage(0, 2), stage(3, UNITS - 1))
    mine = job(tmp_path / "mine", Encoding.INT8, *stages)
    trained = train(mine, Meter(), Quiet())
    first = DecodedPart(mine.weights, trained.parts[0])
    again = job(tmp_path / "again", Encoding.FLOAT32, *stages)
    given = {name: torch.from_numpy(first.read(name)) for name in first.names}
    loaded = mine.with_part(trained.parts[0])
    load(loaded, loaded.model.units[0], trainable=False)
    for name, tensor in loaded.model.units[0].tensors.items():
        if name in given:
            assert torch.equal(tensor, given[name])
    loaded.model.units[0].release()
    plain = train(again, Meter(), Quiet())
    assert not np.array_equal(decoded(again, plain)["units.3.0.weight"], decoded(mine, trained)["units.3.0.weight"])
    assert_equal(decoded(mine, trained), decoded(again, plain), tolerance=0.05)


def test_what_was_left_out_is_added_once_and_replaced(tmp_path: Path) -> None:
    first = job(tmp_path / "first", Encoding.INT8, stage(0, UNITS - 1))
    train(first, Meter(), Quiet())
    paths, before = left_out(first)
    second = job(tmp_path / "second", Encoding.INT8, stage(0, UNITS - 1), before=paths)
    plain = trained_tensors(job(tmp_path / "plain", Encoding.FLOAT32, stage(0, UNITS - 1)))
    found = decoded(second, train(second, Meter(), Quiet()))
    _, after = left_out(second)
    for name in encoded_names(second):
        np.testing.assert_allclose(found[name] + after[name], plain[name] + before[name], rtol=0, atol=1e-6)
        assert not np.array_equal(before[name], after[name])


def test_of_what_is_not_trained_it_waits(tmp_path: Path) -> None:
    first = job(tmp_path / "first", Encoding.INT8, stage(0, UNITS - 1))
    train(first, Meter(), Quiet())
    paths, before = left_out(first)
    second = job(tmp_path / "second", Encoding.INT8, stage(3, UNITS - 1), before=paths)
    trained = train(second, Meter(), Quiet())
    _, after = left_out(second)
    mine = {name for path in trained.parts for name in open_weights(path).names} & encoded_names(second)
    assert after.keys() == before.keys()
    assert 0 < len(mine) < len(before)
    for name, tensor in before.items():
        assert np.array_equal(after[name], tensor) is (name not in mine)


def test_a_session_trains_encoded_twice_alike_and_by_its_rehearsal_leaves_nothing(tmp_path: Path) -> None:
    made = assignment(tmp_path, (stage(0, 2), stage(3, UNITS - 1)), training=replace(TRAINING, encoding=Encoding.INT8))
    made = replace(made, left_out_output=tmp_path / "left")
    one = run(made, Granted(1 << 40), torch.device("cpu"), Known())
    names = sorted(path.name for path in (tmp_path / "left").iterdir())
    assert [name.split("-")[0] for name in names] == ["1", "2", "3"]
    other = replace(made, output=tmp_path / "other", left_out_output=tmp_path / "left-too", rehearse=False)
    assert run(other, Granted(1 << 40), torch.device("cpu"), Known()).parts == one.parts
    assert sorted(path.name for path in (tmp_path / "left-too").iterdir()) == names
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_residual_of_another_model_is_refused(tmp_path: Path) -> None:
    made = assignment(tmp_path, (stage(0, UNITS - 1),), training=replace(TRAINING, encoding=Encoding.INT8))
    save(tmp_path / "odd", {"units.3.0.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(StateError, match="odd holds another model"):
        run(replace(made, left_out=(tmp_path / "odd",)), Granted(1 << 40), torch.device("cpu"), Known())


@pytest.mark.parametrize(
    ("encoding", "change", "message"),
    [
        (Encoding.FLOAT16, 7e4, r"more than float16 can hold \(65504\), after step 3 at learning rate 0.05"),
        (Encoding.INT8, 3e38, "more than int8 can hold, after step 3 at learning rate 0.05"),
        (Encoding.INT8, float("inf"), "is not finite after step 3"),
    ],
)
def test_a_change_that_cannot_go_up_ends_the_task(
    tmp_path: Path, encoding: Encoding, change: float, message: str
) -> None:
    mine = job(tmp_path / "mine", encoding, stage(0, UNITS - 1))
    unit = mine.model.units[1]
    load(mine, unit, trainable=True)
    with torch.no_grad():
        unit.tensors[unit.unit.parameters[0]].view(-1)[5] += change
    with pytest.raises(DivergedError, match=message):
        write_part(mine, [unit], 3, 0)
    assert list(mine.output.iterdir()) == []
    assert list((tmp_path / "mine" / "left").iterdir()) == []
    write_part(replace(mine, must_stay_finite=False), [unit], 3, 0)  # as in a rehearsal


def test_the_model_has_what_these_tests_are_about(tmp_path: Path) -> None:
    assert len(context(tmp_path, (stage(0, UNITS - 1),), SPEC).model.units) == UNITS
