"""The agent's loop against a fake coordinator and a real child process that speaks the trainer's protocol."""

import asyncio
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from edge_client.agent import AFTER_FAILURE_S, FINISHED_POLL_S, Agent, Surroundings
from edge_client.call_errors import UnreachableError
from edge_client.memory.probe import Memory
from edge_client.outbox import Outbox
from edge_client.transport import Accepted, Answer, Finished, Refused, Rejected, RetryLater
from fedepth import child
from fedepth.budget import Budget, MemoryLimit
from fedepth.errors import ChildError, DataError, ProtocolError, TransportError
from fedepth.estimate.peak import needed_bytes
from fedepth.sizes import format_size
from fedepth.task import DeviceReport, Failure, Outcome, Result, Task
from tests.edge_client.bench import (
    AWAY,
    MIB,
    OK,
    START,
    Bench,
    FakeTransport,
    MakeTask,
    PlanFor,
)
from tests.edge_client.conftest import PICTURE, checked_here

DIE = {"do": "die"}


def test_a_task_is_trained_and_delivered(bench: Bench, transport: FakeTransport, make_task: MakeTask) -> None:
    transport.answers = [make_task()]
    bench.run(transport, OK)
    assert transport.calls == ["next_task", "deliver", "next_task"]
    assert [result.task_id for result in transport.delivered] == ["t1"]
    assert transport.failures == []
    assert transport.closed
    (request,) = bench.requests
    assert request["do"] == "train"
    assert msgspec.convert(request["task"], Task) == make_task()
    assert msgspec.convert(request["budget"], Budget).budget_bytes == 390 * MIB
    assert bench.plans() == [make_task().plan]  # enough is free, so the coordinator's plan holds
    assert request["weights"] == str(transport.weights)
    assert Outbox(bench.state).entries() == []
    assert not any((bench.state / "work").glob("*"))
    activities = [progress.activity for progress in transport.progress]
    assert activities[0] == "downloading"
    assert "uploading" in activities


@pytest.mark.parametrize("parts", [[], [UnreachableError("host:1: away")], [TransportError("host:1: INTERNAL")]])
def test_a_finished_block_goes_up_before_the_task_is_trained(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, parts: list[Exception]
) -> None:
    transport.answers = [make_task()]
    transport.parts = parts
    failed = bool(parts)
    bench.run(transport, {"do": "block", "held": 0})
    assert transport.calls == ["next_task", "send_part", "deliver", "next_task"]  # what failed goes with the update
    assert len(transport.delivered) == 1
    assert len(bench.said("a finished block is with the coordinator")) == (not failed)
    assert len(bench.said("a finished block waits for the whole update")) == failed


def test_the_first_report_counts_the_trainers_start_and_the_data(bench: Bench, transport: FakeTransport) -> None:
    bench.run(transport, OK)
    (report,) = transport.reports
    assert report.budget.start_bytes == START
    assert report.budget.budget_bytes == 390 * MIB
    assert (report.sample_count, report.class_counts) == (6, (4, 2))
    started = len(bench.said("trainer started"))
    bench.run(transport, OK)
    assert started == 1
    assert len(bench.said("trainer started")) == 1  # the second agent remembers what the start costs


def test_an_update_that_waits_goes_first_after_a_restart(
    bench: Bench, transport: FakeTransport, make_result: Callable[..., tuple[Result, Path]]
) -> None:
    Outbox(bench.state).put(*make_result("old", b"x"))
    transport.deliveries = [AWAY]
    bench.run(transport, OK)
    assert transport.calls == ["deliver", "deliver", "next_task"]
    assert [result.task_id for result in transport.delivered] == ["old"]
    assert len(bench.said("coordinator is back")) == 1


