"""The servicer: messages in, calls of the job, messages out; it decides only how long a call may wait.

What goes wrong here is told in gRPC's statuses, in one place (`_answering`): a device must know whether to send
something else (INVALID_ARGUMENT), the same again from where it broke (ABORTED), or the same later (RESOURCE_EXHAUSTED).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, NoReturn, ParamSpec, TypeVar

import grpc
import structlog
from fedepth_wire.bounds import CHUNK_BYTES, check_message
from fedepth_wire.chunks import Pieces
from fedepth_wire.convert import from_message
from fedepth_wire.pace import LEAST_PIECE_BYTES
from fedepth_wire.task_messages import task_message
from fedepth_wire.times import BUSY_RETRY_S, LONGEST_POLL_S, REJECTED_RETRY_S, STALL_S
from fedepth_wire.tls import caller_of
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationServicer

from coordinator.admission import check_report, check_settings
from coordinator.device_data import DeviceData, check_inline
from coordinator.job import Job
from coordinator.survey import Survey
from coordinator.uploads import PartHeader
from fedepth.errors import FedepthError, PlanError, ProtocolError, TransportError, UnavailableError, UpdateError
from fedepth.job import training_spec
from fedepth.task import DeviceReport, Failure, Progress, Result
from fedepth.timeout import within

SPREAD_MS = 1_000  # reconnects of many devices are spread over this
VERIFIED_S = 3 * BUSY_RETRY_S  # so long a file that was found sound counts as sound, for those who were sent away too

P = ParamSpec("P")
T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]
_log = structlog.get_logger()


class FederationService(FederationServicer):
    """Serves one job, once there is one; before, what has to be asked of devices (coordinator.survey)."""

    def __init__(self, job: Job | None = None, stall_s: float = STALL_S) -> None:
        self._serving = job
        self._survey: Survey | None = None
        self._stall_s = stall_s
        self._data = DeviceData()
        self._one_at_a_time = asyncio.Lock()
        self._verifying: dict[str, asyncio.Task[None]] = {}  # by digest
        self._verified: dict[str, float] = {}  # when, by digest

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
        context.set_compression(grpc.Compression.Gzip)
        async with _answering(context):
            check_inline(request.device)
            check_message(request)
            try:
                survey = self._survey  # which may end while a report is read
                classes = self._job.model.classes if survey is None else survey.classes
                report = await self._data.report(request.device, classes)
                if report is None:
                    return pb.NextTaskReply(describe=pb.Describe())
                caller = caller_of(context.auth_context())
                if caller is not None:  # by the name that the operator gave it, whatever it calls itself
                    report = replace(report, name=caller.name)
                if survey is not None:
                    return survey.answer(report)
                return await self._next_task(report, request.wait_ms, context.peer())
            except UnavailableError as error:
                return _retry(int(BUSY_RETRY_S * 1000), f"busy: {error}")

    async def _next_task(self, report: DeviceReport, wait_ms: int, peer: str) -> pb.NextTaskReply:
        job = self._job
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
            await asyncio.wait({answer}, timeout=min(max(wait_ms, 0) / 1000, LONGEST_POLL_S))
        finally:  # also when the device hangs up
            job.stop_waiting(report.device_id, answer)
        task = answer.result() if answer.done() else None
        if task is not None:
            return pb.NextTaskReply(task=task_message(task, job.model_source))
        if job.finished.is_set():
            return self._finished(report.device_id)
        return _retry(random.randrange(SPREAD_MS), job.why_wait())

    def _rejected(self, report: DeviceReport, message: str, reason: str = "") -> pb.NextTaskReply:
        self._job.rejected(report, message, reason)
        rejected = pb.Rejected(message=message, retry_after_ms=int(REJECTED_RETRY_S * 1000), reason=reason)
        return pb.NextTaskReply(rejected=rejected)

    def _finished(self, device_id: str) -> pb.NextTaskReply:
        self._job.informed.add(device_id)
        section = self._job.config.job
        return pb.NextTaskReply(finished=pb.JobFinished(job=section.name, rounds=section.rounds))

    async def FetchFile(  # type: ignore[override]  # the stubs know handlers that yield, and this one must not wait for ever
        self, request_iterator: AsyncIterator[pb.FetchFileRequest], context: Context
    ) -> None:
        async with _answering(context):
            asked = await self._asked(context)
            if asked is None:
                raise ProtocolError("a fetch begins with what is wanted")
            source = await self._job.file_of(asked.digest)
            if source is None:
                missing = ProtocolError(f"no file with sha256 {asked.digest[:12]!r} here; ask for a new task")
                await _abort(context, grpc.StatusCode.NOT_FOUND, missing)
            ranges = [(each.begin, each.end) for each in asked.ranges]
            outside = next((each for each in ranges if not each[0] < each[1] <= source.size_bytes), None)
            if outside is not None:
                beyond = ProtocolError(f"bytes {outside[0]} to {outside[1]} of a file of {source.size_bytes} bytes")
                await _abort(context, grpc.StatusCode.OUT_OF_RANGE, beyond)
            total = sum(end - begin for begin, end in ranges)
            if total > source.size_bytes:
                more = ProtocolError(f"{total} bytes in {len(ranges)} ranges of a file of {source.size_bytes} bytes")
                await _abort(context, grpc.StatusCode.OUT_OF_RANGE, more)
            if asked.verify:
                await self._verify(asked.digest, source.verify)
            pieces = await self._read(asked.digest, source.pieces, ranges)
            try:
                await self._send(asked, pieces, total, context)
            finally:
                await asyncio.to_thread(pieces.close)

    async def _verify(self, digest: str, verify: Callable[[], None]) -> None:
        """Reads a file as a whole and compares its digest. That costs whoever asks a few bytes, so it is done for one
        file at a time, to its end, whoever still waits for it, and not again for a while.

        Raises:
            UnavailableError: it is another file, or not through yet.
        """
        now = time.monotonic()
        self._verified = {each: at for each, at in self._verified.items() if now < at + VERIFIED_S}
        if digest in self._verified:
            return
        if digest not in self._verifying:
            self._verifying[digest] = asyncio.create_task(self._verify_alone(digest, verify))
            self._verifying[digest].add_done_callback(_retrieved)
        task = self._verifying[digest]
        done, _ = await asyncio.wait({task}, timeout=BUSY_RETRY_S)  # which leaves it alone when this call is cancelled
        if not done:
            raise UnavailableError("the file is still being compared with its digest")
        task.result()

    async def _verify_alone(self, digest: str, verify: Callable[[], None]) -> None:
        try:
            async with self._one_at_a_time:
                await self._read(digest, verify)
            self._verified[digest] = time.monotonic()
        finally:
            del self._verifying[digest]

    async def _send(
        self, asked: pb.FetchFileRequest | None, pieces: Pieces, total_bytes: int, context: Context
    ) -> None:
        """Sends pieces of a file, no faster than the device asks for them."""
        digest, sent = asked.digest if asked else "", 0
        while asked is not None and sent < total_bytes:
            while sent < min(asked.credit_bytes, total_bytes):
                # Pieces of a byte would cost us a thousand times what they cost whoever asks for them.
                piece = max(asked.piece_bytes or CHUNK_BYTES, LEAST_PIECE_BYTES)
                most = min(piece, asked.credit_bytes - sent)
                chunk = await self._read(digest, pieces.next, most)
                await self._moving(context.write(chunk), context)
                sent += len(chunk.data)
            if sent < total_bytes:
                asked = await self._asked(context)

    async def _read(self, digest: str, read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Reads the file with this digest, in a thread.

        Raises:
            UnavailableError: that is not possible, or it is another file. The job looks at it.
        """
        try:
            return await asyncio.to_thread(read, *args, **kwargs)
        except (ProtocolError, OSError) as error:
            self._job.suspect(digest)
            raise UnavailableError(f"a file cannot be sent, and is being looked at: {error}") from error

    async def _asked(self, context: Context) -> pb.FetchFileRequest | None:
        """What a device says next of what it wants; None if it wants no more."""
        request = await self._moving(context.read(), context)
        if not isinstance(request, pb.FetchFileRequest):  # grpc.aio.EOF
            return None
        check_message(request)
        return request

    async def DescribeData(  # type: ignore[override]  # see FetchFile
        self, request_iterator: AsyncIterator[pb.UploadPartRequest], context: Context
    ) -> None:
        async with _answering(context, unreadable=grpc.StatusCode.ABORTED):
            header = await self._header(context)

            async def chunks() -> AsyncIterator[pb.Chunk]:
                while (chunk := await self._chunk(context)) is not None:
                    yield chunk

            await self._data.receive(
                header.device_id, header.digest, header.size_bytes, chunks(), self._acknowledge(context)
            )
            sealed = pb.UploadPartReply(sealed=pb.Sealed(size_bytes=header.size_bytes))
            await self._moving(context.write(sealed), context)

    async def UploadPart(  # type: ignore[override]  # see FetchFile
        self, request_iterator: AsyncIterator[pb.UploadPartRequest], context: Context
    ) -> None:
        async with _answering(context, unreadable=grpc.StatusCode.ABORTED):
            sent = await self._header(context)
            header = PartHeader(sent.task_id, sent.attempt, sent.device_id, sent.part, sent.size_bytes, sent.digest)

            async def chunks() -> AsyncIterator[pb.Chunk]:
                while (chunk := await self._chunk(context)) is not None:
                    await self._job.touch(header.task_id)
                    yield chunk

            try:
                await self._job.uploads.receive(header, chunks(), self._acknowledge(context))
            except UpdateError as error:
                await self._job.refuse(sent.task_id, sent.attempt, sent.device_id, error)
                reply = pb.UploadPartReply(refused=pb.Refused(reason=error.reason, message=str(error)))
            else:
                reply = pb.UploadPartReply(sealed=pb.Sealed(size_bytes=header.size_bytes))
            await self._moving(context.write(reply), context)

    async def _header(self, context: Context) -> pb.UploadHeader:
        first = await self._moving(context.read(), context)
        if not isinstance(first, pb.UploadPartRequest) or first.WhichOneof("content") != "header":
            raise ProtocolError("an upload begins with its header")
        check_message(first)
        return first.header

    async def _chunk(self, context: Context) -> pb.Chunk | None:
        """What comes next of an upload; None if that was the last."""
        request = await self._moving(context.read(), context)
        if not isinstance(request, pb.UploadPartRequest):  # grpc.aio.EOF
            return None
        if request.WhichOneof("content") != "chunk":
            raise ProtocolError("only the first message of an upload is a header")
        return request.chunk

    def _acknowledge(self, context: Context) -> Callable[[int], Awaitable[None]]:
        async def acknowledge(held_bytes: int) -> None:
            await self._moving(context.write(pb.UploadPartReply(held_bytes=held_bytes)), context)

        return acknowledge

    async def _moving(self, step: Awaitable[T], context: Context) -> T:
        """One step of a transfer; ends one in which nothing moves."""
        try:
            return await within(self._stall_s, step)
        except asyncio.TimeoutError:
            stalled = TransportError(f"nothing moved for {self._stall_s:g} s")
            await _abort(context, grpc.StatusCode.DEADLINE_EXCEEDED, stalled)

    async def CommitUpdate(self, request: pb.CommitUpdateRequest, context: Context) -> pb.CommitUpdateReply:
        async with _answering(context):
            _check_lengths(request.result, self._job.uploads.limit_parts)
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


def _check_lengths(result: pb.Result, most: int) -> None:
    """Before any of it is converted, which takes the loop's time.

    Args:
        most: parts of an update; it has no more stages, and its plan no more units.

    Raises:
        ProtocolError: something is longer.
    """
    plan = result.plan
    for found in (result.parts, result.stages, result.trained_units, plan.stages, plan.untrained):
        if len(found) > most:
            raise ProtocolError(
                f"an update says {len(found)} things of its parts, stages or units; at most {most} can be"
            )


def _retrieved(task: asyncio.Task[None]) -> None:
    """Nobody may wait for it any more, and asyncio would log what came of it."""
    if not task.cancelled():
        task.exception()


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
        busy = UnavailableError(f"busy: {error}; come back in {BUSY_RETRY_S:g} s")
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
