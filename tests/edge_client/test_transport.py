"""The transport against a real grpc.aio server on loopback."""

import asyncio
import contextlib
import hashlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from fedepth_wire.chunks import Source
from fedepth_wire.convert import from_message
from fedepth_wire.pace import FIRST_WINDOW_BYTES, LEAST_WINDOW_BYTES
from fedepth_wire.report_messages import put_into
from fedepth_wire.task_messages import model_source, task_message
from fedepth_wire.tls import INSECURE
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationServicer, add_FederationServicer_to_server

from edge_client.call_errors import BusyError, ServerError, TemporaryError, UnreachableError
from edge_client.outbox import Outbox
from edge_client.transport import Accepted, Finished, GrpcTransport, Refused, Rejected, RetryLater
from fedepth.budget import Budget
from fedepth.errors import DiskError, ProtocolError, TransportError
from fedepth.models.graph import MOST_BYTES
from fedepth.task import DeviceReport, Failure, Outcome, Progress, Result, Task

REPORT = DeviceReport(
    "device", "kitchen", Budget(9, 8, (), 1, 1, 0.9, 0, 6), 6, (4, 2), instance="0123456789abcdef", hostname="board-7"
)
BIG = bytes(range(256)) * 3000  # 768 kB
BIG_MORE = len(BIG) + 1


@dataclass
class Server(FederationServicer):
    """Remembers what it was asked, and answers what it was told to."""

    weights: Path
    task_reply: pb.NextTaskReply = field(default_factory=pb.NextTaskReply)
    upload_reply: pb.UploadPartReply | None = None
    held: dict[int, bytes] = field(default_factory=dict)
    asked: list[Any] = field(default_factory=list)
    models: dict[str, bytes] = field(default_factory=dict)
    credits: list[int] = field(default_factory=list)
    cut_after: int | None = None
    silent: bool = False

    def task(self, task: Task) -> pb.NextTaskReply:
        """The reply that hands it out. Its model can be fetched from now on."""
        model = model_source(task.model)
        assert isinstance(model.content, bytes)
        self.models[model.digest] = model.content
        return pb.NextTaskReply(task=task_message(task, model))

    async def NextTask(self, request: pb.NextTaskRequest, context: Any) -> pb.NextTaskReply:
        self.asked.append(request)
        return self.task_reply

    async def FetchFile(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.Chunk]:  # type: ignore[override]
        """Sends what it is asked for; `cut_after` counts the bytes of one stream."""
        sent, pieces = 0, None
        async for request in request_iterator:
            if pieces is None:
                self.asked.append(request)
                total = sum(each.end - each.begin for each in request.ranges)
                content = self.models.get(request.digest) or self.weights.read_bytes()
                pieces = Source(content, 0, "").pieces([(each.begin, each.end) for each in request.ranges])
            self.credits.append(request.credit_bytes)
            while sent < min(total, request.credit_bytes):
                if self.cut_after is not None and sent >= self.cut_after:
                    if self.silent:
                        await asyncio.Event().wait()
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
                chunk = pieces.next(min(request.piece_bytes, request.credit_bytes - sent))
                sent += len(chunk.data)
                yield chunk
            if sent == total:
                return

    async def UploadPart(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.UploadPartRequest], context: Any
    ) -> AsyncIterator[pb.UploadPartReply]:
        if self.silent:
            await asyncio.Event().wait()
        received = 0
        async for request in request_iterator:
            if request.WhichOneof("content") == "header":
                header = request.header
                self.asked.append(header)
                if self.upload_reply:
                    yield self.upload_reply
                    return
                held = self.held.setdefault(header.part, b"")
            else:
                assert request.chunk.offset == len(held)
                if self.cut_after is not None and received >= self.cut_after:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
                held = self.held[header.part] = held + request.chunk.data
                received += len(request.chunk.data)
            if len(held) == header.size_bytes:
                yield pb.UploadPartReply(sealed=pb.Sealed(size_bytes=len(held)))
                return
            yield pb.UploadPartReply(held_bytes=len(held))

    async def CommitUpdate(self, request: pb.CommitUpdateRequest, context: Any) -> pb.CommitUpdateReply:
        self.asked.append(request)
        return pb.CommitUpdateReply(accepted=pb.Accepted(round=3))

    async def ReportFailure(self, request: pb.Failure, context: Any) -> pb.Ack:
        self.asked.append(request)
        return pb.Ack(wanted=True)

    async def ReportProgress(self, request: pb.Progress, context: Any) -> pb.Ack:
        self.asked.append(request)
        return pb.Ack(wanted=request.stage == 0)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    weights = tmp_path / "global.safetensors"
    weights.write_bytes(BIG)
    return Server(weights)


