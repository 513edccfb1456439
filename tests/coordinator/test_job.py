"""A job whose storage, log or model fails: nothing recorded is forgotten, nothing is told before it is so."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from fedepth_wire.v1.federation_pb2 import Chunk

from coordinator import admission, closing
from coordinator.job import Job
from coordinator.store.records import Store
from coordinator.uploads import PartHeader
from fedepth.errors import ChildError, JobError, StateError, UnavailableError, UpdateError
from fedepth.rounds.machine import Phase
from fedepth.task import Failure, Outcome, Result, Task

PART = b"trained tensors"


class Rig:
    """A job that runs, and devices that call it without a network."""

    def __init__(self, job: Job, kit: Any, models: Any, running: asyncio.Task[None]) -> None:
        self.job = job
        self.kit = kit
        self.models = models
        self.running = running

    async def ask(self, device: str, **changes: Any) -> Task:
        report = replace(self.kit.report(device), **changes)
        assert await self.job.fleet.see(report, "ipv4:10.0.0.7:1") is None
        task = await (await self.job.start_waiting(report, await self.job.plan_for(report)))
        assert task is not None
        return task

    async def upload(self, task: Task, device: str) -> None:
        header = PartHeader(task.task_id, task.attempt, device, 0, len(PART), self.kit.sha256(PART))

        async def chunks() -> AsyncIterator[Chunk]:
            yield Chunk(offset=0, data=PART)

        async def acknowledge(held: int) -> None:
            assert held == 0

        await self.job.uploads.receive(header, chunks(), acknowledge)

    async def commit(self, task: Task, device: str) -> int:
        record = self.job.store.task(task.task_id)
        result = self.kit.result(record, {0: PART}, device_id=device, attempt=task.attempt)
        return await self.job.commit(result)

    async def deliver(self, task: Task, device: str) -> None:
        await self.upload(task, device)
        assert await self.commit(task, device) == task.round

    async def round(self) -> None:
        """Both devices train a round."""
        first, second = await asyncio.gather(self.ask("a"), self.ask("b"))
        await self.deliver(first, "a")
        await self.deliver(second, "b")

    async def reach(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert not self.running.done(), self.running.result()
            await asyncio.sleep(0.01)


Scene = Callable[[Rig], Awaitable[None]]
Play = Callable[..., None]


@pytest.fixture
def play(kit: Any, run_job: Any) -> Play:
    """Runs a scene against a job with these [job] settings; keeps its state for the next one."""

    def run(scene: Scene, **options: Any) -> None:
        async def main() -> None:
            async with run_job(**options) as running:
                await asyncio.wait_for(scene(Rig(running.job, kit, running.models, running.task)), 30)

        asyncio.run(main())

    return run


def fails(times: int, then: Callable[..., Any]) -> Callable[..., Any]:
    """A function that finds the disk full so many times, and then works."""
    left = [times]

    def function(*args: Any, **kwargs: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise UnavailableError("the disk is full")
        return then(*args, **kwargs)

    return function


def test_a_task_that_cannot_be_recorded_is_not_given_until_it_can(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(rig: Rig) -> None:
        monkeypatch.setattr(rig.job.store, "record_step", fails(5, rig.job.store.record_step))
        first, second = await asyncio.gather(rig.ask("a"), rig.ask("b"))
        assert {task.task_id for task in rig.job.store.tasks_of(1)} == {first.task_id, second.task_id}
        assert (first.attempt, second.attempt) == (1, 1)

    play(scene)


@pytest.mark.parametrize("step", ["seal_weights", "record_round", "updates_of", "weights_of", "prune", "kept_rounds"])
def test_a_round_closes_whatever_failed_on_the_way(play: Play, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    async def scene(rig: Rig) -> None:
        await rig.job.weights.make_up()
        monkeypatch.setattr(rig.job.store, step, fails(3, getattr(rig.job.store, step)))
        await rig.round()
        await rig.reach(rig.job.finished.is_set)
        assert [record.round for record in rig.job.store.rounds()] == [0, 1]

    play(scene)


def test_what_cannot_be_deleted_holds_up_nothing(
    play: Play, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bucket may take files and forbid that they are deleted."""

    async def scene(rig: Rig) -> None:
        monkeypatch.setattr(rig.job.store.files, "remove_all", fails(10**9, rig.job.store.files.remove_all))
        for number in range(4):
            await rig.round()
            await rig.reach(lambda number=number: rig.job.weights.record.round > number)
        await rig.reach(rig.job.finished.is_set)
        assert rig.job.store.summary().export_path
        rig.job._course.tell_trouble(UnavailableError("the database is away"))  # is told beside it

    play(scene, rounds=4, retention={"keep_last": 1})
    said = capsys.readouterr().out
    assert "what the job no longer keeps cannot be deleted now, which is tried again: the disk is full" in said
    assert "the job cannot continue now, and tries again: the database is away" in said


