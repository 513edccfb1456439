"""The service on a real grpc.aio server: what a device and a watcher see."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from fedepth_wire.channel import SERVER_OPTIONS, open_channel
from fedepth_wire.chunks import Source
from fedepth_wire.convert import to_message
from fedepth_wire.report_messages import report_message
from fedepth_wire.task_messages import task_of
from fedepth_wire.tls import INSECURE
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationStub, add_FederationServicer_to_server
from msgspec import structs

from coordinator import service
from coordinator.job import Job
from coordinator.service import FederationService
from coordinator.store.records import Store
from coordinator.store.storage import Directory
from fedepth.errors import StateError, UpdateError
from fedepth.task import Distil, Failure, Heads, Outcome, Progress, Result, Task

WEIGHTS = b"initial weights"
PART = b"trained tensors"
PIECE = pb.UploadPartRequest(chunk=pb.Chunk(offset=0, data=PART[:5]))


class Rig:
    """A served job, and a device's view of it."""

    def __init__(self, service: FederationService, stub: Any, kit: Any, running: asyncio.Future[None]) -> None:
        self.service = service
        self.job: Job = service._job
        self.stub = stub
        self.kit = kit
        self.running = running

    async def ask(self, device: str, wait_ms: int = 10_000, **changes: Any) -> pb.NextTaskReply:
        report = to_message(self.kit.report(device, **changes), pb.DeviceReport)
        reply: pb.NextTaskReply = await self.stub.NextTask(pb.NextTaskRequest(device=report, wait_ms=wait_ms))
        return reply

    async def task(self, device: str) -> Task:
        reply = await self.ask(device)
        assert reply.WhichOneof("outcome") == "task", reply
        assert not reply.task.HasField("model")
        return task_of(reply.task, self.job.model_source.content)

    def header(self, task: Task, device: str, data: bytes = PART, digest: str = "") -> pb.UploadHeader:
        return pb.UploadHeader(
            task_id=task.task_id,
            attempt=task.attempt,
            device_id=device,
            part=0,
            size_bytes=len(data),
            digest=digest or self.kit.sha256(data),
        )

    async def upload(self, task: Task, device: str, digest: str = "", begin: int = 0) -> pb.UploadPartReply:
        header = self.header(task, device, PART, digest)

        async def requests() -> AsyncIterator[pb.UploadPartRequest]:
            yield pb.UploadPartRequest(header=header)
            yield pb.UploadPartRequest(chunk=pb.Chunk(offset=begin, data=PART[begin:]))

        *_, reply = [reply async for reply in self.stub.UploadPart(requests())]
        return reply

    def result(self, task: Task, device: str, **changes: Any) -> Result:
        record = self.job.store.task(task.task_id)
        made: Result = self.kit.result(record, {0: PART}, device_id=device, attempt=task.attempt, **changes)
        return made

    async def commit(self, result: Result) -> pb.CommitUpdateReply:
        request = pb.CommitUpdateRequest(result=to_message(result, pb.Result))
        reply: pb.CommitUpdateReply = await self.stub.CommitUpdate(request)
        return reply

    async def deliver(self, task: Task, device: str, begin: int = 0) -> None:
        await self.upload(task, device, begin=begin)
        assert (await self.commit(self.result(task, device))).WhichOneof("outcome") == "accepted"


Scene = Callable[[Rig], Awaitable[None]]
Play = Callable[..., None]