def test_a_trained_update_is_kept_while_the_coordinator_is_away(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    transport.answers = [make_task()]
    transport.deliveries = [AWAY] * 3
    bench.run(transport, OK)
    assert transport.calls == ["next_task", *["deliver"] * 4, "next_task"]
    assert len(bench.requests) == 1  # trained once


def test_an_update_that_cannot_be_sent_does_not_hold_up_the_device(
    bench: Bench, transport: FakeTransport, make_result: Callable[..., tuple[Result, Path]]
) -> None:
    for task_id in ("stuck", "fine"):
        Outbox(bench.state).put(*make_result(task_id, b"x"))
    wrong = TransportError("host:1: INVALID_ARGUMENT: no")
    transport.deliveries = [wrong, Accepted(3), wrong, wrong]
    bench.run(transport, OK)
    # The other goes in between; no task is asked for before it is settled, and not for ever.
    assert transport.calls == ["deliver"] * 4 + ["next_task"]
    assert [result.task_id for result in transport.delivered] == ["fine"]
    assert Outbox(bench.state).entries() == []
    aside = bench.state / "undelivered" / "stuck-1.0"
    assert (aside / "reason.txt").read_text() == "host:1: INVALID_ARGUMENT: no\n"
    (line,) = bench.said("an update cannot be delivered; it is set aside")
    assert (line["tries"], line["moved_to"]) == (3, str(aside))
    (failure,) = transport.failures
    assert (failure.task_id, failure.attempt, failure.outcome) == ("stuck", 1, Outcome.ERROR)
    assert failure.message == "the update is trained, but cannot be delivered: host:1: INVALID_ARGUMENT: no"


def test_a_refused_update_is_dropped_with_its_reason(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    transport.answers = [make_task()]
    transport.deliveries = [Refused("late", "round 3 is closed")]
    bench.run(transport, OK)
    (line,) = bench.said("update refused; it is dropped")
    assert (line["log_level"], line["reason"], line["message"]) == ("error", "late", "round 3 is closed")
    assert Outbox(bench.state).entries() == []


def test_unusable_data_is_reported_and_the_agent_stays(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    task = make_task()
    transport.answers = [replace(task, model=replace(task.model, classes=("a",))), RetryLater(7.0)]
    bench.run(transport, OK)
    assert [failure.outcome for failure in transport.failures] == [Outcome.DATA]
    assert bench.clock.pauses == [AFTER_FAILURE_S, 7.0]
    assert bench.requests == []


def test_the_pause_doubles_while_tasks_fail_in_the_same_words(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    def with_classes(attempt: int, *classes: str) -> Task:
        return replace(make_task(), attempt=attempt, model=replace(make_task().model, classes=classes))

    unusable = [with_classes(attempt, "a") for attempt in (1, 2, 3)]
    transport.answers = [*unusable, with_classes(4, "b"), make_task("t2"), with_classes(5, "b")]
    bench.run(transport, OK)
    assert [failure.outcome for failure in transport.failures] == [Outcome.DATA] * 5
    pauses = [AFTER_FAILURE_S * times for times in (1, 2, 4, 1, 1)]  # the task that was trained starts it anew
    assert bench.clock.pauses == pauses
    assert [line["times"] for line in bench.said("the same failure again")] == [2, 3]


def test_missing_data_at_the_start_is_an_error(bench: Bench, transport: FakeTransport) -> None:
    shutil.rmtree(bench.data)
    with pytest.raises(DataError):
        bench.run(transport, OK)
    assert transport.closed


def test_less_memory_means_a_smaller_plan(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, plan_for: PlanFor
) -> None:
    small = make_task().plan.predicted_peak_bytes // 2
    bench.available = small + START
    transport.answers = [make_task()]
    bench.run(transport, OK)
    assert bench.plans() == [plan_for(small)]
    assert len(bench.plans()[0].stages) > 1
    assert transport.delivered[0].plan == plan_for(small)


@pytest.mark.parametrize("change", ["new", "lost"])
def test_data_that_changes_after_it_was_reported_is_trained_and_then_counted(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, change: str
) -> None:
    def more_or_less() -> None:
        picture = bench.data / "train/a/new.png"
        if change == "new":
            picture.write_bytes(PICTURE)
        else:
            next(iter(sorted((bench.data / "train/a").iterdir()))).unlink()

    class Changing(FakeTransport):
        async def next_task(self, report: DeviceReport, wait_s: float) -> Answer:
            if not self.reports:
                more_or_less()
            return await super().next_task(report, wait_s)

    changing = Changing(transport.weights, [make_task()])
    bench.run(changing, OK)
    (request,) = bench.requests
    assert request["most_samples"] == 6  # the coordinator takes no update of more than it was told of
    # Fewer samples need a smaller cache, and perhaps another plan.
    assert len(bench.said("planned again on the device")) == (change == "lost")
    assert [report.sample_count for report in changing.reports] == [6, 7 if change == "new" else 5]


def test_data_that_cannot_be_counted_any_more_is_told(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    class Losing(FakeTransport):
        async def fetch_weights(self, task: Task) -> Path:
            shutil.rmtree(bench.data)
            return await super().fetch_weights(task)

    bench.run(Losing(transport.weights, [make_task()]), OK)
    (line,) = bench.said("the training samples cannot be counted; using the last count")
    assert str(bench.data) in line["error"]


def test_what_does_not_fit_is_declined_with_numbers(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    bench.available = START + MIB
    transport.answers = [make_task()]
    bench.run(transport, OK)
    (failure,) = transport.failures
    assert failure.outcome is Outcome.DECLINED
    assert failure.budget_bytes == MIB
    needed = format_size(failure.needed_bytes, round_up=True)
    assert f"the smallest plan needs {needed}, but only 1.0 MiB is free" in failure.message


def test_over_budget_means_a_plan_that_is_smaller_by_the_miss(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, plan_for: PlanFor
) -> None:
    transport.answers = [make_task()]
    bench.run(transport, {"do": "over", "miss": 6 * MIB}, {"do": "over", "miss": 0}, OK)
    first, second, third = bench.plans()
    assert second == plan_for(needed_bytes(first.predicted_peak_bytes) - 6 * MIB)
    needed = needed_bytes(second.predicted_peak_bytes)
    # Nobody can tell by how much: a twentieth less, and twice that the second time.
    assert third == plan_for(needed - int(needed * 0.1))
    assert len(bench.said("a stage went over its budget")) == 2
    budgets = {request["budget"]["budget_bytes"] for request in bench.requests}
    assert budgets == {390 * MIB}  # what is free has not changed
    assert len(transport.delivered) == 1


def test_a_plan_that_met_the_cap_on_its_heap_releases_freed_pages_from_then_on(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    transport.answers = [make_task("t1"), make_task("t2")]
    bench.run(transport, {"do": "over", "miss": 0, "capped": True}, OK, OK)
    first, *others = bench.plans()
    assert others == [first, first]
    assert [request["release_freed"] for request in bench.requests] == [False, True, True]
    assert len(bench.said("a stage met the cap on its heap; trying the same plan, releasing freed pages at once")) == 1
    assert len(transport.delivered) == 2


def test_a_death_in_the_rehearsal_is_a_plan_that_needs_too_much(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, plan_for: PlanFor
) -> None:
    transport.answers = [make_task()]
    bench.run(transport, {"do": "die_rehearsing"}, OK)
    first, second = bench.plans()
    needed = needed_bytes(first.predicted_peak_bytes)
    assert second == plan_for(needed - int(needed * 0.05))  # nobody could tell by how much
    assert bench.said("planning smaller from now on") == []  # it was this plan, not the device
    assert len(transport.delivered) == 1


def test_a_trainer_that_hangs_is_replaced_and_its_plan_stays(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a rehearsal, where a death would mean that the plan needs too much."""
    monkeypatch.setattr(child, "HANG_S", 0.5)
    monkeypatch.setattr(child, "IDLE_SHARE", 0.1)  # a start of Python is a large part of so short a time
    transport.answers = [make_task("t1"), make_task("t2")]
    bench.run(transport, {"do": "hang_rehearsing"}, OK, {"do": "hang"}, OK)
    first, *others = bench.plans()
    assert others == [first] * 3
    assert len(bench.said("the trainer is ended")) == 2
    assert len(transport.delivered) == 2


def test_after_four_smaller_plans_the_device_gives_up(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    transport.answers = [make_task()]
    bench.run(transport, {"do": "over", "miss": 1})
    assert len(bench.requests) == 5
    assert [failure.outcome for failure in transport.failures] == [Outcome.OVER_BUDGET]


def test_when_no_smaller_plan_is_left_it_is_over_budget_with_numbers(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    transport.answers = [make_task()]
    bench.run(transport, {"do": "over", "miss": 300 * MIB})
    (failure,) = transport.failures
    assert (failure.outcome, failure.budget_bytes) == (Outcome.OVER_BUDGET, 0)
    assert failure.needed_bytes > 0
    _, smallest = bench.plans()  # tried before giving up, though the miss was larger than all that it saves
    assert needed_bytes(smallest.predicted_peak_bytes) <= failure.needed_bytes


def test_what_the_trainer_says_of_its_failure_is_passed_on(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    transport.answers = [make_task()]
    bench.run(transport, {"do": "fail", "outcome": "error"})
    assert transport.failures == [Failure("t1", 1, "device", Outcome.ERROR, "said error", 7, 5)]


def test_after_a_death_the_device_plans_smaller_and_recovers(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    transport.answers = [make_task()]
    bench.run(transport, DIE, OK)
    first, second = (request["budget"]["budget_bytes"] for request in bench.requests)
    assert (first, second) == (390 * MIB, int(390 * MIB * 0.8))
    assert bench.requests[0]["pid"] != bench.requests[1]["pid"]
    assert len(transport.delivered) == 1
    after = transport.reports[-1].budget.budget_bytes
    assert after == int(390 * MIB * 0.84)  # one success makes up for a fifth of it
    bench.run(transport, OK)
    assert transport.reports[-1].budget.budget_bytes == after  # remembered over the restart


@pytest.mark.parametrize("death", [DIE, {"do": "babble"}])
def test_after_two_deaths_the_task_is_given_back_and_the_agent_lives(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, death: dict[str, str]
) -> None:
    transport.answers = [make_task("t1"), make_task("t2")]
    bench.run(transport, death, death, OK)
    assert [(failure.task_id, failure.outcome) for failure in transport.failures] == [("t1", Outcome.TRAINER_DIED)]
    assert ("signal 11" in transport.failures[0].message) == (death is DIE)
    assert [result.task_id for result in transport.delivered] == ["t2"]


def test_a_trainer_that_cannot_start_at_all_ends_the_agent(bench: Bench, transport: FakeTransport) -> None:
    agent = Agent(
        bench.config(),
        "device",
        transport,
        surroundings=Surroundings(
            trainer_argv=[sys.executable, "-c", "raise SystemExit(3)"], check_files=checked_here, clock=bench.clock
        ),
    )
    with pytest.raises(ChildError, match="ended with status 3"):
        asyncio.run(agent.run())


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_task_that_nobody_wants_is_stopped(bench: Bench, transport: FakeTransport, make_task: MakeTask) -> None:
    transport.answers = [make_task("t1"), make_task("t2")]
    transport.unwanted_in_training = "t1"
    bench.run(transport, {"do": "hang"}, OK)  # without an end, so that only being stopped can end it
    assert [request["task"]["task_id"] for request in bench.requests] == ["t1", "t2"]
    assert not any(alive(request["pid"]) for request in bench.requests)
    assert [result.task_id for result in transport.delivered] == ["t2"]
    assert transport.failures == []
    assert len(bench.said("the coordinator no longer waits for this task")) == 1


def test_a_measurement_in_mid_task_counts_what_the_trainer_holds_as_free(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    bench.available = 300 * MIB

    def memory() -> Memory:
        return Memory(1000 * MIB, (MemoryLimit("test", bench.available, 900 * MIB),))

    bench.memory = memory  # type: ignore[method-assign]
    transport.answers = [make_task(), make_task("t2")]
    scene = {"do": "measure", "held": 50 * MIB, "baseline": 90 * MIB, "baseline_anonymous": 70 * MIB}
    bench.run(transport, scene, scene)
    answer = json.loads((bench.root / "journal.answers").read_text().splitlines()[0])
    budget = msgspec.convert(answer["budget"], Budget)
    # 300 free, 50 held in training, 70 by the trainer itself, less the 90 that it costs with this model's modules.
    assert budget.available_bytes == 420 * MIB
    assert budget.budget_bytes == 330 * MIB
    # While this trainer lingers, reports count with them too; what a trainer's start costs is another figure.
    assert [report.budget.start_bytes for report in transport.reports] == [START, 90 * MIB, 90 * MIB]
    transport.answers = [make_task("t3")]
    bench.run(transport, OK)
    assert transport.reports[-2].budget.start_bytes == START


def test_weights_are_fetched_until_they_come(bench: Bench, transport: FakeTransport, make_task: MakeTask) -> None:
    transport.answers = [make_task()]
    transport.fetches = [AWAY, AWAY, ProtocolError("sha256 is")]
    bench.run(transport, OK)
    assert len(transport.delivered) == 1
    assert len(bench.said("coordinator is back")) == 1


def test_weights_that_always_come_damaged_end_the_task(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    transport.answers = [make_task()]
    transport.fetches = [ProtocolError("sha256 is")] * 3
    bench.run(transport, OK)
    assert [failure.outcome for failure in transport.failures] == [Outcome.ERROR]


def test_a_trainer_is_used_again_for_the_next_task(bench: Bench, transport: FakeTransport, make_task: MakeTask) -> None:
    transport.answers = [make_task("t1"), make_task("t2")]
    bench.run(transport, OK)
    assert len({request["pid"] for request in bench.requests}) == 1


def test_the_job_is_polled_after_its_end_and_the_agent_can_be_stopped(bench: Bench, transport: FakeTransport) -> None:
    transport.answers = [Rejected("too old", 5.0), Finished("job", 4), Finished("job", 4)]

    async def play() -> None:
        agent = asyncio.ensure_future(bench.agent(transport, [OK], stay=True).run())
        while len(bench.clock.pauses) < 4:
            await asyncio.sleep(0)
        agent.cancel()
        await asyncio.wait([agent])
        assert agent.cancelled()

    with capture_logs() as logs:
        asyncio.run(play())
    assert bench.clock.pauses[:4] == [5.0, FINISHED_POLL_S, FINISHED_POLL_S, FINISHED_POLL_S]
    assert len([line for line in logs if line["event"] == "job finished"]) == 1
    assert transport.closed