@pytest.fixture
def big_task(make_task: Callable[..., Task]) -> Task:
    return replace(make_task(), weights_digest=hashlib.sha256(BIG).hexdigest(), weights_bytes=len(BIG))


def against(
    server: Server, state: Path, scene: Callable[[GrpcTransport], Awaitable[None]], stall_s: float = 20.0
) -> None:
    async def play() -> None:
        running = grpc.aio.server()
        add_FederationServicer_to_server(server, running)
        port = running.add_insecure_port("127.0.0.1:0")
        await running.start()
        transport = GrpcTransport(f"127.0.0.1:{port}", state, INSECURE, stall_s)
        try:
            await scene(transport)
        finally:
            await transport.close()
            await running.stop(None)

    asyncio.run(play())


def test_every_answer_to_next_task(server: Server, tmp_path: Path, big_task: Task) -> None:
    async def scene(transport: GrpcTransport) -> None:
        for reply, expected in (
            (server.task(big_task), big_task),
            (
                pb.NextTaskReply(retry=pb.RetryLater(retry_after_ms=1500, reason="waiting")),
                RetryLater(1.5, "waiting"),
            ),
            (pb.NextTaskReply(finished=pb.JobFinished(job="j", rounds=4)), Finished("j", 4)),
            (pb.NextTaskReply(rejected=pb.Rejected(message="no", retry_after_ms=2000)), Rejected("no", 2.0)),
            (
                pb.NextTaskReply(rejected=pb.Rejected(message="two", retry_after_ms=2000, reason="clone")),
                Rejected("two", 2.0, "clone"),
            ),
        ):
            server.task_reply = reply
            assert await transport.next_task(REPORT, 30) == expected
        server.task_reply = pb.NextTaskReply()
        with pytest.raises(ProtocolError, match="no outcome"):
            await transport.next_task(REPORT, 30)

    against(server, tmp_path, scene)
    assert server.asked[0].wait_ms == 30_000
    assert from_message(server.asked[0].device, DeviceReport) == REPORT


def test_what_all_tasks_of_a_job_have_in_common_is_fetched_once(server: Server, tmp_path: Path, big_task: Task) -> None:
    """The names of many classes have more bytes than a bad link passes in one go."""
    names = tuple(f"class number {number}" for number in range(10_000))
    task = replace(big_task, model=replace(big_task.model, classes=names))
    server.task_reply = server.task(task)
    server.cut_after = 40_000

    async def scene(transport: GrpcTransport) -> None:
        for _ in range(2):
            assert await transport.next_task(REPORT, 30) == task

    against(server, tmp_path, scene)
    assert server.task_reply.ByteSize() < 2_000
    fetched = [ranges_of(request)[0][0] for request in server.asked if isinstance(request, pb.FetchFileRequest)]
    assert fetched[0] == 0 and fetched == sorted(set(fetched)) and len(fetched) > 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_digest": "../x"}, r"names the model '\.\./x' of"),
        ({"model_bytes": 0}, "of 0 bytes"),
        ({"model_bytes": (4 << 20) + 1}, "of 4194305 bytes"),
    ],
)
def test_a_model_that_is_named_as_none_can_be_is_refused(
    server: Server, tmp_path: Path, big_task: Task, changes: dict[str, Any], said: str
) -> None:
    server.task_reply = server.task(big_task)
    server.task_reply.task.MergeFrom(pb.Task(**changes))
    if changes.get("model_bytes") == 0:
        server.task_reply.task.model_bytes = 0

    async def scene(transport: GrpcTransport) -> None:
        with pytest.raises(ProtocolError, match=said):
            await transport.next_task(REPORT, 30)

    against(server, tmp_path, scene)