@pytest.fixture
def play(kit: Any, run_job: Any) -> Play:
    """Runs a scene against a served job with these [job] settings; keeps its state for the next one."""

    @asynccontextmanager
    async def served(**section: Any) -> AsyncIterator[Rig]:
        async with run_job(**section) as running:
            server = grpc.aio.server(options=SERVER_OPTIONS)
            service = FederationService(running.job)
            add_FederationServicer_to_server(service, server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            try:
                async with open_channel(f"127.0.0.1:{port}", INSECURE) as channel:
                    yield Rig(service, FederationStub(channel), kit, running.task)
            finally:
                running.job.events.close()
                await server.stop(0)
            if running.task.done():
                running.task.result()

    def run(scene: Scene, *, ends: bool = False, **section: Any) -> None:
        async def main() -> None:
            async with served(**section) as rig:
                await asyncio.wait_for(scene(rig), 30)
                if ends:  # by itself
                    await asyncio.wait({rig.running}, timeout=30)

        asyncio.run(main())

    return run


def test_a_whole_job(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        first, second = await asyncio.gather(rig.task("a"), rig.task("b"))
        assert first.task_id != second.task_id
        assert (first.round, first.attempt, first.weights_digest) == (1, 1, rig.kit.sha256(WEIGHTS))
        assert first.plan == await rig.job.plan_for(rig.kit.report("a"))
        assert first.run_id == rig.job.store.run_id
        await rig.deliver(first, "a")
        await rig.deliver(second, "b")
        reply = await rig.ask("a")
        assert (reply.finished.job, reply.finished.rounds) == ("demo", 1)
        assert rig.job.unaware_devices() == {"b"}
        status = await rig.stub.JobStatus(pb.JobStatusRequest())
        assert (status.phase, status.round, status.accuracy) == ("finished", 1, 0.75)
        assert status.onnx_path.endswith("demo-round-0001.onnx")
        averaged = WEIGHTS + b"|" + PART + b"|" + PART
        assert rig.job.store.files.weights(1, rig.kit.sha256(averaged)).read_bytes() == averaged
        assert list((rig.job.store.directory / "spool").iterdir()) == []

    play(scene)


def test_a_restart_keeps_tasks_and_accepted_updates(play: Play) -> None:
    tasks: dict[str, Task] = {}

    async def before(rig: Rig) -> None:
        tasks["a"], tasks["b"] = await asyncio.gather(rig.task("a"), rig.task("b"))
        await rig.deliver(tasks["a"], "a")
        await rig.upload(tasks["b"], "b")

    async def after(rig: Rig) -> None:
        status = await rig.stub.JobStatus(pb.JobStatusRequest())
        assert (status.phase, status.round) == ("training", 1)
        again = await rig.commit(rig.result(tasks["a"], "a"))
        assert again.WhichOneof("outcome") == "accepted"
        accepted = await rig.commit(rig.result(tasks["b"], "b"))
        assert accepted.accepted.round == 1
        await rig.job.finished.wait()
        assert len(rig.job.store.updates_of(1)) == 2

    play(before)
    play(after)


def test_a_long_poll_ends_after_its_wait(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        reply = await rig.ask("a", wait_ms=30)
        assert reply.WhichOneof("outcome") == "retry"
        assert 0 <= reply.retry.retry_after_ms < 1000
        assert rig.job.presence.waiting == set()

    play(scene)


def test_a_device_that_hangs_up_no_longer_waits(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        report = to_message(rig.kit.report("a"), pb.DeviceReport)
        call = rig.stub.NextTask(pb.NextTaskRequest(device=report, wait_ms=60_000))
        await until(rig, lambda: "a" in rig.job.presence.waiting)
        call.cancel()
        await until(rig, lambda: "a" not in rig.job.presence.waiting)
        assert rig.job.presence.waiting == set() and call.cancelled()

    play(scene)


async def until(rig: Rig, condition: Callable[[], bool]) -> None:
    """Lets the server work until it holds; every turn is one answered call."""
    while not condition():
        await rig.stub.JobStatus(pb.JobStatusRequest())


def test_a_lost_answer_gives_the_same_task_again(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        first, _ = await asyncio.gather(rig.task("a"), rig.task("b"))
        again = await rig.task("a")
        assert (again.task_id, again.attempt) == (first.task_id, 2)
        await rig.deliver(first, "a")  # what was trained under the first attempt still counts

    play(scene)


def test_an_agent_that_would_train_something_else_is_told_so(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        training = structs.replace(rig.job.config.training, heads=Heads.AUXILIARY, distil=Distil.GLOBAL)
        rig.job.config = structs.replace(rig.job.config, training=training)
        older = await rig.ask("a")
        assert "sets [training] heads, [training] distil, which the agent of this device" in older.rejected.message
        assert older.rejected.retry_after_ms > 0

    play(scene)


def test_devices_that_cannot_take_part_are_told_why(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        small = await rig.ask("a", budget_bytes=100)
        assert small.rejected.retry_after_ms > 0
        assert "100 B" in small.rejected.message
        other = await rig.ask("a", classes=3)
        assert "3 classes, the job has 2: '0', '1'" in other.rejected.message
        odd = await rig.ask("../a")
        assert "device id" in odd.rejected.message
        assert rig.job.presence.waiting == set()
        words = rig.job.why_wait()
        assert words.startswith("waiting for 1 more of 2 devices; 2 devices were rejected, the last: board ../a: ")
        waiting = await rig.stub.JobStatus(pb.JobStatusRequest())
        assert waiting.message.startswith("waiting for 2 more of 2 devices; 2 devices were rejected")

    play(scene)


def test_ranges_of_weights_and_graph_are_sent(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        digest = rig.kit.sha256(WEIGHTS)
        for content in (WEIGHTS, rig.kit.graph):
            wanted = [pb.Range(begin=8, end=len(content)), pb.Range(begin=0, end=3)]
            size = len(content) - 5
            request = pb.FetchFileRequest(digest=rig.kit.sha256(content), ranges=wanted, credit_bytes=size)
            got = [(chunk.offset, chunk.data) for chunk in await chunks(rig, request)]
            assert got == [(8, content[8:]), (0, content[:3])]
        for request, code in (
            (pb.FetchFileRequest(digest="0" * 64), grpc.StatusCode.NOT_FOUND),
            (pb.FetchFileRequest(digest=digest, ranges=[pb.Range(end=99)]), grpc.StatusCode.OUT_OF_RANGE),
            (pb.FetchFileRequest(digest=digest, ranges=[pb.Range(begin=3, end=3)]), grpc.StatusCode.OUT_OF_RANGE),
            # A file and a byte: what is sent has an end that does not grow with the number of ranges.
            (
                pb.FetchFileRequest(digest=digest, ranges=[pb.Range(end=1), pb.Range(end=len(WEIGHTS))]),
                grpc.StatusCode.OUT_OF_RANGE,
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await chunks(rig, request)
            assert caught.value.code() is code

    play(scene)


def test_a_device_with_many_classes_describes_its_data_once(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        names = tuple(f"class number {number}" for number in range(3000))
        report = replace(rig.kit.report("a", classes=3000), class_names=names)
        message, data = report_message(report)
        request = pb.NextTaskRequest(device=message, wait_ms=0)
        assert (await rig.stub.NextTask(request)).WhichOneof("outcome") == "describe"
        header = pb.UploadHeader(device_id="a", size_bytes=len(data), digest=message.data_digest)

        async def requests() -> AsyncIterator[pb.UploadPartRequest]:
            yield pb.UploadPartRequest(header=header)
            yield pb.UploadPartRequest(chunk=pb.Chunk(offset=0, data=data))

        *_, reply = [reply async for reply in rig.stub.DescribeData(requests())]
        assert reply.sealed.size_bytes == len(data)
        refused = (await rig.stub.NextTask(request)).rejected  # the job has two classes: the names have been looked at
        assert "class number" in refused.message

    play(scene)


def test_no_more_of_a_file_is_sent_than_was_asked_for_by_then(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        call = rig.stub.FetchFile()
        digest, wanted = rig.kit.sha256(WEIGHTS), [pb.Range(begin=0, end=len(WEIGHTS))]
        await call.write(pb.FetchFileRequest(digest=digest, ranges=wanted, credit_bytes=5, piece_bytes=3))
        got = [await call.read()]
        for credit, piece in ((6, 0), (6, 2), (9, 2), (len(WEIGHTS) + 5, 4)):
            await call.write(pb.FetchFileRequest(credit_bytes=credit, piece_bytes=piece))
        got += [await call.read() for _ in range(3)]
        assert await call.read() is grpc.aio.EOF
        # As it is asked for; pieces smaller than an agent ever wants are not made.
        assert [len(chunk.data) for chunk in got] == [5, 1, 3, 6]
        assert b"".join(chunk.data for chunk in got) == WEIGHTS

    play(scene)


def test_streams_on_which_nothing_moves_are_ended(play: Play) -> None:
    """Each of them is a connection, an open file, or a place in line."""

    async def scene(rig: Rig) -> None:
        task, _ = await asyncio.gather(rig.task("a"), rig.task("b"))
        wanted = [pb.Range(begin=0, end=task.weights_bytes)]
        fetching = pb.FetchFileRequest(digest=task.weights_digest, ranges=wanted, credit_bytes=5)
        header = rig.header(task, "a", PART)
        rig.service._stall_s = 0.05
        for method, messages in (
            (rig.stub.FetchFile, []),
            (rig.stub.FetchFile, [fetching]),
            (rig.stub.UploadPart, []),
            (rig.stub.UploadPart, [pb.UploadPartRequest(header=header)]),
            (rig.stub.UploadPart, [pb.UploadPartRequest(header=header), PIECE]),
        ):
            call = method()
            for message in messages:
                await call.write(message)
            with pytest.raises(grpc.aio.AioRpcError, match=r"nothing moved for 0\.05 s") as caught:
                while await call.read() is not grpc.aio.EOF:
                    pass
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        rig.service._stall_s = 60.0
        await rig.deliver(task, "a", begin=5)  # what came before the silence is there

    play(scene)


async def chunks(rig: Rig, request: pb.FetchFileRequest) -> list[pb.Chunk]:
    async def requests() -> AsyncIterator[pb.FetchFileRequest]:
        yield request

    return [chunk async for chunk in rig.stub.FetchFile(requests())]


async def fetch(rig: Rig, digest: str, size: int, *, verify: bool = True) -> bytes:
    """As a device does after a file that came whole and was another one, if `verify`."""
    wanted = [pb.Range(begin=0, end=size)]
    request = pb.FetchFileRequest(digest=digest, ranges=wanted, credit_bytes=size, verify=verify)
    return b"".join([chunk.data for chunk in await chunks(rig, request)])


def test_a_file_is_looked_at_once_for_all_who_doubt_it(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for it spends a few bytes, and a large model takes seconds to read."""
    looks: list[Path] = []
    verify = Source.verify

    def counted(source: Source) -> None:
        looks.append(Path())
        verify(source)

    async def scene(rig: Rig) -> None:
        monkeypatch.setattr(Source, "verify", counted)
        digest = rig.kit.sha256(WEIGHTS)
        assert await asyncio.gather(*(fetch(rig, digest, len(WEIGHTS)) for _ in range(8))) == [WEIGHTS] * 8
        assert len(looks) == 1
        monkeypatch.setattr(service, "VERIFIED_S", 0)  # some time later
        await fetch(rig, digest, len(WEIGHTS))
        assert len(looks) == 2

    play(scene)


def test_a_look_at_a_file_goes_on_when_nobody_waits_for_it(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is ended does not end its thread: forty calls were thirty-two looks at once. And where a look takes
    longer than a device waits, its next question finds the answer."""
    looks: list[Path] = []
    opened = threading.Event()
    verify = Source.verify

    def slow(source: Source) -> None:
        looks.append(Path())
        assert opened.wait(20)
        verify(source)

    async def scene(rig: Rig) -> None:
        monkeypatch.setattr(Source, "verify", slow)
        monkeypatch.setattr(service, "BUSY_RETRY_S", 0.05)
        digest = rig.kit.sha256(WEIGHTS)
        for _ in range(5):
            with pytest.raises(grpc.aio.AioRpcError, match="still being compared with its digest; come back") as caught:
                await fetch(rig, digest, len(WEIGHTS))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        opened.set()
        monkeypatch.setattr(service, "BUSY_RETRY_S", 20)
        assert await fetch(rig, digest, len(WEIGHTS)) == WEIGHTS
        assert len(looks) == 1

    play(scene)


def test_what_an_update_says_is_bounded_before_it_is_converted(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        task, _ = await asyncio.gather(rig.task("a"), rig.task("b"))
        message = to_message(rig.result(task, "a"), pb.Result)
        message.stages.extend([pb.StageResult()] * 900)
        with pytest.raises(grpc.aio.AioRpcError, match=r"says 90[0-9] things of its parts, stages or units") as caught:
            await rig.stub.CommitUpdate(pb.CommitUpdateRequest(result=message))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    play(scene, quorum=1)


def test_names_beside_a_digest_of_them_are_refused(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        message = to_message(rig.kit.report("a"), pb.DeviceReport)
        message.data_digest = "0" * 64
        message.folder_names.extend(["x"] * 30_000)
        with pytest.raises(grpc.aio.AioRpcError, match="beside a digest of them; more than 0 go by digest") as caught:
            await rig.stub.NextTask(pb.NextTaskRequest(device=message, wait_ms=0))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    play(scene, quorum=1)


def test_updates_of_tasks_that_never_were_are_counted_within_a_bound(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        for number in range(30):
            await rig.job.refuse(f"made-up-{number}", 1, "a", UpdateError("late", "never existed"))
        assert rig.job.store.failure_counts() == {"refused/late": 20}

    play(scene, quorum=1)


def test_a_call_that_meets_a_state_that_cannot_be_used_is_logged_in_a_sentence(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_store: Store) -> None:
        raise StateError("the record was changed by another program")

    async def scene(rig: Rig) -> None:
        monkeypatch.setattr(Store, "summary", refuse)
        with structlog.testing.capture_logs() as logged, pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.stub.JobStatus(pb.JobStatusRequest())
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        (entry,) = logged
        assert entry == {
            "event": "a call failed",
            "error": "the record was changed by another program",
            "log_level": "error",
        }

    play(scene)


Damage = Callable[[Path], Any]


def rot(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize("damage", [rot, Path.unlink])
@pytest.mark.parametrize(
    ("what", "said"),
    [("weights", "they are the weights in force after round 0; restore this file"), ("graph", "which rebuilds it")],
)
def test_a_file_that_rots_while_it_is_served_ends_the_job_with_a_sentence(
    play: Play, what: str, said: str, damage: Damage
) -> None:
    """Nobody is sent what is not right, and the operator learns what to do."""

    async def scene(rig: Rig) -> None:
        task, _ = await asyncio.gather(rig.task("a"), rig.task("b"))
        digest = task.weights_digest if what == "weights" else task.graph_digest
        found = await rig.job.file_of(digest)
        assert found is not None
        damage(found.content)
        with pytest.raises(grpc.aio.AioRpcError, match=r"busy: .*; come back in 20 s") as caught:
            await fetch(rig, digest, found.size_bytes)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # the device waits, and keeps its task

    with pytest.raises(StateError, match=said):
        play(scene, ends=True)


def test_a_file_that_rots_is_fetched_again_from_where_there_is_another_copy(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Copies(Directory):
        def fetch(self, name: str, digest: str) -> None:
            (rig_folder / name).write_bytes(WEIGHTS)
            super().fetch(name, digest)

    async def scene(rig: Rig) -> None:
        nonlocal rig_folder
        rig_folder = rig.job.store.directory
        monkeypatch.setattr(rig.job.store.files, "storage", Copies(rig_folder))
        task, _ = await asyncio.gather(rig.task("a"), rig.task("b"))
        rot(rig.job.weights.path())
        with pytest.raises(grpc.aio.AioRpcError, match="busy"):
            await fetch(rig, task.weights_digest, task.weights_bytes)
        await until(rig, lambda: rig.job.weights.path().read_bytes() == WEIGHTS)
        assert await fetch(rig, task.weights_digest, task.weights_bytes) == WEIGHTS
        await rig.deliver(task, "a")

    rig_folder = Path()
    play(scene)


def test_weights_of_the_past_that_rot_do_not_end_the_job(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        for task, device in zip(await asyncio.gather(rig.task("a"), rig.task("b")), "ab", strict=True):
            await rig.deliver(task, device)
        await until(rig, lambda: rig.job.state.round == 2)
        rig.job.store.files.weights(0, rig.kit.sha256(WEIGHTS)).unlink()
        with pytest.raises(grpc.aio.AioRpcError, match="busy"):
            await fetch(rig, rig.kit.sha256(WEIGHTS), len(WEIGHTS))
        for task, device in zip(await asyncio.gather(rig.task("a"), rig.task("b")), "ab", strict=True):
            await rig.deliver(task, device)
        await rig.job.finished.wait()

    play(scene, rounds=2)


def test_a_broken_upload_can_be_tried_again(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        task, _ = await asyncio.gather(rig.task("a"), rig.task("b"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.upload(task, "a", digest="0" * 64)
        assert caught.value.code() is grpc.StatusCode.ABORTED
        for _ in range(2):  # the answer may have been lost
            assert (await rig.upload(task, "a")).sealed.size_bytes == len(PART)

    play(scene)


def test_a_refusal_ends_the_task_and_is_counted(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        task, other = await asyncio.gather(rig.task("a"), rig.task("b"))
        await rig.upload(task, "a")
        reply = await rig.commit(rig.result(task, "a", sample_count=21))
        assert (reply.refused.reason, "21 samples" in reply.refused.message) == ("samples", True)
        late = await rig.upload(task, "a")
        assert late.refused.reason == "late"
        await rig.deliver(other, "b")
        assert rig.job.store.failure_counts() == {"refused/samples": 1, "refused/late": 1}
        await rig.job.finished.wait()

    play(scene, quorum=1)


def test_a_failure_ends_the_task_and_progress_is_no_longer_wanted(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        task, _ = await asyncio.gather(rig.task("a"), rig.task("b"))
        progress = to_message(Progress(task.task_id, 1, "a", "training"), pb.Progress)
        assert (await rig.stub.ReportProgress(progress)).wanted is True
        foreign = to_message(Progress(task.task_id, 1, "b", "training"), pb.Progress)
        assert (await rig.stub.ReportProgress(foreign)).wanted is False
        failure = Failure(task.task_id, 1, "a", Outcome.DECLINED, "no plan fits")
        assert (await rig.stub.ReportFailure(to_message(failure, pb.Failure))).wanted is False
        assert (await rig.stub.ReportProgress(progress)).wanted is False
        assert rig.job.store.failure_counts() == {"failed/declined": 1}

    play(scene)


@pytest.mark.parametrize(
    ("method", "request_", "said"),
    [
        ("FetchFile", pb.FetchFileRequest(digest="f" * 900_000), "FetchFileRequest.digest has 900000 characters"),
        ("FetchFile", pb.FetchFileRequest(digest="f" * 64, credit_bytes=-1), "FetchFileRequest.credit_bytes is -1"),
        ("UploadPart", pb.UploadPartRequest(header=pb.UploadHeader(task_id="t" * 900_000)), "task_id has 900000"),
        ("UploadPart", pb.UploadPartRequest(header=pb.UploadHeader(digest="f" * 65)), "digest has 65 characters"),
    ],
)
def test_what_is_asked_of_files_and_parts_is_bounded(play: Play, method: str, request_: Any, said: str) -> None:
    async def scene(rig: Rig) -> None:
        call = getattr(rig.stub, method)()
        await call.write(request_)
        with pytest.raises(grpc.aio.AioRpcError, match=said) as caught:
            await call.read()
        expected = {"FetchFile": grpc.StatusCode.INVALID_ARGUMENT, "UploadPart": grpc.StatusCode.ABORTED}
        assert caught.value.code() is expected[method]

    play(scene)


def test_watchers_see_the_state_and_then_every_event(play: Play) -> None:
    async def scene(rig: Rig) -> None:
        call = rig.stub.Watch(pb.WatchRequest())
        state = json.loads((await call.read()).json)
        assert (state["event"], state["phase"], state["rounds"]) == ("state", "gathering", 1)
        first, second = await asyncio.gather(rig.task("a"), rig.task("b"))
        await rig.deliver(first, "a")
        await rig.deliver(second, "b")
        seen: list[dict[str, Any]] = []
        while not seen or seen[-1]["event"] != "finished":
            seen.append(json.loads((await call.read()).json))
        names = [event["event"] for event in seen]
        assert sorted(names[:2]) == ["device_seen", "device_seen"]
        assert names[2:] == [
            "round_started",
            "task_given",
            "task_given",
            "update_accepted",
            "update_accepted",
            "round_closed",
            "evaluated",
            "exported",
            "finished",
        ]
        accepted = seen[names.index("update_accepted")]
        assert (accepted["device"], accepted["samples"], accepted["bytes"]) == ("board a", 20, len(PART))
        assert accepted["stages"][0]["measured_peak_bytes"] == 3900
        call.cancel()

    play(scene)
