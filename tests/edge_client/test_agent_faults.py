"""An agent whose disk fails or that is stopped at any step: nothing trained is lost, nothing is trained twice."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from edge_client.agent import LEAST_ROOM_BYTES
from edge_client.backoff import DISK_PAUSE_S
from edge_client.call_errors import BusyError, ServerError, UnreachableError
from edge_client.delivery import DELIVERY_TRIES
from edge_client.outbox import Entry, Outbox
from edge_client.task_run import DISK_WAITS
from edge_client.transport import Accepted, Answer, Refused, Rejected, RetryLater
from fedepth.errors import DiskError, FedepthError, TransportError
from fedepth.task import DeviceReport, Failure, Outcome, Result, Task
from tests.edge_client.bench import OK, Bench, FakeTransport, Insisting, MakeTask
from tests.edge_client.conftest import PICTURE
from tests.edge_client.faults import Disk

MakeResult = Callable[..., tuple[Result, Path]]
NO_ROOM = DiskError("outbox has 12.0 MiB free")


def start_until_done(bench: Bench, transport: FakeTransport) -> None:
    """As a service manager would: an agent that ends with a sentence is started again."""
    for _ in range(20):
        try:
            bench.run(transport, OK)
            return
        except FedepthError:
            continue
    raise AssertionError("the agent never came through")


@pytest.mark.parametrize("times", [1, 6])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
def test_a_disk_that_fails_at_any_step_costs_no_training(
    bench: Bench,
    transport: FakeTransport,
    make_task: MakeTask,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    times: int,
) -> None:
    counting = Disk(bench.root)
    with monkeypatch.context() as patch:
        counting.install(patch)
        bench.run(Insisting(transport.weights, [], task=make_task()), OK)
    # Every third step, so that a run takes seconds; the codes begin at different ones.
    for step in range(1 + code % 3, len(counting.names) + 1, 3):
        each = Bench(bench.root / f"{step}", bench.data)
        each.root.mkdir()
        insisting = Insisting(transport.weights, [], task=make_task())
        with monkeypatch.context() as patch:
            Disk(each.root, fails_from=step, times=times, code=code).install(patch)
            start_until_done(each, insisting)
        assert len(each.requests) == 1, counting.names[step - 1]
        (delivered,) = insisting.delivered
        each.run(insisting, OK)  # what was delivered and could not be deleted then goes once more, which is harmless
        assert set(insisting.delivered) == {delivered}
        assert Outbox(each.state).entries() == []


def test_a_stop_at_any_step_after_training_costs_no_training(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped_at(each: Bench, insisting: Insisting, stop: int) -> bool:
        """Runs an agent until the `stop`-th step after its training; whether there was one."""

        async def play() -> bool:
            agent = asyncio.ensure_future(each.agent(insisting, [OK]).run())
            loop, steps = asyncio.get_running_loop(), 0

            def on_step(number: int) -> None:
                nonlocal steps
                if ((each.root / "journal").exists() and list(each.state.glob("*/*/output/part-*"))) or steps:
                    steps += 1
                if steps == stop:
                    loop.call_soon_threadsafe(agent.cancel)

            with monkeypatch.context() as patch:
                Disk(each.root, on_step=on_step).install(patch)
                await asyncio.wait([agent])
            return agent.cancelled()

        with capture_logs():
            return asyncio.run(play())

    for stop in range(1, 40):
        each = Bench(bench.root / f"{stop}", bench.data)
        each.root.mkdir()
        insisting = Insisting(transport.weights, [], task=make_task())
        if not stopped_at(each, insisting, stop):
            break
        start_until_done(each, insisting)
        assert len(each.requests) == 1
        assert [result.task_id for result in insisting.delivered] in (["t1"], ["t1", "t1"])  # the same update
    assert 3 < stop < 39


def test_an_update_that_cannot_be_stored_waits_where_it_was_trained(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = Outbox.put, 20

    def full(box: Outbox, result: Result, parts: Path) -> Entry:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise NO_ROOM
        return real(box, result, parts)

    class Impatient(FakeTransport):
        async def report_progress(self, progress: Any) -> bool:
            await super().report_progress(progress)
            return progress.activity != "waiting for the disk"  # but whether it is late, only the delivery may tell

    monkeypatch.setattr(Outbox, "put", full)
    impatient = Impatient(transport.weights, [make_task()])
    bench.run(impatient, OK)
    assert len(bench.requests) == 1
    assert [result.task_id for result in impatient.delivered] == ["t1"]
    assert len(bench.said("the coordinator no longer waits for this task")) == 1
    said = bench.said("a trained update cannot be stored yet; it waits where it was trained")
    assert len(said) == 1 + 19 * DISK_PAUSE_S // 180  # at once, and every three minutes
    assert len(bench.said("the disk can be used again")) == 1


def test_a_stop_while_an_update_waits_for_room_loses_nothing_that_was_sealed(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport.answers = [make_task()]
    real = Path.rename

    def stuck(path: Path, target: Path) -> Path:
        if path.name == "output":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, target)

    async def play() -> None:
        agent = asyncio.ensure_future(bench.agent(transport, [OK]).run())
        while not bench.clock.pauses:
            await asyncio.sleep(0)
        agent.cancel()
        await asyncio.wait([agent])

    with monkeypatch.context() as patch, capture_logs():
        patch.setattr(Path, "rename", stuck)
        asyncio.run(play())
    bench.run(transport, OK)
    assert len(bench.requests) == 1
    assert [result.task_id for result in transport.delivered] == ["t1"]
    assert len(bench.said("a trained update was recovered")) == 1


def test_a_trainer_that_dies_after_its_last_act_has_trained(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    transport.answers = [make_task()]
    bench.run(transport, {"do": "die_trained"})
    assert len(bench.requests) == 1
    assert [result.task_id for result in transport.delivered] == ["t1"]
    assert bench.said("planning smaller from now on") == []


@pytest.mark.parametrize("end", ["killed", "stopped", "not wanted"])
def test_what_is_trained_to_its_end_is_delivered_though_the_agent_has_not_heard_of_it(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, end: str
) -> None:
    """The agent ends, or the task does, between the trainer's last act and the word of it."""
    result = bench.state / "work" / "t1-1" / "output" / "result.json"

    class Watching(FakeTransport):
        async def report_progress(self, progress: Any) -> bool:
            await super().report_progress(progress)
            return not (end == "not wanted" and result.exists())

    watching = Watching(transport.weights, [make_task()])

    async def play() -> None:
        agent = asyncio.ensure_future(bench.agent(watching, [{"do": "hang_trained"}]).run())
        while not result.exists() and not agent.done():
            await asyncio.sleep(0.01)
        if end == "killed":
            shutil.copytree(bench.state / "work", bench.root / "as-killed")
        if end != "not wanted":
            agent.cancel()
        await asyncio.wait([agent])
        if end == "killed":
            shutil.rmtree(bench.state / "work")
            (bench.root / "as-killed").rename(bench.state / "work")

    with pytest.MonkeyPatch.context() as patch, capture_logs():
        patch.setattr("edge_client.lease.BEAT_S", 0.01)
        asyncio.run(asyncio.wait_for(play(), 60))
    bench.run(watching, OK)
    assert len(bench.requests) == 1
    assert [result.task_id for result in watching.delivered] == ["t1"]
    assert list((bench.state / "work").iterdir()) == []


