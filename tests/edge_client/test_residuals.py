"""What int8 leaves out of a device's updates: added to the next one, once, and only where that update counts.

The stand-in for a trainer adds a line for every task whose update left something out.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_client import task_run
from edge_client.transport import Refused
from fedepth.errors import DiskError
from fedepth.files import file_digest
from fedepth.kept_files import kept_name, number_and_digest
from fedepth.layout import Encoding
from fedepth.residuals import Residuals, residuals_folder
from fedepth.task import Task
from tests.edge_client.bench import OK, Bench, FakeTransport, Insisting, MakeTask
from tests.edge_client.faults import Disk

InRound = Callable[..., Task]


@pytest.fixture
def in_round(make_task: MakeTask) -> InRound:
    """A task of a round whose updates go up as int8."""

    def task(number: int, encoding: Encoding = Encoding.INT8, **changes: Any) -> Task:
        made = make_task(task_id=f"t{number}")
        return replace(made, **{"round": number, "training": replace(made.training, encoding=encoding), **changes})

    return task


def held(bench: Bench) -> dict[str, str]:
    """By the round, task and attempt that left it: the lines in it."""
    found = {}
    for path in bench.state.glob("residuals/*/*/*"):
        name = number_and_digest(path.name)
        assert name is not None and file_digest(path) == name[1]
        found[path.parent.name] = path.read_text()
    return found


def begun(bench: Bench) -> list[int]:
    """How many files each request to a trainer named."""
    return [len(request["left_out"]) for request in bench.requests]


def test_it_goes_on_from_round_to_round_and_through_restarts_and_there_is_one(
    bench: Bench, transport: FakeTransport, in_round: InRound
) -> None:
    transport.answers = [in_round(1), in_round(2)]
    bench.run(transport, OK)
    assert held(bench) == {"00000002-t2-1": "t1\nt2\n"}
    transport.answers = [in_round(5)]
    bench.run(transport, OK)
    assert held(bench) == {"00000005-t5-1": "t1\nt2\nt5\n"}
    assert begun(bench) == [0, 1, 1]
    assert list(bench.state.glob("work/*")) == []
    assert len(list(bench.state.glob("residuals/*/*"))) == 1


@pytest.mark.parametrize("encoding", [Encoding.FLOAT32, Encoding.FLOAT16])
def test_other_encodings_leave_nothing(
    bench: Bench, transport: FakeTransport, in_round: InRound, encoding: Encoding
) -> None:
    transport.answers = [in_round(1), in_round(2, encoding)]
    bench.run(transport, OK)
    assert held(bench) == {}
    assert list(bench.state.glob("residuals/*")) == []
    assert bench.requests[-1]["left_out_output"] == ""


def test_of_a_refused_update_nothing_goes_on(bench: Bench, transport: FakeTransport, in_round: InRound) -> None:
    transport.answers = [in_round(1), in_round(2), in_round(3)]
    transport.deliveries = [Refused("late", "its round is closed")]
    bench.run(transport, OK)
    assert begun(bench) == [0, 0, 1]
    assert held(bench) == {"00000003-t3-1": "t2\nt3\n"}
    assert len(bench.said("a residual is deleted")) == 1


def test_refused_after_a_restart_it_goes_as_well(bench: Bench, transport: FakeTransport, in_round: InRound) -> None:
    transport.answers = [in_round(1)]
    transport.deliveries = [RuntimeError("killed")]
    with pytest.raises(RuntimeError, match="killed"):
        bench.run(transport, OK)
    assert held(bench) == {"00000001-t1-1": "t1\n"}
    transport.deliveries = [Refused("norm", "it goes too far")]
    transport.answers = [in_round(2)]
    bench.run(transport, OK)
    assert held(bench) == {"00000002-t2-1": "t2\n"}


def test_a_task_that_is_trained_again_takes_nothing_of_its_lost_update(
    bench: Bench, transport: FakeTransport, in_round: InRound
) -> None:
    """Its update came to nothing, or the task would not be given again."""
    transport.answers = [in_round(1), in_round(2), in_round(2, attempt=2, task_id="again"), in_round(3)]
    bench.run(transport, OK)
    assert begun(bench) == [0, 1, 0, 1]
    assert held(bench) == {"00000003-t3-1": "again\nt3\n"}


def test_a_job_that_goes_back_takes_nothing_from_rounds_that_are_no_more(
    bench: Bench, transport: FakeTransport, in_round: InRound
) -> None:
    transport.answers = [in_round(6), in_round(7), in_round(4)]
    bench.run(transport, OK)
    assert held(bench) == {"00000004-t4-1": "t4\n"}


def test_a_task_of_a_round_before_ends_a_residual_even_if_it_comes_to_nothing(
    bench: Bench, transport: FakeTransport, in_round: InRound
) -> None:
    transport.answers = [in_round(6), in_round(4), in_round(7)]
    bench.run(transport, OK, {"do": "fail", "outcome": "diverged"}, OK)
    assert [failure.task_id for failure in transport.failures] == ["t4"]
    assert begun(bench) == [0, 0, 0]
    assert held(bench) == {"00000007-t7-1": "t7\n"}


@pytest.mark.parametrize(
    "changes",
    [{"job": "another"}, {"graph_digest": "0" * 64}, {"run_id": "after a rollback"}],
    ids=["job", "model", "run"],
)
def test_it_goes_with_its_job_its_run_and_its_model(
    bench: Bench, transport: FakeTransport, in_round: InRound, changes: dict[str, Any]
) -> None:
    transport.answers = [in_round(1)]
    bench.run(transport, OK)
    residuals = Residuals(bench.state)
    (known,) = residuals.of(in_round(2))
    assert residuals.of(in_round(2, **changes)) == ()
    assert held(bench) == {}
    assert not known.exists()


def rot(path: Path) -> None:
    path.write_bytes(b"X" + path.read_bytes()[1:])


def become_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def become_a_link(path: Path) -> None:
    target = path.parents[3] / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


def be_called_otherwise(path: Path) -> None:
    path.rename(path.with_name("left-out-0.safetensors"))


@pytest.mark.parametrize("damage", [rot, become_a_pipe, become_a_link, be_called_otherwise])
def test_a_damaged_file_is_left_out_and_told(
    bench: Bench, transport: FakeTransport, in_round: InRound, damage: Callable[[Path], None]
) -> None:
    transport.answers = [in_round(1)]
    bench.run(transport, OK)
    (path,) = bench.state.glob("residuals/*/*/*")
    damage(path)
    transport.answers = [in_round(2)]
    bench.run(transport, OK)
    assert held(bench) == {"00000002-t2-1": "t2\n"}
    assert len(bench.said("a residual is damaged; it is deleted")) == 1


def test_killed_at_any_step_every_update_leaves_out_what_it_should(
    bench: Bench, transport: FakeTransport, in_round: InRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport.answers = [in_round(1)]
    bench.run(transport, OK)
    moments: dict[Path, bool] = {}  # and whether the update had arrived by then

    def copy_the_disk(number: int) -> None:
        moment = bench.root / f"killed-{number}"
        moments[moment] = len(transport.delivered) == 2
        shutil.copytree(bench.state, moment / "state", symlinks=True)

    transport.answers = [in_round(2)]
    with monkeypatch.context() as patch:
        Disk(bench.state, on_step=copy_the_disk).install(patch)
        bench.run(transport, OK)
    trained = set()
    for moment, arrived in moments.items():
        each = Bench(moment, bench.data)
        again = FakeTransport(transport.weights, [])
        if not arrived:
            again = Insisting(transport.weights, [], task=in_round(2), attempt=1)
        each.run(again, OK)
        (lines,) = held(each).values()
        assert lines == "t1\nt2\n", moment
        assert arrived or {result.task_id for result in again.delivered} == {"t2"}
        trained.add(len(each.requests))
        assert list(each.state.glob("work/*")) == []
        assert len(list(each.state.glob("residuals/*/*"))) == 1
    assert trained == {0, 1}
    assert len(moments) > 20


def test_killed_while_a_task_is_given_up_nothing_of_it_seems_to_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is found without an output is taken to be of an update that is kept."""

    class Killed(BaseException):
        pass

    def dying(step: list[int], real: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            step[0] -= 1
            if step[0] < 0:
                raise Killed
            real(*args, **options)

        return call

    for survived in itertools.count():
        folder = tmp_path / f"t-{survived}"
        for name in ("cache/a", "output/part-0000.safetensors", "peers/job/7/1-x", "residuals/job/7/1-x"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("x")
        step = [survived]
        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir"):
                patch.setattr(os, name, dying(step, getattr(os, name)))
            try:
                task_run._discard(folder)
                break
            except Killed:
                left = {path.name for path in folder.iterdir()}
                assert "output" in left or left.isdisjoint({"peers", "residuals"}), survived
    assert survived > 10
    assert not folder.exists()


def fill_disk(monkeypatch: pytest.MonkeyPatch, times: int) -> list[Path]:
    """So many residuals find no room; what was tried."""
    real, tries = Residuals.keep, list[Path]()

    def full(residuals: Residuals, folder: Path) -> None:
        tries.append(folder)
        if len(tries) <= times:
            raise DiskError("residuals cannot be kept: No space left on device")
        real(residuals, folder)

    monkeypatch.setattr(Residuals, "keep", full)
    return tries


def test_on_a_full_disk_the_update_goes_first_and_the_residual_is_kept_later(
    bench: Bench, transport: FakeTransport, in_round: InRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch, 4)
    transport.answers = [in_round(1), in_round(2)]
    bench.run(transport, OK)
    assert held(bench) == {"00000002-t2-1": "t1\nt2\n"}
    assert [result.task_id for result in transport.delivered] == ["t1", "t2"]
    assert len(bench.said("residuals cannot be kept yet")) == 1


def test_refused_before_it_could_be_kept_it_goes_all_the_same(
    bench: Bench, transport: FakeTransport, in_round: InRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = fill_disk(monkeypatch, 1)
    transport.answers = [in_round(1), in_round(2)]
    transport.deliveries = [Refused("norm", "it goes too far")]
    bench.run(transport, OK)
    assert len(tries) > 1
    assert begun(bench) == [0, 0]
    assert held(bench) == {"00000002-t2-1": "t2\n"}


def test_each_step_of_keeping_may_fail_and_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_round: InRound
) -> None:
    """Whenever it fails, the new one is there or still where it was, never beside the old one."""

    def put(root: Path, number: int, content: bytes) -> Path:
        folder = residuals_folder(root / "left", in_round(number))
        folder.mkdir(parents=True)
        path = folder / "new"
        path.write_bytes(content)
        path.rename(folder / kept_name(1, file_digest(path)))
        return root / "left"

    def prepared(step: int) -> Path:
        root = tmp_path / str(step)
        root.mkdir()
        Residuals(root).keep(put(root, 1, b"old"))
        put(root, 2, b"new")
        return root

    counting = Disk(tmp_path)
    root = prepared(0)
    with monkeypatch.context() as patch:
        counting.install(patch)
        Residuals(root).keep(root / "left")
    assert counting.names
    for step in range(1, len(counting.names) + 1):
        root = prepared(step)
        with monkeypatch.context() as patch:
            Disk(tmp_path, fails_from=step, code=errno.ENOSPC).install(patch)
            try:
                Residuals(root).keep(root / "left")
            except DiskError as error:
                assert "residuals cannot be kept" in str(error)
        assert len(list(root.glob("residuals/*/*"))) <= 1
        assert b"new" in {path.read_bytes() for path in root.glob("*/*/*/*")}
        Residuals(root).keep(root / "left")
        (path,) = Residuals(root).of(in_round(3))
        assert path.read_bytes() == b"new"
        assert len(list(root.glob("residuals/*/*"))) == 1
        assert not (root / "left").exists()