def test_a_model_that_cannot_be_read_is_refused(server: Server, tmp_path: Path, big_task: Task) -> None:
    server.task_reply = server.task(big_task)
    content = b"\xff" * 10
    server.models[digest := hashlib.sha256(content).hexdigest()] = content
    server.task_reply.task.model_digest, server.task_reply.task.model_bytes = digest, len(content)

    async def scene(transport: GrpcTransport) -> None:
        with pytest.raises(ProtocolError, match="the model of task 't1' cannot be read"):
            await transport.next_task(REPORT, 30)

    against(server, tmp_path, scene)


def test_what_a_device_with_many_classes_says_of_its_data_is_sent_once(server: Server, tmp_path: Path) -> None:
    names = tuple(f"class number {number}" for number in range(10_000))
    report = replace(REPORT, class_names=names, class_counts=tuple(range(10_000)))
    whole: dict[str, bytes] = {}
    sizes: list[int] = []

    class Asking(Server):
        async def NextTask(self, request: pb.NextTaskRequest, context: Any) -> pb.NextTaskReply:
            self.asked.append(request)
            sizes.append(request.ByteSize())
            if request.device.data_digest not in whole:
                return pb.NextTaskReply(describe=pb.Describe())
            put_into(request.device, whole[request.device.data_digest])
            assert from_message(request.device, DeviceReport) == report
            return pb.NextTaskReply(retry=pb.RetryLater(retry_after_ms=1500))

        async def DescribeData(  # type: ignore[override]
            self, request_iterator: AsyncIterator[pb.UploadPartRequest], context: Any
        ) -> AsyncIterator[pb.UploadPartReply]:
            async for reply in self.UploadPart(request_iterator, context):
                if reply.WhichOneof("outcome") == "sealed":
                    whole[self.asked[-1].digest] = self.held[0]
                yield reply

    asking = Asking(server.weights)
    asking.cut_after = 40_000

    async def scene(transport: GrpcTransport) -> None:
        for _ in range(2):
            assert await transport.next_task(report, 30) == RetryLater(1.5)

    against(asking, tmp_path, scene)
    assert len(sizes) == 3 and max(sizes) < 1_000
    assert len(asking.asked) - 3 > 3  # the file went up in several streams


def with_stage(task: Task, **changes: Any) -> Task:
    return replace(task, plan=replace(task.plan, stages=(replace(task.plan.stages[0], **changes),)))


def with_rate(learning_rate: float) -> Callable[[Task], Task]:
    return lambda task: replace(task, training=replace(task.training, learning_rate=learning_rate))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda task: replace(task, plan=replace(task.plan, stages=())), "0 stages cannot be"),
        (lambda task: with_stage(task, first=3, last=2), "stages 3 cannot be"),
        (lambda task: with_stage(task, micro_batch=0), "cannot be"),
        (lambda task: with_stage(task, build_batch=0), "cannot be"),
        (lambda task: replace(task, training=replace(task.training, batch=0)), "batches of 0"),
        (lambda task: replace(task, training=replace(task.training, local_epochs=0)), "0 epochs"),
        (with_rate(math.nan), "TrainingSpec.learning_rate is nan"),
        (with_rate(math.inf), "TrainingSpec.learning_rate is inf"),
        (lambda task: replace(task, model=replace(task.model, std=(-math.inf,))), "ModelSpec.std is -inf"),
    ],
)
def test_a_task_that_cannot_be_trained_is_refused(
    server: Server, tmp_path: Path, big_task: Task, change: Callable[[Task], Task], message: str
) -> None:
    server.task_reply = server.task(change(big_task))

    async def scene(transport: GrpcTransport) -> None:
        with pytest.raises(ProtocolError, match=message):
            await transport.next_task(REPORT, 30)

    against(server, tmp_path, scene)


