"""The device's end of the protocol: one channel to the coordinator, and core types in and out.

Transfers fail on lack of progress, never on their total duration: a slow link that moves is a working link.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import grpc
import grpc.aio
from fedepth_wire import channel as wire_channel
from fedepth_wire.chunks import file_chunks, receive_file
from fedepth_wire.convert import from_message, plan_digest, to_message
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationStub

from edge_client.backoff import within
from edge_client.outbox import Entry
from fedepth.costs import UnitCost
from fedepth.errors import ProtocolError, TransportError
from fedepth.files import file_digest
from fedepth.plan import Plan, Stage
from fedepth.task import DeviceReport, Failure, PartInfo, Progress, Task

STALL_S = 60.0
COMMIT_S = 300.0  # the coordinator checks every tensor before it answers
_KEPT_WEIGHTS = 2
# Statuses that a later try of the same call may cure by itself.
_AWAY = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
}
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TASK_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")

T = TypeVar("T")

if TYPE_CHECKING:  # generic in the stubs only
    _Download = grpc.aio.UnaryStreamCall[pb.FetchWeightsRequest, pb.Chunk]


class UnreachableError(TransportError):
    """The coordinator cannot be reached now; the same call may work later."""


@dataclass(frozen=True)
class Part:
    """A file of an update, with what the coordinator wants to know of it."""

    task_id: str
    attempt: int
    device_id: str
    plan: Plan
    info: PartInfo
    path: Path


@dataclass(frozen=True)
class RetryLater:
    """Nothing to do; ask again after this time."""

    after_s: float


@dataclass(frozen=True)
class Finished:
    """The job is over."""

    job: str
    rounds: int


@dataclass(frozen=True)
class Rejected:
    """This device cannot take part as it is."""

    message: str
    after_s: float


@dataclass(frozen=True)
class Accepted:
    """The update is recorded for good."""

    round: int


@dataclass(frozen=True)
class Refused:
    """The update will never be used."""

    reason: str
    message: str


Answer = Task | RetryLater | Finished | Rejected


class Transport(Protocol):
    """What the agent needs of the coordinator. All calls raise TransportError and ProtocolError."""

    address: str
    moved_bytes: int

    async def next_task(self, report: DeviceReport, wait_s: float) -> Answer: ...

    async def fetch_weights(self, task: Task) -> Path: ...

    async def send_part(self, part: Part) -> Refused | None: ...

    async def deliver(self, entry: Entry) -> Accepted | Refused: ...

    async def report_failure(self, failure: Failure) -> bool: ...

    async def report_progress(self, progress: Progress) -> bool: ...

    async def close(self) -> None: ...


class GrpcTransport:
    """Speaks to a coordinator over one channel.

    Attributes:
        moved_bytes: bytes of files that were sent and received since the start.
    """

    def __init__(self, address: str, state: Path, stall_s: float = STALL_S) -> None:
        self.address = address
        self.moved_bytes = 0
        self._weights = state / "weights"
        self._stall_s = stall_s
        self._channel = wire_channel.open_channel(address)
        self._stub = FederationStub(self._channel)

    async def close(self) -> None:
        await self._channel.close(None)

    async def next_task(self, report: DeviceReport, wait_s: float) -> Answer:
        """Asks for work; the coordinator may hold the call for `wait_s`."""
        request = pb.NextTaskRequest(device=to_message(report, pb.DeviceReport), wait_ms=int(wait_s * 1000))
        reply = await self._call(self._stub.NextTask(request, timeout=wait_s + self._stall_s))
        kind = reply.WhichOneof("outcome")
        if kind == "task":
            return _checked(from_message(reply.task, Task))
        if kind == "retry":
            return RetryLater(reply.retry.retry_after_ms / 1000)
        if kind == "finished":
            return Finished(reply.finished.job, reply.finished.rounds)
        if kind == "rejected":
            return Rejected(reply.rejected.message, reply.rejected.retry_after_ms / 1000)
        raise ProtocolError(f"{self.address} answered NextTask with no outcome; is it a newer version?")

    async def fetch_weights(self, task: Task) -> Path:
        """The task's global weights as a file, from disk if they are there, resumed if a part of them is.

        Raises:
            ProtocolError: the file came whole but is another one, or its stream ended early.
        """
        self._weights.mkdir(parents=True, exist_ok=True)
        final = self._weights / f"{task.weights_digest}.safetensors"
        if final.exists():
            if await asyncio.to_thread(file_digest, final) == task.weights_digest:
                final.touch()
                self._forget_old(final)
                return final
            final.unlink()
        partial = final.with_name(f"{final.name}.partial")
        for other in self._weights.glob("*.partial"):
            if other != partial:
                other.unlink()
        offset = partial.stat().st_size if partial.exists() else 0
        if offset > task.weights_bytes:
            partial.unlink()
            offset = 0
        call = self._stub.FetchWeights(pb.FetchWeightsRequest(digest=task.weights_digest, offset=offset))
        try:
            await receive_file(partial, self._chunks(call), offset, task.weights_bytes, task.weights_digest)
        finally:
            call.cancel()
        partial.rename(final)
        self._forget_old(final)
        return final

    async def deliver(self, entry: Entry) -> Accepted | Refused:
        """Sends what the coordinator does not hold yet of an update, and declares it complete."""
        result = entry.result
        for info in result.parts:
            part = Part(result.task_id, result.attempt, result.device_id, result.plan, info, entry.part_path(info))
            refused = await self.send_part(part)
            if refused:
                return refused
        request = pb.CommitUpdateRequest(result=to_message(result, pb.Result))
        reply = await self._call(self._stub.CommitUpdate(request, timeout=max(COMMIT_S, self._stall_s)))
        kind = reply.WhichOneof("outcome")
        if kind == "accepted":
            return Accepted(reply.accepted.round)
        if kind == "refused":
            return Refused(reply.refused.reason, reply.refused.message)
        raise ProtocolError(f"{self.address} answered CommitUpdate with no outcome; is it a newer version?")

    async def send_part(self, part: Part) -> Refused | None:
        """Sends what the coordinator does not hold yet of a part. None: it holds all of it."""
        info = part.info
        request = pb.UploadOffsetRequest(task_id=part.task_id, attempt=part.attempt, part=info.part, digest=info.digest)
        offset = (await self._call(self._stub.UploadOffset(request, timeout=self._stall_s))).offset
        if not 0 <= offset <= info.size_bytes:
            raise ProtocolError(f"{self.address} claims to hold {offset} of {info.size_bytes} bytes")
        if offset == info.size_bytes:
            return None
        header = pb.UploadHeader(
            task_id=part.task_id,
            attempt=part.attempt,
            device_id=part.device_id,
            part=info.part,
            offset=offset,
            size_bytes=info.size_bytes,
            digest=info.digest,
            plan_digest=plan_digest(part.plan),
        )
        reply = await self._upload(header, part.path)
        if reply.WhichOneof("outcome") == "refused":
            return Refused(reply.refused.reason, reply.refused.message)
        if reply.held_bytes != info.size_bytes:
            raise UnreachableError(
                f"{self.address} holds {reply.held_bytes} of {info.size_bytes} bytes of part {info.part}"
            )
        return None

    async def report_failure(self, failure: Failure) -> bool:
        call = self._stub.ReportFailure(to_message(failure, pb.Failure), timeout=self._stall_s)
        return (await self._call(call)).wanted

    async def report_progress(self, progress: Progress) -> bool:
        """Renews the task's lease; False if nobody waits for it any more."""
        call = self._stub.ReportProgress(to_message(progress, pb.Progress), timeout=self._stall_s)
        return (await self._call(call)).wanted

    async def _upload(self, header: pb.UploadHeader, path: Path) -> pb.UploadPartReply:
        call = self._stub.UploadPart()  # type: ignore[call-arg]  # grpc-stubs ask for an iterator
        try:
            # Once the coordinator has ended the call, writes fail for no reason of their own: the call itself
            # then has the reply or the status.
            with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                await self._in_time(call.write(pb.UploadPartRequest(header=header)))
                for chunk in file_chunks(path, header.offset):
                    await self._in_time(call.write(pb.UploadPartRequest(chunk=chunk)))
                    self.moved_bytes += len(chunk.data)
                await self._in_time(call.done_writing())
            return await self._in_time(call)
        except grpc.aio.AioRpcError as error:
            # A write that meets the end of the call makes grpc put INTERNAL over its true status
            # (grpc/aio/_call.py, _write), so this says no more than that the upload was cut.
            if error.code() is grpc.StatusCode.INTERNAL:
                raise UnreachableError(f"{self.address}: the upload was cut: {error.details()}") from None
            raise self._as_error(error) from None
        finally:
            call.cancel()

    async def _chunks(self, call: _Download) -> AsyncIterator[pb.Chunk]:
        while True:
            chunk = await self._moving(call.read())
            if not isinstance(chunk, pb.Chunk):  # grpc.aio.EOF
                return
            self.moved_bytes += len(chunk.data)
            yield chunk

    async def _moving(self, step: Awaitable[T]) -> T:
        """One step of a transfer, which must come within the stall time."""
        return await self._call(self._in_time(step))

    async def _in_time(self, step: Awaitable[T]) -> T:
        try:
            return await within(self._stall_s, step)
        except asyncio.TimeoutError:
            raise UnreachableError(f"{self.address}: nothing moved for {self._stall_s:g} s") from None

    async def _call(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise self._as_error(error) from None

    def _as_error(self, error: grpc.aio.AioRpcError) -> TransportError:
        kind = UnreachableError if error.code() in _AWAY else TransportError
        return kind(f"{self.address}: {error.code().name}: {error.details()}")

    def _forget_old(self, current: Path) -> None:
        files = sorted(self._weights.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        others = [path for path in files if path != current]
        for path in others[: max(0, len(others) + 1 - _KEPT_WEIGHTS)]:
            path.unlink()


def _possible(stage: Stage, units: tuple[UnitCost, ...]) -> bool:
    """Whether a model of these units has this block, and the block can end there."""
    if not 0 <= stage.first <= stage.last < len(units) or min(stage.micro_batch, stage.build_batch) < 1:
        return False
    if stage.frozen_suffix:
        return all(unit.frozen is not None for unit in units[stage.last + 1 :])
    return units[stage.last].exit is not None


def _checked(task: Task) -> Task:
    """Both names become file names here, so a coordinator must not choose them freely."""
    if not _TASK_ID.fullmatch(task.task_id):
        raise ProtocolError(f"task id {task.task_id[:80]!r} is not made of letters, digits, '.', '_' and '-'")
    if not _DIGEST.fullmatch(task.weights_digest):
        raise ProtocolError(f"weights digest {task.weights_digest[:80]!r} is not a sha256 in hex")
    if task.attempt < 0 or task.weights_bytes < 0 or not task.plan.stages:
        raise ProtocolError(
            f"task {task.task_id}: attempt {task.attempt}, {task.weights_bytes} bytes of weights, "
            f"{len(task.plan.stages)} stages cannot be"
        )
    units = len(task.costs.units)
    headless = not units or task.costs.units[-1].exit is None
    beyond = [stage.block for stage in task.plan.stages if not _possible(stage, task.costs.units)]
    if headless or beyond or task.training.batch < 1 or task.training.local_epochs < 1:
        raise ProtocolError(
            f"task {task.task_id}: costs of {units} units{' without a head' * headless}, "
            f"batches of {task.training.batch}, {task.training.local_epochs} epochs, "
            f"and stages {', '.join(beyond) or 'inside them'} cannot be"
        )
    return task
