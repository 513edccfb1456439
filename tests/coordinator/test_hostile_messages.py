"""What a device says over a real connection: out of bounds, it ends in a status and a sentence, not in the job."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from fedepth_wire.channel import MESSAGE_LIMIT_BYTES, SERVER_OPTIONS
from fedepth_wire.convert import to_message
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationStub, add_FederationServicer_to_server

from coordinator.service import FederationService
from fedepth.job import model_spec
from fedepth.task import Outcome

Play = Callable[[Callable[[Any], Awaitable[None]]], None]


@pytest.fixture
def play(kit: Any) -> Play:
    """Runs a scene with a stub of a service whose job only takes note of rejections: any other use is a failure."""

    async def served(scene: Callable[[Any], Awaitable[None]]) -> None:
        config = kit.config()
        server = grpc.aio.server(options=SERVER_OPTIONS)
        noted: list[Any] = []
        job: Any = SimpleNamespace(
            config=config,
            model=model_spec(config),
            rejected=lambda *rejection: noted.append(rejection),
            uploads=SimpleNamespace(limit_parts=9),
        )
        add_FederationServicer_to_server(FederationService(job), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        # A device with settings of its own: nothing holds it to ours.
        unlimited = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=unlimited) as channel:
                await scene(FederationStub(channel))
        finally:
            await server.stop(0)

    return lambda scene: asyncio.run(served(scene))


async def status(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


def test_a_message_larger_than_a_chunk_is_not_received(play: Play) -> None:
    async def scene(stub: Any) -> None:
        report = pb.DeviceReport(class_counts=[1] * (4 << 20))
        code, said = await status(stub.NextTask(pb.NextTaskRequest(device=report)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(MESSAGE_LIMIT_BYTES) in said

    play(scene)


def test_a_report_out_of_bounds_is_refused_before_it_is_read(play: Play, kit: Any) -> None:
    async def scene(stub: Any) -> None:
        report = to_message(kit.report("a"), pb.DeviceReport)
        report.class_counts.extend([1] * 1_000_000)
        code, said = await status(stub.NextTask(pb.NextTaskRequest(device=report)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert said == "a report has 1000002 names and counts; more than 8192 go by digest"

    play(scene)


def test_a_report_beyond_the_operators_limit_is_rejected_with_the_number(play: Play, kit: Any) -> None:
    async def scene(stub: Any) -> None:
        report = to_message(kit.report("a"), pb.DeviceReport)
        report.sample_count = 10_000_001
        reply = await stub.NextTask(pb.NextTaskRequest(device=report))
        assert "reports 10000001 samples, the job allows 10000000" in reply.rejected.message
        report.sample_count = (1 << 63) - 1
        code, said = await status(stub.NextTask(pb.NextTaskRequest(device=report)))
        assert (code, "DeviceReport.sample_count is 9223372036854775807" in said) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            True,
        )

    play(scene)


def test_results_failures_and_progress_out_of_bounds_are_refused(play: Play) -> None:
    async def scene(stub: Any) -> None:
        outcome = pb.Outcome.Value(f"OUTCOME_{Outcome.DATA.name}")
        calls = {
            "an update says 10 things of its parts, stages or units; at most 9 can be": stub.CommitUpdate(
                pb.CommitUpdateRequest(result=pb.Result(plan=pb.Plan(stages=[pb.Stage()] * 10)))
            ),
            "Result.sample_count is -1": stub.CommitUpdate(pb.CommitUpdateRequest(result=pb.Result(sample_count=-1))),
            "Failure.message has 4097": stub.ReportFailure(pb.Failure(message="x" * 4097, outcome=outcome)),
            "Progress.stage is -1": stub.ReportProgress(pb.Progress(stage=-1)),
        }
        for said, call in calls.items():
            assert said in (await status(call))[1]

    play(scene)


def test_a_header_out_of_bounds_is_refused(play: Play) -> None:
    async def requests() -> AsyncIterator[pb.UploadPartRequest]:
        yield pb.UploadPartRequest(header=pb.UploadHeader(task_id="t" * 1000))

    async def scene(stub: Any) -> None:
        assert "UploadHeader.task_id has 1000 characters" in (await status(stub.UploadPart(requests()).read()))[1]

    play(scene)