@pytest.mark.parametrize(
    "bad",
    [
        {"task_id": "../../etc"},
        {"task_id": ".new-x"},
        {"task_id": ""},
        {"weights_digest": "../x"},
        {"graph_digest": "../x"},
    ],
)
def test_names_that_would_leave_the_state_directory_are_refused(
    server: Server, tmp_path: Path, big_task: Task, bad: dict[str, str]
) -> None:
    server.task_reply = server.task(replace(big_task, **bad))  # type: ignore[arg-type]

    async def scene(transport: GrpcTransport) -> None:
        with pytest.raises(ProtocolError):
            await transport.next_task(REPORT, 30)

    against(server, tmp_path, scene)


def ranges_of(request: pb.FetchFileRequest) -> list[tuple[int, int]]:
    return [(each.begin, each.end) for each in request.ranges]


def test_a_download_that_is_cut_goes_on_at_the_byte(server: Server, tmp_path: Path, big_task: Task) -> None:
    async def scene(transport: GrpcTransport) -> None:
        server.cut_after = 100_000
        path = await transport.fetch_weights(big_task)
        assert path.read_bytes() == BIG
        assert await transport.fetch_weights(big_task) == path  # from disk
        assert transport.moved_bytes == len(BIG)  # no byte twice

    against(server, tmp_path, scene)
    begins = [ranges_of(request)[0][0] for request in server.asked]
    assert begins[0] == 0 and begins == sorted(begins) and len(begins) >= len(BIG) // 100_000
    assert all(ranges_of(request)[0][1] == len(BIG) for request in server.asked)
    assert server.credits[0] == FIRST_WINDOW_BYTES


def test_a_download_goes_on_at_the_byte_in_the_next_run_of_the_agent(
    server: Server, tmp_path: Path, big_task: Task
) -> None:
    partial = tmp_path / "weights" / f"{big_task.weights_digest}.safetensors.partial"

    async def away(transport: GrpcTransport) -> None:
        server.cut_after = 0
        with pytest.raises(UnreachableError, match=r": cut$"):  # nothing moved: it is for the agent to wait
            await transport.fetch_weights(big_task)
        partial.write_bytes(BIG[:1001])

    async def back(transport: GrpcTransport) -> None:
        server.cut_after = None
        assert (await transport.fetch_weights(big_task)).read_bytes() == BIG

    against(server, tmp_path, away)
    against(server, tmp_path, back)
    assert [ranges_of(request) for request in server.asked] == [[(0, len(BIG))], [(1001, len(BIG))]]


def test_weights_with_another_digest_are_not_kept(server: Server, tmp_path: Path, big_task: Task) -> None:
    async def scene(transport: GrpcTransport) -> None:
        server.weights.write_bytes(b"x" + BIG[1:])
        with pytest.raises(ProtocolError, match="sha256 is"):
            await transport.fetch_weights(big_task)
        assert list((tmp_path / "weights").iterdir()) == []
        server.weights.write_bytes(BIG)
        assert (await transport.fetch_weights(big_task)).read_bytes() == BIG

    against(server, tmp_path, scene)
    assert [request.verify for request in server.asked] == [False, True]  # the coordinator should look at its own


def test_weights_damaged_on_disk_are_fetched_again(server: Server, tmp_path: Path, big_task: Task) -> None:
    async def scene(transport: GrpcTransport) -> None:
        path = await transport.fetch_weights(big_task)
        path.write_bytes(b"x" + BIG[1:])
        assert (await transport.fetch_weights(big_task)).read_bytes() == BIG

    against(server, tmp_path, scene)