@pytest.mark.parametrize("where", ["fetching", "training"])
def test_a_task_waits_until_the_disk_takes_what_it_writes(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, where: str
) -> None:
    class Full(FakeTransport):
        async def fetch_weights(self, task: Task) -> Path:
            if where == "fetching" and len(bench.clock.pauses) < 3:
                raise DiskError("weights cannot be fetched and kept: No space left on device")
            return await super().fetch_weights(task)

    full = Full(transport.weights, [make_task()])
    bench.run(full, *([{"do": "disk"}] * 3 if where == "training" else []), OK)
    assert full.failures == []
    assert [result.task_id for result in full.delivered] == ["t1"]
    assert bench.clock.pauses == [DISK_PAUSE_S] * 3
    assert len(bench.said("a task waits for the disk")) == 1
    assert len(bench.said("the disk can be used again")) == 1
    assert "waiting for the disk" in [progress.activity for progress in full.progress]
    assert bench.said("planning smaller from now on") == []


def test_a_task_that_has_waited_long_for_the_disk_is_given_back_and_none_asked_for_until_there_is_room(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def check_room(box: Outbox, wanted_bytes: int) -> None:
        asked.append(wanted_bytes)
        if wanted_bytes > LEAST_ROOM_BYTES and len(asked) < 6:
            raise NO_ROOM

    monkeypatch.setattr(Outbox, "check_room", check_room)
    transport.answers = [make_task("t1"), make_task("t2")]
    needed = 5 * LEAST_ROOM_BYTES
    bench.run(transport, *[{"do": "disk", "bytes": needed}] * (DISK_WAITS + 1), OK)
    (failure,) = transport.failures
    assert (failure.task_id, failure.outcome, failure.message) == ("t1", Outcome.DECLINED, "said error")
    assert asked == [LEAST_ROOM_BYTES, *[needed] * 5, LEAST_ROOM_BYTES]
    assert len(bench.said("asking for no task: what is trained could not be stored")) == 1
    assert [result.task_id for result in transport.delivered] == ["t2"]


def test_no_task_is_asked_for_while_nothing_could_be_stored(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def check_room(box: Outbox, wanted_bytes: int) -> None:
        asked.append(wanted_bytes)
        if len(asked) <= 12:
            raise NO_ROOM

    monkeypatch.setattr(Outbox, "check_room", check_room)
    transport.answers = [replace(make_task(), weights_bytes=3 * LEAST_ROOM_BYTES)]
    bench.run(transport, OK)
    assert bench.clock.pauses[:12] == [DISK_PAUSE_S] * 12
    said = bench.said("asking for no task: what is trained could not be stored")
    assert [line["log_level"] for line in said] == ["error"] * 2  # at once, and after three minutes
    assert len(bench.said("the disk can be used again")) == 1
    assert transport.calls == ["next_task", "deliver", "next_task"]
    assert asked[-2:] == [LEAST_ROOM_BYTES, 3 * LEAST_ROOM_BYTES]  # the last model that is known


@pytest.mark.parametrize(
    "error",
    [
        BusyError("host:1: busy", 20.0),
        UnreachableError("host:1: UNAVAILABLE"),
        ServerError("host:1: UNKNOWN: OSError"),
        ServerError("host:1: ABORTED: begin again"),
    ],
)
def test_no_task_is_asked_for_while_an_update_waits(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, error: TransportError
) -> None:
    transport.answers = [make_task()]
    transport.deliveries = [error] * 30
    bench.run(transport, OK)
    assert transport.calls == ["next_task", *["deliver"] * 31, "next_task"]
    assert len(bench.requests) == 1
    if isinstance(error, BusyError):
        assert all(20.0 <= pause <= 30.0 for pause in bench.clock.pauses)
    assert len(bench.said("coordinator is back")) == 1


def test_errors_of_the_coordinator_with_one_update_do_not_hold_up_the_others(
    bench: Bench, transport: FakeTransport, make_result: MakeResult
) -> None:
    for task_id in ("odd", "fine"):
        Outbox(bench.state).put(*make_result(task_id, b"x"))
    transport.deliveries = [ServerError("host:1: INTERNAL")]
    bench.run(transport, OK)
    assert [result.task_id for result in transport.delivered] == ["fine", "odd"]


@dataclass
class Forgetful(FakeTransport):
    """Offers a task although its update waits: it was put into the outbox behind the agent's back."""

    put: Callable[[], Any] = lambda: None

    async def next_task(self, report: DeviceReport, wait_s: float) -> Answer:
        answer = await super().next_task(report, wait_s)
        if isinstance(answer, Task):
            self.put()
        return answer


@pytest.mark.parametrize("attempt", [1, 4])
def test_a_task_that_the_outbox_holds_is_delivered_and_not_trained_again(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, make_result: MakeResult, attempt: int
) -> None:
    kept = make_result("t1", b"x")
    forgetful = Forgetful(
        transport.weights,
        [replace(make_task(), attempt=attempt)],
        put=lambda: Outbox(bench.state).put(*kept),
    )
    bench.run(forgetful, OK)
    assert bench.requests == []
    assert [(result.task_id, result.attempt) for result in forgetful.delivered] == [("t1", 1)]
    (line,) = bench.said("this task is trained already; delivering its update instead of training again")
    assert (line["attempt"], line["trained_attempt"]) == (attempt, 1)


def test_a_refusal_of_what_was_trained_before_is_told_of_the_attempt_that_was_offered(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, make_result: MakeResult
) -> None:
    Outbox(bench.state).set_aside(Outbox(bench.state).put(*make_result("t1", b"x")), "no")
    transport.answers = [replace(make_task(), attempt=2)]
    transport.deliveries = [Refused("duplicate", "attempt 3 is recorded")]
    bench.run(transport, OK)
    assert bench.requests == []
    assert transport.failures == [
        Failure(
            "t1",
            2,
            "device",
            Outcome.ERROR,
            "the update of attempt 1 was refused (duplicate): attempt 3 is recorded",
        )
    ]
    assert Outbox(bench.state).entries() == []


def test_what_was_set_aside_gets_new_tries_when_its_task_comes_again(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, make_result: MakeResult
) -> None:
    Outbox(bench.state).set_aside(Outbox(bench.state).put(*make_result("t1", b"x")), "no")
    transport.answers = [make_task()]
    transport.deliveries = [TransportError("host:1: INVALID_ARGUMENT")] * (1 + DELIVERY_TRIES)
    bench.run(transport, OK)
    assert bench.requests == []
    assert transport.calls == ["next_task", *["deliver"] * (1 + DELIVERY_TRIES), "next_task"]
    assert [path.name for path in (bench.state / "undelivered").iterdir()] == ["t1-1.0"]
    assert [failure.outcome for failure in transport.failures] == [Outcome.ERROR]


@pytest.mark.parametrize("outcome", ["diverged", "model", "data"])
def test_what_failed_for_certain_is_not_tried_again_in_the_same_attempt(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, outcome: str
) -> None:
    task = make_task()
    transport.answers = [task, task, task, replace(task, attempt=2)]
    bench.run(transport, {"do": "fail", "outcome": outcome}, OK)
    assert [request["task"]["attempt"] for request in bench.requests] == [1, 2]
    first = Failure("t1", 1, "device", Outcome(outcome), f"said {outcome}", 7, 5)
    assert transport.failures == [first] * 3
    assert bench.clock.pauses == [10.0, 20.0, 40.0]
    assert len(transport.delivered) == 1


def test_training_that_diverged_costs_no_budget_and_no_trainer(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    transport.answers = [make_task("t1"), make_task("t2")]
    bench.run(transport, {"do": "fail", "outcome": "diverged"}, OK)
    first, second = (request["budget"]["budget_bytes"] for request in bench.requests)
    assert first == second
    assert len({request["pid"] for request in bench.requests}) == 1
    assert bench.said("planning smaller from now on") == []


def test_a_trainer_that_writes_nonsense_costs_no_budget(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    transport.answers = [make_task()]
    bench.run(transport, {"do": "babble"}, OK)
    assert bench.said("planning smaller from now on") == []
    assert len(transport.delivered) == 1


def test_why_there_is_nothing_to_do_is_said_when_it_changes_and_every_reminder(
    bench: Bench, transport: FakeTransport
) -> None:
    transport.answers = [
        *[RetryLater(30.0, f"busy: the coordinator's disk has {free} MB free") for free in range(13)],
        *[RetryLater(30.0, "waiting for 1 more of 2 devices")] * 3,
        RetryLater(30.0),
        RetryLater(30.0, "waiting for 1 more of 2 devices"),
    ]
    bench.run(transport, OK)
    assert [line["reason"] for line in bench.said("nothing to do now")] == [
        "busy: the coordinator's disk has 0 MB free",
        "busy: the coordinator's disk has 6 MB free",
        "busy: the coordinator's disk has 12 MB free",
        "waiting for 1 more of 2 devices",
    ]


def test_a_rejected_device_says_so_once_and_looks_at_its_data_again(bench: Bench, transport: FakeTransport) -> None:
    class Adding(FakeTransport):
        async def next_task(self, report: DeviceReport, wait_s: float) -> Answer:
            if len(self.reports) == 2:
                (bench.data / "train/a/new.png").write_bytes(PICTURE)
            return await super().next_task(report, wait_s)

    adding = Adding(transport.weights, [Rejected("too few samples", 30.0)] * 5)
    bench.run(adding, OK)
    assert len(bench.said("the coordinator rejected this device")) == 1
    (line,) = bench.said("the training samples have changed; asking again")
    assert (line["before"], line["now"]) == (6, 7)
    assert [report.sample_count for report in adding.reports] == [6, 6, 6, 7, 7, 7]


def test_a_clone_is_told_what_to_do(bench: Bench, transport: FakeTransport) -> None:
    transport.answers = [Rejected("another agent has this device id", 30.0, "clone"), Rejected("no data", 30.0)]
    bench.run(transport, OK)
    clone, other = bench.said("the coordinator rejected this device")
    assert clone["remedy"] == (
        f"if this device is a copy of another, delete {bench.state / 'device-id'} to join as a new device"
    )
    assert "remedy" not in other


def test_every_start_draws_an_instance_and_says_where_it_runs(bench: Bench, transport: FakeTransport) -> None:
    transport.answers = [RetryLater(1.0)]
    bench.run(transport, OK)
    bench.run(transport, OK)
    first, again, other = (report.instance for report in transport.reports)
    assert first == again != other
    assert len(first) == 16
    assert {report.hostname for report in transport.reports} == {os.uname().nodename}


def test_an_update_whose_bytes_have_changed_on_this_disk_holds_up_nothing(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    """The coordinator gets another sha256 than it was told, and asks for the part again, each time."""

    class Checking(Insisting):
        async def deliver(self, entry: Entry) -> Accepted | Refused:
            self.calls.append("deliver")
            [part] = entry.result.parts
            if self.calls.count("deliver") == 1:  # after the trainer, and before anything was sent
                path = entry.part_path(part)
                path.write_bytes(path.read_bytes()[::-1])
            if hashlib.sha256(entry.part_path(part).read_bytes()).hexdigest() != part.digest:
                raise ServerError("host:1: ABORTED: part 0: sha256 is another one; send it again")
            self.delivered.append(entry.result)
            return Accepted(entry.result.round)

    checking = Checking(transport.weights, [], task=make_task())
    bench.run(checking, OK, OK)
    assert checking.calls.count("deliver") == 2  # not again what is damaged, but what was trained anew
    assert len(bench.requests) == 2
    assert [result.task_id for result in checking.delivered] == ["t1"]
    assert len(bench.said("a kept update is damaged and was moved aside")) == 1
    assert len(list((bench.state / "damaged").iterdir())) == 1
