"""Other models of a device's own: they persist from round to round, each round changes them once, and none goes up.

The stand-in for a trainer adds a line to a peer for every task that it has been through.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_client.outbox import Outbox
from fedepth.errors import DiskError
from fedepth.files import delete, file_digest
from fedepth.kept_files import kept_name, number_and_digest
from fedepth.peers import Peers
from fedepth.task import Task
from tests.edge_client.bench import OK, Bench, FakeTransport, Insisting, MakeTask
from tests.edge_client.faults import Disk

InRound = Callable[..., Task]


@pytest.fixture
def in_round(make_task: MakeTask) -> InRound:
    """A task of a round that trains so many models."""

    def task(number: int, models: int = 2, **changes: Any) -> Task:
        made = make_task(task_id=f"t{number}")
        training = replace(made.training, mutual=models)
        return replace(
            made, **{"round": number, "training": training, "plan": replace(made.plan, models=models), **changes}
        )

    return task


def held(bench: Bench) -> dict[tuple[int, int], str]:
    """Round and slot of every peer, and the lines in it."""
    found = {}
    for path in bench.state.glob("peers/*/*/*"):
        name = number_and_digest(path.name)
        assert name is not None
        assert file_digest(path) == name[1]
        found[int(path.parent.name), name[0]] = path.read_text()
    return found


def given(bench: Bench) -> list[list[str]]:
    """What the peers were that each request to a trainer named."""
    return [request["peers"] for request in bench.requests]


def test_a_peer_goes_on_from_round_to_round_and_through_restarts(
    bench: Bench, transport: FakeTransport, in_round: InRound
) -> None:
    transport.answers = [in_round(1), in_round(2)]
    bench.run(transport, OK)
    transport.answers = [in_round(5)]
    bench.run(transport, OK)
    assert held(bench) == {(2, 1): "new\nt1\nt2\n", (5, 1): "new\nt1\nt2\nt5\n"}  # the last two rounds stay
    assert [names != [""] for names in given(bench)] == [False, True, True]
    assert list(bench.state.glob("work/*")) == []
    assert [len(result.parts) for result in transport.delivered] == [1, 1, 1]


def test_each_of_several_peers_goes_on_and_one_that_does_not_fit_waits(
    bench: Bench, transport: FakeTransport, in_round: InRound
) -> None:
    fewer = in_round(2, models=3)
    transport.answers = [
        in_round(1, models=3),
        replace(fewer, plan=replace(fewer.plan, models=2)),
        in_round(3, models=3),
    ]
    bench.run(transport, OK)
    assert held(bench)[3, 1] == "new\nt1\nt2\nt3\n"
    assert held(bench)[3, 2] == "new\nt1\nt3\n"


def test_a_task_that_is_trained_again_begins_with_the_peers_that_it_began_with(
    bench: Bench, transport: FakeTransport, in_round: InRound
) -> None:
    transport.answers = [in_round(1), in_round(2), in_round(2, attempt=2, task_id="again")]
    bench.run(transport, OK)
    assert held(bench) == {(1, 1): "new\nt1\n", (2, 1): "new\nt1\nagain\n"}


def test_a_job_that_goes_back_takes_nothing_from_rounds_that_are_no_more(
    bench: Bench, transport: FakeTransport, in_round: InRound
) -> None:
    transport.answers = [in_round(6), in_round(7), in_round(4)]
    bench.run(transport, OK)
    assert held(bench) == {(4, 1): "new\nt4\n"}


@pytest.mark.parametrize(
    "changes",
    [
        {"job": "another"},
        {"graph_digest": "0" * 64},
        {"run_id": "after a rollback"},
        {"training": None},
    ],
    ids=["job", "model", "run", "off"],
)
def test_peers_go_with_their_job_its_run_and_their_model(
    bench: Bench, transport: FakeTransport, in_round: InRound, make_task: MakeTask, changes: dict[str, Any]
) -> None:
    transport.answers = [in_round(1)]
    bench.run(transport, OK)
    peers = Peers(bench.state)
    (known,) = peers.of(in_round(2))
    assert known is not None
    other = replace(make_task(), round=2) if changes == {"training": None} else in_round(2, **changes)
    assert all(each is None for each in peers.of(other))
    assert held(bench) == {}
    assert not known.exists()


def rot(path: Path) -> None:
    path.write_bytes(b"X" + path.read_bytes()[1:])


def become_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def become_a_folder(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


def become_a_link(path: Path) -> None:
    target = path.parents[3] / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


@pytest.mark.parametrize("damage", [rot, become_a_pipe, become_a_folder, become_a_link, Path.unlink])
def test_of_a_damaged_peer_the_round_before_counts_and_else_a_new_one_begins(
    bench: Bench, transport: FakeTransport, in_round: InRound, damage: Callable[[Path], None]
) -> None:
    transport.answers = [in_round(1), in_round(2)]
    bench.run(transport, OK)
    (newest,) = bench.state.glob("peers/*/00000002/1-*")
    damage(newest)
    transport.answers = [in_round(3)]
    bench.run(transport, OK)
    assert held(bench)[3, 1] == "new\nt1\nt3\n"
    said = bench.said("a peer is damaged; it is deleted")
    assert len(said) == (0 if damage is Path.unlink else 1)
    for path in list(bench.state.glob("peers/*/*/1-*")):
        rot(path)
    transport.answers = [in_round(4)]
    bench.run(transport, OK)
    assert held(bench) == {(4, 1): "new\nt4\n"}


def test_killed_at_any_step_every_round_changes_a_peer_once(
    bench: Bench, transport: FakeTransport, in_round: InRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport.answers = [in_round(1)]
    bench.run(transport, OK)
    moments: list[Path] = []

    def copy_the_disk(number: int) -> None:
        """What an agent finds that starts after a kill at this very step."""
        moments.append(bench.root / f"killed-{number}")
        shutil.copytree(bench.state, moments[-1] / "state", symlinks=True)

    transport.answers = [in_round(2)]
    with monkeypatch.context() as patch:
        Disk(bench.state, on_step=copy_the_disk).install(patch)
        bench.run(transport, OK)
    trained = set()
    for moment in moments:
        each = Bench(moment, bench.data)
        again = Insisting(transport.weights, [], task=in_round(2), attempt=1)
        each.run(again, OK)
        assert held(each)[2, 1] == "new\nt1\nt2\n", moment
        assert {result.task_id for result in again.delivered} == {"t2"}
        trained.add(len(each.requests))
        assert list(each.state.glob("work/*")) == []
    assert trained == {0, 1}
    assert len(moments) > 20


@pytest.mark.parametrize("times", [1, 4])
def test_on_a_full_disk_the_update_goes_first_and_the_peer_is_kept_later(
    bench: Bench, transport: FakeTransport, in_round: InRound, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    real, left = Peers.keep, times

    def full(peers: Peers, folder: Path) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise DiskError("peers cannot be kept: No space left on device")
        real(peers, folder)

    monkeypatch.setattr(Peers, "keep", full)
    transport.answers = [in_round(1), in_round(2)]
    bench.run(transport, OK)
    assert held(bench) == {(1, 1): "new\nt1\n", (2, 1): "new\nt1\nt2\n"}
    assert len(bench.requests) == 2
    assert [result.task_id for result in transport.delivered] == ["t1", "t2"]
    assert len(bench.said("peers cannot be kept yet")) == 1


def test_each_step_of_keeping_may_fail_and_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def left(root: Path) -> Path:
        folder = root / "left" / "job" / "00000001"
        folder.mkdir(parents=True)
        (folder / kept_name(1, "0" * 64)).write_bytes(b"peer")
        return root / "left"

    counting = Disk(tmp_path)
    with monkeypatch.context() as patch:
        (tmp_path / "0").mkdir()
        prepared = left(tmp_path / "0")
        counting.install(patch)
        Peers(tmp_path / "0").keep(prepared)
    for step in range(1, len(counting.names) + 1):
        root = tmp_path / str(step)
        root.mkdir()
        prepared = left(root)
        with monkeypatch.context() as patch:
            Disk(tmp_path, fails_from=step, code=errno.ENOSPC).install(patch)
            try:
                Peers(root).keep(prepared)
            except DiskError as error:
                assert "peers cannot be kept" in str(error)
        Peers(root).keep(prepared)
        assert (root / "peers" / "job" / "00000001" / kept_name(1, "0" * 64)).read_bytes() == b"peer"


@pytest.mark.parametrize(
    "failure", [{"do": "fail", "outcome": "diverged"}, {"do": "fail", "outcome": "error", "peers": True}]
)
def test_a_task_that_fails_with_its_peers_is_trained_with_new_ones(
    bench: Bench, transport: FakeTransport, in_round: InRound, failure: dict[str, Any]
) -> None:
    transport.answers = [in_round(1)]
    bench.run(transport, OK)
    transport.answers = [in_round(2)]
    bench.run(transport, OK, failure, OK)
    assert held(bench) == {(2, 1): "new\nt2\n"}
    (said,) = bench.said("all peers are deleted")
    assert "begins again with new ones" in said["reason"]
    assert [result.round for result in transport.delivered] == [1, 2]


def test_training_that_diverges_with_new_peers_is_told(
    bench: Bench, transport: FakeTransport, in_round: InRound
) -> None:
    transport.answers = [in_round(1)]
    bench.run(transport, {"do": "fail", "outcome": "diverged"})
    assert held(bench) == {}
    assert not bench.said("all peers are deleted")


def test_the_smaller_plan_of_a_device_with_less_memory_leaves_its_peer_as_it_is(
    bench: Bench, transport: FakeTransport, in_round: InRound
) -> None:
    transport.answers = [in_round(1)]
    bench.run(transport, OK)
    transport.answers = [in_round(2)]
    bench.available = 60 << 20
    bench.run(transport, OK)
    assert bench.plans()[-1].models == 1
    assert held(bench) == {(1, 1): "new\nt1\n"}
    transport.answers = [in_round(3)]
    bench.available = 400 << 20
    bench.run(transport, OK)
    assert held(bench)[3, 1] == "new\nt1\nt3\n"


def test_room_is_looked_for_for_every_model(bench: Bench, transport: FakeTransport, in_round: InRound) -> None:
    wanted = []

    def check(outbox: Outbox, wanted_bytes: int) -> None:
        wanted.append(wanted_bytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Outbox, "check_room", check)
        transport.answers = [in_round(1, weights_bytes=100 << 20)]
        bench.run(transport, OK)
    assert wanted[-1] == 200 << 20


def a_file(place: Path) -> None:
    place.write_bytes(b"x")


def a_link_to_itself(place: Path) -> None:
    place.symlink_to(place)


def a_dangling_link(place: Path) -> None:
    place.symlink_to(place.with_name("nowhere"))


def a_folder(place: Path) -> None:
    place.mkdir()
    (place / "of whom").write_bytes(b"x")


@pytest.mark.parametrize("made", [a_file, a_link_to_itself, a_dangling_link, a_folder])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_whatever_lies_where_a_peer_belongs_is_in_nobodys_way(
    bench: Bench, transport: FakeTransport, in_round: InRound, depth: int, made: Callable[[Path], None]
) -> None:
    transport.answers = [in_round(1), in_round(2)]
    bench.run(transport, OK)
    (peer,) = bench.state.glob("peers/*/00000002/*")
    place = Path(*peer.parts[: len(bench.state.parts) + depth])  # peers, the job, the round, or the file
    delete(place)
    made(place)
    transport.answers = [in_round(3), in_round(4)]
    bench.run(transport, OK)
    assert [result.round for result in transport.delivered] == [1, 2, 3, 4]
    assert sorted(held(bench)) == [(3, 1), (4, 1)]
    told = [line for line in bench.logs if "deleted" in line["event"]]
    assert any(str(line.get("file", line.get("folder"))).startswith(str(place)) for line in told)
    assert not bench.said("peers cannot be kept yet") and not bench.said("a task waits for the disk")


def test_a_peer_larger_than_the_model_is_not_even_read(
    bench: Bench, transport: FakeTransport, in_round: InRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport.answers = [in_round(1)]
    bench.run(transport, OK)
    (peer,) = bench.state.glob("peers/*/*/*")
    os.truncate(peer, 300 << 30)  # sparse
    monkeypatch.setattr("fedepth.kept_files.file_digest", lambda *_, **__: pytest.fail("it is read"))
    transport.answers = [in_round(2)]
    bench.run(transport, OK)
    assert held(bench) == {(2, 1): "new\nt2\n"}
    (said,) = bench.said("a peer is damaged; it is deleted")
    assert "more than the model" in said["problem"]