def test_the_graph_is_fetched_once_and_kept_apart(server: Server, tmp_path: Path, big_task: Task) -> None:
    task = replace(big_task, graph_digest=big_task.weights_digest, graph_bytes=big_task.weights_bytes)

    async def scene(transport: GrpcTransport) -> None:
        server.cut_after = 300_000
        path = await transport.fetch_graph(task)
        assert path == tmp_path / "graphs" / f"{task.graph_digest}.json"
        assert path.read_bytes() == BIG
        assert await transport.fetch_graph(task) == path  # from disk
        path.write_bytes(b"x" + BIG[1:])
        assert (await transport.fetch_graph(task)).read_bytes() == BIG

    against(server, tmp_path, scene)
    assert [ranges_of(request)[0][0] for request in server.asked].count(0) == 2


@pytest.mark.parametrize("size", [0, -1, MOST_BYTES + 1])
def test_a_graph_of_a_size_that_no_model_has_is_refused(
    server: Server, tmp_path: Path, big_task: Task, size: int
) -> None:
    server.task_reply = server.task(replace(big_task, graph_bytes=size))

    async def scene(transport: GrpcTransport) -> None:
        with pytest.raises(ProtocolError, match="graph"):
            await transport.next_task(REPORT, 30)

    against(server, tmp_path, scene)


def test_only_the_newest_two_weights_are_kept(server: Server, tmp_path: Path, big_task: Task) -> None:
    async def scene(transport: GrpcTransport) -> None:
        for content in (b"first", b"second", b"third"):
            server.weights.write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            await transport.fetch_weights(replace(big_task, weights_digest=digest, weights_bytes=len(content)))
        kept = {path.read_bytes() for path in (tmp_path / "weights").iterdir()}
        assert kept == {b"second", b"third"}

    against(server, tmp_path, scene)


def test_a_download_fails_when_nothing_moves(server: Server, tmp_path: Path, big_task: Task) -> None:
    server.cut_after, server.silent = 0, True

    async def scene(transport: GrpcTransport) -> None:
        with pytest.raises(UnreachableError, match=r"nothing moved for 0\.2 s"):
            await transport.fetch_weights(big_task)

    against(server, tmp_path, scene, stall_s=0.2)


def test_an_upload_fails_when_nothing_moves(
    server: Server, tmp_path: Path, make_result: Callable[..., tuple[Result, Path]]
) -> None:
    server.silent = True
    entry = Outbox(tmp_path).put(*make_result("t1", b"x"))

    async def scene(transport: GrpcTransport) -> None:
        with pytest.raises(UnreachableError, match=r"nothing moved for 0\.2 s"):
            await transport.deliver(entry)

    against(server, tmp_path, scene, stall_s=0.2)


def test_an_upload_that_is_cut_goes_on_at_the_byte_and_is_committed(
    server: Server, tmp_path: Path, make_result: Callable[..., tuple[Result, Path]]
) -> None:
    result, parts = make_result("t1", BIG, b"small")
    entry = Outbox(tmp_path).put(result, parts)

    async def scene(transport: GrpcTransport) -> None:
        server.cut_after = 0
        with pytest.raises(UnreachableError):
            await transport.deliver(entry)
        server.cut_after = 100_000
        assert await transport.deliver(entry) == Accepted(3)
        assert transport.moved_bytes < 1.2 * len(BIG)  # the first cut teaches

    against(server, tmp_path, scene)
    assert server.held == {0: BIG, 1: b"small"}
    *headers, commit = server.asked
    assert len(headers) > len(BIG) // 200_000 and headers[-1].part == 1
    assert headers[0].digest == result.parts[0].digest
    assert from_message(commit.result, Result) == result


