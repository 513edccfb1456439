"""The servicer: messages in, calls of the job, messages out; it decides only how long a call may wait."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc
from fedepth_wire.chunks import file_chunks
from fedepth_wire.convert import from_message, to_message
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationServicer

from coordinator.job import Job
from coordinator.uploads import PartHeader
from fedepth.errors import PlanError, ProtocolError, TransportError, UpdateError
from fedepth.task import DeviceReport, Failure, Progress, Result

LONGEST_WAIT_MS = 60_000
SPREAD_MS = 1_000  # reconnects of many devices are spread over this
REJECTED_RETRY_MS = 30_000

_DEVICE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Context = grpc.aio.ServicerContext[Any, Any]


def objection(report: DeviceReport, classes: tuple[str, ...]) -> str:
    """Why this device cannot take part as it is; empty if it can."""
    if not _DEVICE_ID.fullmatch(report.device_id):
        return f"device id {report.device_id[:80]!r} is not 1 to 64 letters, digits, '.', '_' or '-'"
    if not 0 < len(report.name) <= 200:
        return f"a device name has 1 to 200 characters, this one has {len(report.name)}"
    # A device that does not know the job's classes yet may hold samples of only some of them.
    if len(report.class_counts) > len(classes):
        return (
            f"the data has {len(report.class_counts)} classes, the job has {len(classes)}: "
            f"{', '.join(classes)}; give the device data with the job's classes"
        )
    if report.sample_count <= 0:
        return "the device has no training samples; add data and ask again"
    return ""


class FederationService(FederationServicer):
    """Serves one job."""

    def __init__(self, job: Job) -> None:
        self._job = job

    async def NextTask(self, request: pb.NextTaskRequest, context: Context) -> pb.NextTaskReply:
        try:
            report = from_message(request.device, DeviceReport)
        except ProtocolError as error:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, error)
        job = self._job
        problem = objection(report, job.model.classes)
        if problem:
            return _rejected(problem)
        job.see(report)
        if job.finished.is_set():
            return self._finished(report.device_id)
        try:
            plan = await job.plan_for(report)
        except PlanError as error:
            job.events.send("log", message=f"{report.name} cannot take part: {error}", device=report.name)
            return _rejected(str(error))
        if job.finished.is_set():  # while the plan was made
            return self._finished(report.device_id)
        answer = job.start_waiting(report, plan)
        try:
            await asyncio.wait({answer}, timeout=min(max(request.wait_ms, 0), LONGEST_WAIT_MS) / 1000)
        finally:  # also when the device hangs up
            job.stop_waiting(report.device_id, answer)
        task = answer.result() if answer.done() else None
        if task is not None:
            return pb.NextTaskReply(task=to_message(task, pb.Task))
        if job.finished.is_set():
            return self._finished(report.device_id)
        return pb.NextTaskReply(retry=pb.RetryLater(retry_after_ms=random.randrange(SPREAD_MS)))

    def _finished(self, device_id: str) -> pb.NextTaskReply:
        self._job.informed.add(device_id)
        section = self._job.config.job
        return pb.NextTaskReply(finished=pb.JobFinished(job=section.name, rounds=section.rounds))

    async def FetchFile(self, request: pb.FetchFileRequest, context: Context) -> AsyncIterator[pb.Chunk]:
        found = self._job.file_of(request.digest)
        if found is None:
            missing = ProtocolError(f"no file with sha256 {request.digest[:12]}… here; ask for a new task")
            await _abort(context, grpc.StatusCode.NOT_FOUND, missing)
        path, size = found
        if not 0 <= request.offset <= size:
            beyond = ProtocolError(f"offset {request.offset} in a file of {size} bytes")
            await _abort(context, grpc.StatusCode.OUT_OF_RANGE, beyond)
        for chunk in file_chunks(path, request.offset):
            yield chunk

    async def UploadOffset(self, request: pb.UploadOffsetRequest, context: Context) -> pb.UploadOffsetReply:
        uploads = self._job.uploads
        held = await uploads.offset(request.task_id, request.attempt, request.part, request.digest)
        return pb.UploadOffsetReply(offset=held)

    async def UploadPart(
        self, request_iterator: AsyncIterator[pb.UploadPartRequest], context: Context
    ) -> pb.UploadPartReply:
        try:
            first = await anext(request_iterator, None)
            if first is None or first.WhichOneof("content") != "header":
                raise ProtocolError("an upload begins with its header")
            sent = first.header
            header = PartHeader(
                sent.task_id,
                sent.attempt,
                sent.device_id,
                sent.part,
                sent.offset,
                sent.size_bytes,
                sent.digest,
            )
            chunks = self._chunks(request_iterator, header.task_id)
            held = await self._job.uploads.receive(header, chunks)
        except UpdateError as error:
            self._job.refuse(sent.task_id, sent.device_id, error)
            return pb.UploadPartReply(refused=pb.Refused(reason=error.reason, message=str(error)))
        except ProtocolError as error:  # to be tried again from the offset that is held
            await _abort(context, grpc.StatusCode.ABORTED, error)
        return pb.UploadPartReply(held_bytes=held)

    async def _chunks(self, requests: AsyncIterator[pb.UploadPartRequest], task_id: str) -> AsyncIterator[pb.Chunk]:
        async for request in requests:
            if request.WhichOneof("content") != "chunk":
                raise ProtocolError("only the first message of an upload is a header")
            self._job.touch(task_id)
            yield request.chunk

    async def CommitUpdate(self, request: pb.CommitUpdateRequest, context: Context) -> pb.CommitUpdateReply:
        try:
            result = from_message(request.result, Result)
        except ProtocolError as error:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, error)
        try:
            round_number = await self._job.commit(result)
        except UpdateError as error:
            return pb.CommitUpdateReply(refused=pb.Refused(reason=error.reason, message=str(error)))
        except ProtocolError as error:  # the device keeps the update and sends what is missing
            await _abort(context, grpc.StatusCode.ABORTED, error)
        return pb.CommitUpdateReply(accepted=pb.Accepted(round=round_number))

    async def ReportFailure(self, request: pb.Failure, context: Context) -> pb.Ack:
        try:
            failure = from_message(request, Failure)
        except ProtocolError as error:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, error)
        return pb.Ack(wanted=self._job.failed(failure))

    async def ReportProgress(self, request: pb.Progress, context: Context) -> pb.Ack:
        try:
            progress = from_message(request, Progress)
        except ProtocolError as error:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, error)
        return pb.Ack(wanted=self._job.progressed(progress))

    async def JobStatus(self, request: pb.JobStatusRequest, context: Context) -> pb.JobStatusReply:
        return pb.JobStatusReply(**self._job.status())

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.Event]:
        try:
            async for line in self._job.events.watch(self._job.state_event()):
                yield pb.Event(json=line)
        except TransportError as error:
            await _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, error)


def _rejected(message: str) -> pb.NextTaskReply:
    return pb.NextTaskReply(rejected=pb.Rejected(message=message, retry_after_ms=REJECTED_RETRY_MS))


async def _abort(context: Context, code: grpc.StatusCode, error: Exception) -> NoReturn:
    await context.abort(code, str(error))
    raise error  # not reached: abort raises
