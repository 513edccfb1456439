"""The servicer: messages in, calls of the job, messages out; it decides only how long a call may wait.

What goes wrong here is told in gRPC's statuses, in one place (`_answering`): a device must know whether to send
something else (INVALID_ARGUMENT), the same again from where it broke (ABORTED), or the same later (RESOURCE_EXHAUSTED).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, NoReturn

import grpc
import structlog
from fedepth_wire.bounds import check_message
from fedepth_wire.chunks import checked_chunks
from fedepth_wire.convert import from_message, to_message
from fedepth_wire.tls import caller_of
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationServicer

from coordinator.admission import check_report, check_settings, counted_for
from coordinator.job import Job
from coordinator.survey import Survey
from coordinator.uploads import PartHeader
from fedepth.errors import FedepthError, PlanError, ProtocolError, TransportError, UnavailableError, UpdateError
from fedepth.job import training_spec
from fedepth.task import DeviceReport, Failure, Progress, Result

LONGEST_WAIT_MS = 60_000
SPREAD_MS = 1_000  # reconnects of many devices are spread over this
REJECTED_RETRY_MS = 30_000
BUSY_RETRY_MS = 20_000

Context = grpc.aio.ServicerContext[Any, Any]
_log = structlog.get_logger()


class FederationService(FederationServicer):
    """Serves one job, once there is one; before, what has to be asked of devices (coordinator.survey)."""

    def __init__(self, job: Job | None = None) -> None:
        self._serving = job
        self._survey: Survey | None = None

    def ask(self, survey: Survey) -> None:
        """Answers devices as this survey does, until there is a job."""
        self._survey = survey

    def serve(self, job: Job) -> None:
        """Answers devices as this job does."""
        self._serving, self._survey = job, None

    @property
    def _job(self) -> Job:
        if self._serving is None:
            raise UnavailableError("the job has not begun yet")
        return self._serving

    async def NextTask(self, request: pb.NextTaskRequest, context: Context) -> pb.NextTaskReply:
        async with _answering(context):
            report = from_message(request.device, DeviceReport)
            caller = caller_of(context.auth_context())
            if caller is not None:  # by the name that the operator gave it, whatever it calls itself
                report = replace(report, name=caller.name)
            try:
                return await self._next_task(report, request.wait_ms, context.peer())
            except UnavailableError as error:
                return _retry(BUSY_RETRY_MS, f"busy: {error}")

    async def _next_task(self, report: DeviceReport, wait_ms: int, peer: str) -> pb.NextTaskReply:
        if self._survey is not None:
            return self._survey.answer(report)
        job = self._job
        report = counted_for(report, job.model.classes)
        problem = check_report(report, job.model.classes, job.config.limits, job.model.first_label)
        problem = problem or check_settings(report, training_spec(job.config, job.state.round))
        if problem:
            return self._rejected(report, problem)
        refusal = await job.fleet.see(report, peer)
        if refusal is not None:
            return self._rejected(report, refusal.message, refusal.reason)
        if job.finished.is_set():
            return self._finished(report.device_id)
        try:
            plan = await job.plan_for(report)
        except PlanError as error:
            return self._rejected(report, str(error))
        if job.finished.is_set():  # while the plan was made
            return self._finished(report.device_id)
        answer = await job.start_waiting(report, plan)
        try:
            await asyncio.wait({answer}, timeout=min(max(wait_ms, 0), LONGEST_WAIT_MS) / 1000)
        finally:  # also when the device hangs up
            job.stop_waiting(report.device_id, answer)
        task = answer.result() if answer.done() else None
        if task is not None:
            return pb.NextTaskReply(task=to_message(task, pb.Task))
        if job.finished.is_set():
            return self._finished(report.device_id)
        return _retry(random.randrange(SPREAD_MS), job.why_wait())

    def _rejected(self, report: DeviceReport, message: str, reason: str = "") -> pb.NextTaskReply:
        self._job.rejected(report, message, reason)
        rejected = pb.Rejected(message=message, retry_after_ms=REJECTED_RETRY_MS, reason=reason)
        return pb.NextTaskReply(rejected=rejected)

    def _finished(self, device_id: str) -> pb.NextTaskReply:
        self._job.informed.add(device_id)
        section = self._job.config.job
        return pb.NextTaskReply(finished=pb.JobFinished(job=section.name, rounds=section.rounds))

    async def FetchFile(self, request: pb.FetchFileRequest, context: Context) -> AsyncIterator[pb.Chunk]:
        async with _answering(context):
            check_message(request)
            found = await self._job.file_of(request.digest)
            if found is None:
                missing = ProtocolError(f"no file with sha256 {request.digest[:12]!r} here; ask for a new task")
                await _abort(context, grpc.StatusCode.NOT_FOUND, missing)
            path, size = found
            if not 0 <= request.offset <= size:
                beyond = ProtocolError(f"offset {request.offset} in a file of {size} bytes")
                await _abort(context, grpc.StatusCode.OUT_OF_RANGE, beyond)
            try:
                async for chunk in checked_chunks(path, request.offset, request.digest):
                    yield chunk
            except (ProtocolError, OSError) as error:
                self._job.suspect(request.digest)
                raise UnavailableError(f"a file cannot be sent, and is being looked at: {error}") from error

    async def UploadOffset(self, request: pb.UploadOffsetRequest, context: Context) -> pb.UploadOffsetReply:
        async with _answering(context):
            check_message(request)
            uploads = self._job.uploads
            held = await uploads.offset(request.task_id, request.attempt, request.part, request.digest)
            return pb.UploadOffsetReply(offset=held)

    async def UploadPart(
        self, request_iterator: AsyncIterator[pb.UploadPartRequest], context: Context
    ) -> pb.UploadPartReply:
        async with _answering(context, unreadable=grpc.StatusCode.ABORTED):
            first = await anext(request_iterator, None)
            if first is None or first.WhichOneof("content") != "header":
                raise ProtocolError("an upload begins with its header")
            check_message(first)
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
            try:
                held = await self._job.uploads.receive(header, self._chunks(request_iterator, header.task_id))
            except UpdateError as error:
                await self._job.refuse(sent.task_id, sent.attempt, sent.device_id, error)
                return pb.UploadPartReply(refused=pb.Refused(reason=error.reason, message=str(error)))
            return pb.UploadPartReply(held_bytes=held)

    async def _chunks(self, requests: AsyncIterator[pb.UploadPartRequest], task_id: str) -> AsyncIterator[pb.Chunk]:
        async for request in requests:
            if request.WhichOneof("content") != "chunk":
                raise ProtocolError("only the first message of an upload is a header")
            await self._job.touch(task_id)
            yield request.chunk

    async def CommitUpdate(self, request: pb.CommitUpdateRequest, context: Context) -> pb.CommitUpdateReply:
        async with _answering(context):
            result = from_message(request.result, Result)
        # The device keeps the update and sends what is missing.
        async with _answering(context, unreadable=grpc.StatusCode.ABORTED):
            try:
                round_number = await self._job.commit(result)
            except UpdateError as error:
                return pb.CommitUpdateReply(refused=pb.Refused(reason=error.reason, message=str(error)))
            return pb.CommitUpdateReply(accepted=pb.Accepted(round=round_number))

    async def ReportFailure(self, request: pb.Failure, context: Context) -> pb.Ack:
        async with _answering(context):
            failure = from_message(request, Failure)
            return pb.Ack(wanted=await self._job.failed(failure))

    async def ReportProgress(self, request: pb.Progress, context: Context) -> pb.Ack:
        async with _answering(context):
            progress = from_message(request, Progress)
            return pb.Ack(wanted=await self._job.progressed(progress))

    async def JobStatus(self, request: pb.JobStatusRequest, context: Context) -> pb.JobStatusReply:
        async with _answering(context):
            if self._survey is not None:
                return pb.JobStatusReply(**self._survey.status())
            return pb.JobStatusReply(**await self._job.status())

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.Event]:
        async with _answering(context):
            async for line in self._job.events.watch(self._job.state_event()):
                yield pb.Event(json=line)


def _retry(after_ms: int, reason: str) -> pb.NextTaskReply:
    return pb.NextTaskReply(retry=pb.RetryLater(retry_after_ms=after_ms, reason=reason))


@asynccontextmanager
async def _answering(
    context: Context, unreadable: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT
) -> AsyncIterator[None]:
    """Ends a call with the status that says what a device should do about an error of ours."""
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except ProtocolError as error:
        await _abort(context, unreadable, error)
    except (UnavailableError, OSError) as error:
        busy = UnavailableError(f"busy: {error}; come back in {BUSY_RETRY_MS // 1000} s")
        await _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, busy)
    except TransportError as error:
        await _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, error)
    except FedepthError as error:  # of the state: the job finds it too, and ends with it
        _log.error("a call failed", error=str(error))
        await _abort(context, grpc.StatusCode.INTERNAL, error)
    except Exception as error:  # noqa: BLE001 - logged, and told to the device as what it is
        # A mistake of ours: the device must not take it for its own, and it belongs into the log.
        _log.exception("a call failed on an unexpected error")
        await _abort(context, grpc.StatusCode.INTERNAL, error)


async def _abort(context: Context, code: grpc.StatusCode, error: Exception) -> NoReturn:
    await context.abort(code, str(error))
    raise error  # not reached: abort raises