@pytest.mark.parametrize("claims", [[-1], [BIG_MORE], [0, 5]])
def test_a_coordinator_that_claims_to_hold_what_was_not_sent_is_not_believed(
    server: Server, tmp_path: Path, make_result: Callable[..., tuple[Result, Path]], claims: list[int]
) -> None:
    class Claiming(Server):
        async def UploadPart(  # type: ignore[override]
            self, request_iterator: Any, context: Any
        ) -> AsyncIterator[pb.UploadPartReply]:
            for held in claims:
                yield pb.UploadPartReply(held_bytes=held)
            await asyncio.Event().wait()

    entry = Outbox(tmp_path).put(*make_result("t1", b"x"))

    async def scene(transport: GrpcTransport) -> None:
        with pytest.raises(ProtocolError, match=rf"claims to hold {claims[-1]} of 1 bytes"):
            await transport.deliver(entry)

    against(Claiming(server.weights), tmp_path, scene)


def test_a_coordinator_that_sends_more_than_was_asked_for_is_not_believed(
    server: Server, tmp_path: Path, big_task: Task
) -> None:
    class Pushing(Server):
        async def FetchFile(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.Chunk]:  # type: ignore[override]
            yield pb.Chunk(offset=0, data=BIG[: 1 << 18])
            await asyncio.Event().wait()

    async def scene(transport: GrpcTransport) -> None:
        with pytest.raises(ProtocolError, match="sent 262144 bytes, asked for were 4096"):
            await transport.fetch_weights(big_task)
        assert sum(path.stat().st_size for path in (tmp_path / "weights").iterdir()) == 0

    against(Pushing(server.weights), tmp_path, scene)


def test_what_is_under_way_stays_small_on_a_link_that_is_cut_often(
    server: Server, tmp_path: Path, big_task: Task
) -> None:
    async def scene(transport: GrpcTransport) -> None:
        server.cut_after = 20_000
        await transport.fetch_weights(replace(big_task, weights_bytes=len(BIG)))

    against(server, tmp_path, scene)
    assert max(server.credits[-5:]) <= 20_000 + LEAST_WINDOW_BYTES


def test_a_refusal_in_the_middle_of_an_upload_is_told(
    server: Server, tmp_path: Path, make_result: Callable[..., tuple[Result, Path]]
) -> None:
    entry = Outbox(tmp_path).put(*make_result("t1", BIG))
    server.upload_reply = pb.UploadPartReply(refused=pb.Refused(reason="late", message="round 3 is closed"))

    async def scene(transport: GrpcTransport) -> None:
        for _ in range(50):  # as the agent does: grpc may say "cut" where the reply came during a write
            with contextlib.suppress(UnreachableError):
                assert await transport.deliver(entry) == Refused("late", "round 3 is closed")
                return
        raise AssertionError("never told")

    against(server, tmp_path, scene)


def test_failure_and_progress_are_told(server: Server, tmp_path: Path) -> None:
    failure = Failure("t1", 1, "device", Outcome.DECLINED, "34.1 MiB", 7, 5)

    async def scene(transport: GrpcTransport) -> None:
        assert await transport.report_failure(failure)
        assert await transport.report_progress(Progress("t1", 1, "device", "training"))
        assert not await transport.report_progress(Progress("t1", 1, "device", "training", stage=1))

    against(server, tmp_path, scene)
    assert from_message(server.asked[0], Failure) == failure


def test_an_unreachable_coordinator_is_named(tmp_path: Path) -> None:
    async def play() -> None:
        transport = GrpcTransport("127.0.0.1:1", tmp_path, INSECURE)
        with pytest.raises(UnreachableError, match=r"^127\.0\.0\.1:1: Connection refused$"):
            await transport.next_task(REPORT, 1)
        await transport.close()

    asyncio.run(play())


def test_a_call_that_the_server_lacks_is_not_taken_for_an_outage(tmp_path: Path) -> None:
    async def scene(transport: GrpcTransport) -> None:
        with pytest.raises(TransportError, match="does not know what this version calls") as caught:
            await transport.next_task(REPORT, 1)
        assert not isinstance(caught.value, UnreachableError)

    class Bare(Server):
        async def NextTask(self, request: pb.NextTaskRequest, context: Any) -> pb.NextTaskReply:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "none")
            raise AssertionError

    against(Bare(tmp_path), tmp_path, scene)