def test_free_pages_are_returned_with_every_round(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    returned: list[int] = []

    async def scene(rig: Rig) -> None:
        monkeypatch.setattr(closing, "return_free_pages", lambda: returned.append(len(rig.job.store.rounds())))
        for _ in range(2):
            await rig.round()
        await rig.reach(rig.job.finished.is_set)

    play(scene, rounds=2)
    assert returned == [2, 3]  # when the round is in the record, beside the one before all


def test_a_job_of_many_rounds_remembers_the_uploads_of_none(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        uploads = rig.job.uploads
        for _ in range(3):
            first, second = await asyncio.gather(rig.ask("a"), rig.ask("b"))
            await rig.deliver(first, "a")
            assert uploads._locks
            await rig.deliver(second, "b")
            await rig.reach(lambda: not (uploads._locks or uploads._scales or uploads._growing))

    play(scene, rounds=3)


def test_an_update_counts_once_it_is_recorded_though_the_word_of_it_was_lost(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database had it, and the connection broke before it could say so."""

    async def scene(rig: Rig) -> None:
        first, second = await asyncio.gather(rig.ask("a"), rig.ask("b"))
        await rig.upload(first, "a")
        record = rig.job.store.record_update

        def records_and_breaks(*args: Any) -> None:
            record(*args)
            raise UnavailableError("the connection is broken")

        with monkeypatch.context() as patched:
            patched.setattr(rig.job.store, "record_update", records_and_breaks)
            with pytest.raises(UnavailableError):
                await rig.commit(first, "a")
        await rig.reach(lambda: not rig.job.accepts(first.task_id))
        assert await rig.commit(first, "a") == 1  # asked again, as the device does
        await rig.deliver(second, "b")
        await rig.reach(rig.job.finished.is_set)
        assert rig.job.store.rounds()[1].devices == 2

    play(scene)


@pytest.mark.parametrize("refused", [False, True])
def test_a_device_that_goes_away_and_asks_again_joins_the_admission_of_its_update(
    play: Play, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    entered, go_on, admitted = threading.Event(), threading.Event(), []

    def check_update(paths: Any, layout: Any, result: Result) -> None:
        admitted.append(result.task_id)
        entered.set()
        assert go_on.wait(20)
        if refused:
            raise UpdateError("shape", "another shape")

    async def scene(rig: Rig) -> None:
        first, _ = await asyncio.gather(rig.ask("a"), rig.ask("b"))
        await rig.upload(first, "a")
        for _ in range(3):
            gone = asyncio.ensure_future(rig.commit(first, "a"))
            await asyncio.to_thread(entered.wait)
            gone.cancel()
            await asyncio.wait({gone})
        record = rig.job.store.task(first.task_id)
        other = asyncio.ensure_future(rig.job.commit(rig.kit.result(record, {0: b"another"})))
        again = asyncio.ensure_future(rig.commit(first, "a"))
        await asyncio.wait({other, again}, timeout=0.01)
        go_on.set()
        answers = await asyncio.gather(other, again, return_exceptions=True)
        reasons = [answer.reason if isinstance(answer, UpdateError) else answer for answer in answers]
        assert reasons == (["late", "shape"] if refused else ["duplicate", 1])
        assert admitted == [first.task_id]

    monkeypatch.setattr(admission, "check_update", check_update)
    play(scene)


def test_an_update_whose_device_goes_away_is_recorded_before_the_job_ends(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def check_update(paths: Any, layout: Any, result: Result) -> None:
        entered.set()
        assert go_on.wait(20)

    async def before(rig: Rig) -> None:
        first, _ = await asyncio.gather(rig.ask("a"), rig.ask("b"))
        await rig.upload(first, "a")
        gone = asyncio.ensure_future(rig.commit(first, "a"))
        await asyncio.to_thread(entered.wait)
        gone.cancel()
        asyncio.get_running_loop().call_later(0.01, go_on.set)

    async def after(rig: Rig) -> None:
        assert len(rig.job.store.updates_of(1)) == 1

    monkeypatch.setattr(admission, "check_update", check_update)
    play(before)
    play(after)


def test_a_log_that_cannot_be_written_costs_nothing(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """The updates are recorded, whatever becomes of the lines that tell of them."""

    class Broken:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    async def scene(rig: Rig) -> None:
        monkeypatch.setattr("sys.stderr", Broken())
        await rig.round()
        await rig.reach(rig.job.finished.is_set)
        assert [task.status for task in rig.job.store.tasks_of(1)] == ["accepted", "accepted"]
        assert all(task.attempt == 1 for task in rig.job.store.tasks_of(1))

    import structlog

    from coordinator.observe.logs import renderer
    from fedepth.logs import configure_logs

    configured = structlog.get_config()
    configure_logs(renderer(json_lines=True))
    try:
        play(scene)
    finally:
        structlog.configure(**configured)


def test_a_model_that_gives_no_finite_loss_is_not_published(play: Play, kit: Any) -> None:
    models = kit.models(losses=[None, 0.5])

    async def scene(rig: Rig) -> None:
        await rig.round()
        await rig.reach(lambda: rig.job.state.round == 2)
        start, first = rig.job.store.rounds()
        assert (first.published, first.digest) == (False, start.digest)
        assert "not a finite number" in first.note
        assert first.aside_digest == kit.sha256(b"initial weights|trained tensors|trained tensors")
        assert rig.job.weights.record.digest == start.digest
        again, _ = await asyncio.gather(rig.ask("a"), rig.ask("b"))
        assert again.weights_digest == start.digest  # the job goes on from the round before

    play(scene, models=models, rounds=3)


def test_rounds_that_are_not_published_again_and_again_pause_the_job(
    play: Play, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        "coordinator.observe.events.Events.send", lambda self, event, **more: sent.append((event, more))
    )

    def reasons() -> list[str]:
        return [fields["reason"] for event, fields in sent if event == "paused"]

    async def scene(rig: Rig) -> None:
        for number in (1, 2, 3):
            await rig.round()
            await rig.reach(lambda number=number: rig.job.weights.record.round == number)
        await rig.reach(lambda: rig.job.state.phase is Phase.PAUSED)
        assert "the last 3 rounds, up to round 3, were not published" in rig.job.why_wait()
        state = rig.job.store.directory
        assert f"fedepth-coordinator rollback --state {state} --round 0" in (await rig.job.status())["message"]
        assert "learning_rate" in (await rig.job.status())["message"]

        await rig.reach(lambda: reasons() == [rig.job.state.why])

    async def later(rig: Rig) -> None:
        assert rig.job.state.phase is Phase.PAUSED
        await rig.reach(lambda: reasons() == 2 * [rig.job.state.why])  # once more at the start
        with monkeypatch.context() as patch:
            patch.setattr("coordinator.course.REMIND_OF_PAUSE_S", 0.0)
            await rig.reach(lambda: len(reasons()) > 3)
        rig.job.store.rollback(0)

    async def rolled_back(rig: Rig) -> None:
        await rig.round()
        await rig.reach(lambda: rig.job.weights.record.round == 1)
        assert rig.job.weights.record.published

    play(scene, models=kit.models(losses=[None]), rounds=9)
    play(later, rounds=9)
    play(rolled_back, rounds=9)


def test_a_job_that_every_device_fails_in_the_same_way_ends_with_their_message(play: Play) -> None:
    message = "loss is not finite after step 7 at learning rate 1000; lower training.learning_rate"

    async def scene(rig: Rig) -> None:
        tasks = await asyncio.gather(rig.ask("a"), rig.ask("b"))
        for task, device in zip(tasks, "ab", strict=True):
            await rig.job.failed(Failure(task.task_id, 1, device, Outcome.DIVERGED, message))
        with pytest.raises(JobError, match="all 2 devices failed in the same way: loss is not finite after step 7"):
            await rig.running

    async def after_a_restart(rig: Rig) -> None:
        for device in "ab":  # with a mended job file, say
            await rig.deliver(await rig.ask(device), device)
        await rig.reach(rig.job.finished.is_set)

    play(scene)
    play(after_a_restart)


def test_another_attempt_of_a_recorded_task_is_not_acknowledged(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        first, _ = await asyncio.gather(rig.ask("a"), rig.ask("b"))
        again = await rig.ask("a")
        assert (again.task_id, again.attempt) == (first.task_id, 2)
        await rig.deliver(first, "a")
        with pytest.raises(UpdateError, match="attempt 1") as caught:
            await rig.commit(again, "a")
        assert caught.value.reason == "duplicate"
        assert rig.job.store.task(first.task_id).status == "accepted"

    play(scene)


def test_two_agents_under_one_identity_are_named_and_one_is_refused(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        one = replace(rig.kit.report("a"), instance="one", hostname="porch")
        two = replace(rig.kit.report("a"), instance="two", hostname="garage")
        assert await rig.job.fleet.see(one, "ipv4:10.0.0.7:1") is None
        assert await rig.job.fleet.see(two, "ipv4:10.0.0.8:1") is None
        refused = await rig.job.fleet.see(one, "ipv4:10.0.0.7:1")
        assert refused is not None and refused.reason == "clone"
        assert "another agent with the identity of this one, a, is alive on garage (ipv4:10.0.0.8:1)" in refused.message
        assert await rig.job.fleet.see(two, "ipv4:10.0.0.8:1") is None

    play(scene)


def test_without_room_on_the_disk_no_task_is_given(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(rig: Rig) -> None:
        monkeypatch.setattr(rig.job.store.files, "free_bytes", lambda: 1 << 20)
        with pytest.raises(UnavailableError, match=r"disk has 1\.0 MiB left, .* are needed"):
            await rig.ask("a")
        assert rig.job.presence.waiting == set()

    play(scene)


def test_who_waits_is_told_for_what(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        assert rig.job.why_wait() == "waiting for 1 more of 2 devices"
        await asyncio.gather(rig.ask("a"), rig.ask("b"))
        assert rig.job.why_wait() == "round 1 is in progress"

    play(scene)


def test_what_a_crash_left_out_is_made_up_for_every_round_that_is_kept(play: Play, kit: Any) -> None:
    async def scene(rig: Rig) -> None:
        await rig.round()
        await rig.reach(lambda: rig.job.store.rounds()[-1].export_path != "")
        rig.job.store.set_evaluation(1, None, None)
        rig.job.store.set_export(1, "", None)

    async def after_a_restart(rig: Rig) -> None:
        await rig.reach(lambda: rig.models.asked == ["evaluate", "export"])
        await rig.reach(lambda: rig.job.store.rounds()[1].export_path != "")
        assert rig.job.store.rounds()[1].accuracy == 0.75

    play(scene, models=kit.models(), rounds=4, export={"every": 1})
    play(after_a_restart, rounds=4, export={"every": 1})


def test_an_export_that_the_worker_died_of_is_tried_again(play: Play, kit: Any) -> None:
    class Mortal:
        """Dies of its first two exports."""

        def __init__(self) -> None:
            self.models = kit.models()
            self.lives = 2

        async def request(self, do: str, **fields: Any) -> dict[str, Any]:
            if do == "export" and self.lives:
                self.lives -= 1
                raise ChildError("the model worker ended with status -9")
            answer: dict[str, Any] = await self.models.request(do, **fields)
            return answer

    async def scene(rig: Rig) -> None:
        await rig.round()
        await rig.reach(rig.job.finished.is_set)
        assert rig.job.store.rounds()[1].export_path.endswith("demo-round-0001.onnx")

    play(scene, models=Mortal())


def test_what_the_job_waits_for_is_in_its_status_and_its_log(
    play: Play, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.long_work.REMIND_S", 0.01)

    class Slow:
        """Takes its time for an evaluation."""

        def __init__(self) -> None:
            self.models = kit.models()
            self.go_on = asyncio.Event()

        async def request(self, do: str, **fields: Any) -> dict[str, Any]:
            if do == "evaluate":
                await self.go_on.wait()
            answer: dict[str, Any] = await self.models.request(do, **fields)
            return answer

    async def scene(rig: Rig) -> None:
        async def reminded() -> None:
            async for line in rig.job.events.watch(rig.job.state_event()):
                if "round 1: the model is being evaluated" in line:
                    return

        reminder = asyncio.ensure_future(reminded())
        await rig.round()
        await reminder
        assert (await rig.job.status())["message"] == "round 1: the model is being evaluated"
        rig.models.go_on.set()
        await rig.reach(rig.job.finished.is_set)
        assert (await rig.job.status())["message"] == ""

    play(scene, models=Slow())


def test_a_job_that_idles_notices_that_its_record_is_not_its_own_any_more(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.course.HOLD_S", 0.0)
    told = [UnavailableError("the database is away"), StateError("another program has had the record")]

    def check_hold(_store: Store) -> None:
        raise told.pop(0)

    monkeypatch.setattr(Store, "check_hold", check_hold)

    async def scene(rig: Rig) -> None:
        with pytest.raises(StateError, match="another program has had the record"):
            await rig.running
        assert told == []

    play(scene)


@pytest.mark.parametrize("step", ["record_step", "record_update", "record_round"])
def test_a_write_of_which_the_word_was_lost_is_found_in_the_record(
    play: Play, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """As when the connection to a database breaks at its COMMIT."""

    async def scene(rig: Rig) -> None:
        write, broken = getattr(rig.job.store, step), [2]

        def writes_and_breaks(*args: Any) -> None:
            write(*args)
            if broken[0]:
                broken[0] -= 1
                raise UnavailableError("the connection is broken")

        monkeypatch.setattr(rig.job.store, step, writes_and_breaks)

        async def work(device: str) -> None:
            while not rig.job.finished.is_set():
                report = rig.kit.report(device)
                waiting = await rig.job.start_waiting(report, await rig.job.plan_for(report))
                await asyncio.wait({waiting}, timeout=0.2)
                rig.job.stop_waiting(device, waiting)
                task = waiting.result() if waiting.done() else None
                if task is None:
                    continue
                await rig.upload(task, device)
                for _ in range(3):
                    try:
                        await rig.commit(task, device)
                        break
                    except UnavailableError:
                        continue

        await asyncio.gather(work("a"), work("b"))
        assert [(record.round, record.devices) for record in rig.job.store.rounds()] == [(0, 0), (1, 2), (2, 2)]

    play(scene, rounds=2)


def test_who_waits_while_statistics_are_fixed_is_planned_for_anew(play: Play) -> None:
    """Units cost something else from the second round on, and the plan of who waits is for the first."""

    async def scene(rig: Rig) -> None:
        task = await rig.ask("a")
        plan = await rig.job.plan_for(rig.kit.report("b"))
        waiting = await rig.job.start_waiting(rig.kit.report("b"), plan)
        await rig.deliver(task, "a")
        assert await asyncio.wait_for(waiting, 30) is None
        again = await rig.ask("b")
        assert (task.round, task.training.fixed_statistics) == (1, False)
        assert (again.round, again.training.fixed_statistics) == (2, True)
        later = await rig.job.start_waiting(rig.kit.report("a"), plan)
        await rig.deliver(again, "b")
        assert (given := await asyncio.wait_for(later, 30)) is not None  # rounds 2 and 3 cost the same
        assert given.round == 3

    fixed = {"batch_norm": "fixed", "fixed_after": 1}
    play(scene, rounds=3, devices_per_round=1, training=fixed)


def test_turned_on_in_the_middle_of_a_job_fixed_statistics_are_prepared_for(play: Play) -> None:
    async def first(rig: Rig) -> None:
        await rig.round()
        await rig.reach(lambda: rig.job.weights.record.round == 1)
        assert rig.models.asked.count("prepare") == 1

    async def later(rig: Rig) -> None:
        assert rig.models.asked.count("prepare") == prepared
        first, _ = await asyncio.gather(rig.ask("a"), rig.ask("b"))
        assert first.training.fixed_statistics is fixed

    play(first, rounds=4)
    prepared, fixed = 0, False
    play(later, rounds=4)
    prepared, fixed = 1, True
    settings = {"batch_norm": "fixed", "fixed_after": 1}
    play(later, rounds=4, training=settings)
    prepared = 0
    play(later, rounds=4, training=settings)


def test_an_unsound_round_of_which_the_word_was_lost_stays_recorded_once(
    play: Play, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(rig: Rig) -> None:
        monkeypatch.setattr(rig.job.store._database, "checkpoint", fails(1, rig.job.store._database.checkpoint))
        await rig.round()
        await rig.reach(lambda: rig.job.state.round == 2)
        assert [record.published for record in rig.job.store.rounds()] == [True, False]
        assert rig.models.asked.count("evaluate") == 1

    play(scene, models=kit.models(losses=[None]), rounds=3)


def test_closing_a_round_is_not_tried_again_without_a_pause(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(rig: Rig) -> None:
        tries: list[float] = []

        def never(*_: Any) -> None:
            tries.append(time.monotonic())
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(rig.job.store, "updates_of", never)
        await rig.round()
        await rig.reach(lambda: len(tries) == 6)
        pauses = [after - before for before, after in itertools.pairwise(tries)]
        assert pauses[-1] > 4 * 0.01 and rig.job.state.phase is Phase.AGGREGATING

    play(scene)


def test_a_refusal_of_an_earlier_attempt_does_not_end_the_one_in_work(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        first, _ = await asyncio.gather(rig.ask("a"), rig.ask("b"))
        again = await rig.ask("a")
        await rig.job.refuse(first.task_id, first.attempt, "a", UpdateError("shape", "an old mistake"))
        assert rig.job.accepts(again.task_id)
        await rig.deliver(again, "a")

    play(scene)


def test_a_task_of_whose_record_the_word_was_lost_is_given_to_nobody_else(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device for which it is recorded hangs up before the job has learnt of the record."""

    async def scene(rig: Rig) -> None:
        record = rig.job.store.record_step

        def records_and_breaks(*args: Any) -> None:
            monkeypatch.setattr(rig.job.store, "record_step", record)
            record(*args)
            raise UnavailableError("the connection is broken")

        plan = await rig.job.plan_for(rig.kit.report("a"))
        monkeypatch.setattr(rig.job.store, "record_step", records_and_breaks)
        lost = await rig.job.start_waiting(rig.kit.report("a"), plan)
        rig.job.stop_waiting("a", lost)
        other = await rig.job.start_waiting(rig.kit.report("b"), plan)
        (task,) = rig.job.store.tasks_of(1)
        assert (task.device_id, task.attempt, other.done()) == ("a", 1, False)
        again = await rig.ask("a")
        assert (again.task_id, again.attempt) == (task.task_id, 2)
        await rig.deliver(again, "a")

    play(scene, devices_per_round=1)