@dataclass
class Aborting(Server):
    """Ends every call that hands out tasks or takes an update with one status."""

    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""

    async def NextTask(self, request: pb.NextTaskRequest, context: Any) -> pb.NextTaskReply:
        await context.abort(self.code, self.details)
        raise AssertionError

    async def UploadPart(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.UploadPartRequest], context: Any
    ) -> AsyncIterator[pb.UploadPartReply]:
        await context.abort(self.code, self.details)
        yield pb.UploadPartReply()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("UNAVAILABLE", UnreachableError),
        ("DEADLINE_EXCEEDED", UnreachableError),
        ("CANCELLED", UnreachableError),
        ("RESOURCE_EXHAUSTED", BusyError),
        ("ABORTED", ServerError),
        ("INTERNAL", ServerError),
        ("UNKNOWN", ServerError),
        ("DATA_LOSS", ServerError),
        ("INVALID_ARGUMENT", TransportError),
        ("FAILED_PRECONDITION", TransportError),
        ("NOT_FOUND", TransportError),
        ("UNIMPLEMENTED", TransportError),
    ],
)
def test_every_status_says_whether_to_try_again(
    server: Server,
    tmp_path: Path,
    make_result: Callable[..., tuple[Result, Path]],
    code: str,
    kind: type[TransportError],
) -> None:
    entry = Outbox(tmp_path).put(*make_result("t1", b"x"))

    async def scene(transport: GrpcTransport) -> None:
        for call in (transport.next_task(REPORT, 1), transport.deliver(entry)):
            with pytest.raises(TransportError, match="so it is") as caught:
                await call
            assert type(caught.value) is kind
            assert isinstance(caught.value, TemporaryError) == (kind is not TransportError)

    against(Aborting(server.weights, code=grpc.StatusCode[code], details="so it is"), tmp_path, scene)


@pytest.mark.parametrize(
    ("details", "after_s"),
    [
        ("the disk has 12 MB free, 80 MB are needed; come back in 20 s", 20.0),
        ("too many uploads; come back in 2.5 s", 2.5),
        ("the disk is full", None),
        ("come back in 20 s, or so", None),
        ("too much; come back in 99999999999999999999 s", None),
    ],
)
def test_a_busy_coordinator_says_when_to_come_back(
    server: Server, tmp_path: Path, details: str, after_s: float | None
) -> None:
    async def scene(transport: GrpcTransport) -> None:
        with pytest.raises(BusyError) as caught:
            await transport.next_task(REPORT, 1)
        assert (str(caught.value), caught.value.after_s) == (f"{transport.address}: {details}", after_s)

    busy = Aborting(server.weights, code=grpc.StatusCode.RESOURCE_EXHAUSTED, details=details)
    against(busy, tmp_path, scene)


def test_a_message_that_is_too_large_is_not_taken_for_a_busy_coordinator(server: Server, tmp_path: Path) -> None:
    async def scene(transport: GrpcTransport) -> None:
        with pytest.raises(TransportError, match="larger than max") as caught:
            await transport.next_task(replace(REPORT, name="x" * (5 << 20)), 1)
        assert not isinstance(caught.value, TemporaryError)

    against(server, tmp_path, scene)


def test_a_file_that_cannot_be_kept_or_read_says_where(
    server: Server, tmp_path: Path, big_task: Task, make_result: Callable[..., tuple[Result, Path]]
) -> None:
    entry = Outbox(tmp_path).put(*make_result("t1", b"x"))
    (entry.folder / "part-0000.safetensors").unlink()
    (tmp_path / "weights").touch()

    async def scene(transport: GrpcTransport) -> None:
        with pytest.raises(DiskError, match=r"cannot be fetched and kept: .*/weights/.*: Not a directory"):
            await transport.fetch_weights(big_task)
        with pytest.raises(DiskError, match=r"part-0000\.safetensors cannot be read: .*No such file"):
            await transport.deliver(entry)

    against(server, tmp_path, scene)
