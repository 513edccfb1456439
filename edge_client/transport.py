"""The device's end of the protocol: one channel to the coordinator, and core types in and out.

Transfers fail on lack of progress, never on their total duration: a slow link that moves is a working link.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import stat
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import grpc
import grpc.aio
from fedepth_wire import channel as wire_channel
from fedepth_wire.bounds import MOST_LONG_TEXT
from fedepth_wire.chunks import file_chunks, receive_file
from fedepth_wire.convert import from_message, plan_digest, to_message
from fedepth_wire.tls import Identity, Insecure
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1 import trust_pb2
from fedepth_wire.v1.federation_pb2_grpc import FederationStub
from fedepth_wire.v1.trust_pb2_grpc import CertificatesStub

from edge_client.outbox import Entry
from edge_client.timeouts import within
from fedepth.errors import ProtocolError, TransportError
from fedepth.files import disk_errors, file_digest
from fedepth.models.graph import MOST_BYTES
from fedepth.plan import Plan
from fedepth.printable import printable
from fedepth.task import DeviceReport, Failure, ModelSpec, PartInfo, Progress, Task

STALL_S = 60.0
LONGEST_CALL_S = 3600.0  # of calls that go on over a channel whose certificate is replaced
COMMIT_S = 300.0  # the coordinator checks every tensor before it answers
_KEPT_FILES = 2
_AWAY = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
_SERVERS_OWN = {
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}
_COME_BACK = re.compile(r"; come back in ([0-9]{1,6}(?:\.[0-9]{1,3})?) s$")
_TOO_LARGE = "larger than max"  # what gRPC says of a message; it has the same status as a busy coordinator
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TASK_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")

T = TypeVar("T")

if TYPE_CHECKING:  # generic in the stubs only
    _Download = grpc.aio.UnaryStreamCall[pb.FetchFileRequest, pb.Chunk]


class TemporaryError(TransportError):
    """The same call may work later, without anybody doing anything here."""


class UnreachableError(TemporaryError):
    """The coordinator cannot be reached now."""


class UntrustedError(UnreachableError):
    """One side does not accept the other's certificate. Somebody may give one of them another one."""


class BusyError(TemporaryError):
    """The coordinator answers, and can do nothing for us now, such as for want of disk space.

    Attributes:
        after_s: when to come back, if it has said so.
    """

    def __init__(self, message: str, after_s: float | None = None) -> None:
        super().__init__(message)
        self.after_s = after_s


class ServerError(TemporaryError):
    """The coordinator met an error of its own, or asks to begin again."""


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
    """Nothing to do; ask again after this time. `reason` says why, to a person; it may be empty."""

    after_s: float
    reason: str = ""


@dataclass(frozen=True)
class Finished:
    """The job is over."""

    job: str
    rounds: int


@dataclass(frozen=True)
class Rejected:
    """This device cannot take part as it is. `reason` is "clone" where another live agent has its device id."""

    message: str
    after_s: float
    reason: str = ""


@dataclass(frozen=True)
class Accepted:
    """The update is recorded for good."""

    round: int


@dataclass(frozen=True)
class Refused:
    """The update will never be used."""

    reason: str
    message: str


@dataclass(frozen=True)
class Survey:
    """Before the first task: the next report should say what rows have in the columns of this model's table."""

    job: str
    model: ModelSpec


Answer = Task | RetryLater | Finished | Rejected | Survey


class Transport(Protocol):
    """What the agent needs of the coordinator. All calls raise TransportError and ProtocolError, those with files also
    DiskError."""

    address: str
    moved_bytes: int

    async def next_task(self, report: DeviceReport, wait_s: float) -> Answer: ...

    async def fetch_weights(self, task: Task) -> Path: ...

    async def fetch_graph(self, task: Task) -> Path: ...

    async def send_part(self, part: Part) -> Refused | None: ...

    async def deliver(self, entry: Entry) -> Accepted | Refused: ...

    async def report_failure(self, failure: Failure) -> bool: ...

    async def report_progress(self, progress: Progress) -> bool: ...

    async def close(self) -> None: ...


class GrpcTransport:
    """Speaks to a coordinator over one channel.

    Attributes:
        moved_bytes: bytes of files that were sent and received since the start.
        note: what is known to be wrong with this device's certificate; "" if nothing is.
    """

    def __init__(self, address: str, state: Path, identity: Identity | Insecure, stall_s: float = STALL_S) -> None:
        self.address = address
        self.moved_bytes = 0
        self.note = ""
        self._weights = state / "weights"
        self._graphs = state / "graphs"
        self._stall_s = stall_s
        self._identity = identity
        self._channel = wire_channel.open_channel(address, identity)
        self._stub = FederationStub(self._channel)
        self._leaving: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for leaving in self._leaving:
            leaving.cancel()
        await self._channel.close(None)

    async def use(self, identity: Identity) -> None:
        """Makes all calls from now on with another certificate; those that are going on end as they are."""
        before, self._identity = self._channel, identity
        self._channel = wire_channel.open_channel(self.address, identity)
        self._stub = FederationStub(self._channel)
        leaving = asyncio.create_task(before.close(LONGEST_CALL_S))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    async def renew(self, request: bytes) -> bytes:
        """Has the coordinator sign a certificate request; the certificate."""
        call = CertificatesStub(self._channel).Renew(trust_pb2.RenewRequest(request=request), timeout=self._stall_s)
        return (await self._call(call)).certificate

    async def next_task(self, report: DeviceReport, wait_s: float) -> Answer:
        """Asks for work; the coordinator may hold the call for `wait_s`."""
        request = pb.NextTaskRequest(device=to_message(report, pb.DeviceReport), wait_ms=int(wait_s * 1000))
        reply = await self._call(self._stub.NextTask(request, timeout=wait_s + self._stall_s))
        kind = reply.WhichOneof("outcome")
        if kind == "task":
            return _checked(from_message(reply.task, Task))
        if kind == "retry":
            return RetryLater(reply.retry.retry_after_ms / 1000, reply.retry.reason)
        if kind == "finished":
            return Finished(reply.finished.job, reply.finished.rounds)
        if kind == "rejected":
            return Rejected(reply.rejected.message, reply.rejected.retry_after_ms / 1000, reply.rejected.reason)
        if kind == "survey":
            return Survey(reply.survey.job, from_message(reply.survey.model, ModelSpec))
        raise ProtocolError(f"{self.address} answered NextTask with no outcome; is it a newer version?")

    async def fetch_weights(self, task: Task) -> Path:
        """The task's global weights as a file; see `_fetch`."""
        return await self._fetch(
            self._weights, f"{task.weights_digest}.safetensors", task.weights_digest, task.weights_bytes
        )

    async def fetch_graph(self, task: Task) -> Path:
        """The traced model of the task's job as a file; see `_fetch`."""
        return await self._fetch(self._graphs, f"{task.graph_digest}.json", task.graph_digest, task.graph_bytes)

    async def _fetch(self, folder: Path, name: str, digest: str, size_bytes: int) -> Path:
        """A file of the coordinator, from disk if it is there, resumed if a part of it is.

        Raises:
            ProtocolError: the file came whole but is another one, or its stream ended early.
            DiskError: it cannot be kept.
        """
        with disk_errors(f"{name} cannot be fetched and kept", folder):
            return await self._fetch_into(folder, name, digest, size_bytes)

    async def _fetch_into(self, folder: Path, name: str, digest: str, size_bytes: int) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        final = folder / name
        for path in (final, folder / f"{name}.partial"):
            if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
                path.unlink()  # such as a FIFO, at which a reader and a writer would wait for ever
        if final.exists():
            if await asyncio.to_thread(file_digest, final) == digest:
                final.touch()
                _forget_old(final)
                return final
            final.unlink()
        partial = folder / f"{name}.partial"
        for other in folder.glob("*.partial"):
            if other != partial:
                other.unlink()
        offset = partial.stat().st_size if partial.exists() else 0
        if offset > size_bytes:
            partial.unlink()
            offset = 0
        call = self._stub.FetchFile(pb.FetchFileRequest(digest=digest, offset=offset))
        try:
            await receive_file(partial, self._chunks(call), offset, size_bytes, digest)
        finally:
            call.cancel()
        partial.rename(final)
        _forget_old(final)
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
        """Sends what the coordinator does not hold yet of a part. None: it holds all of it.

        Raises:
            DiskError: the part cannot be read.
        """
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
        with disk_errors(f"{part.path.name} cannot be read", part.path.parent):
            reply = await self._upload(header, part.path)
        if reply.WhichOneof("outcome") == "refused":
            return Refused(reply.refused.reason, reply.refused.message)
        if reply.held_bytes != info.size_bytes:
            raise UnreachableError(
                f"{self.address} holds {reply.held_bytes} of {info.size_bytes} bytes of part {info.part}"
            )
        return None

    async def report_failure(self, failure: Failure) -> bool:
        # A path in it may not be text, and a long one must not keep the coordinator from hearing of it.
        told = replace(failure, message=printable(failure.message)[:MOST_LONG_TEXT])
        call = self._stub.ReportFailure(to_message(told, pb.Failure), timeout=self._stall_s)
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
        code, details = error.code(), error.details() or ""
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE not in details:
            come_back = _COME_BACK.search(details)
            return BusyError(f"{self.address}: {details}", float(come_back[1]) if come_back else None)
        if wire_channel.unresolved(details):
            return UnreachableError(f"{self.address}: this machine cannot resolve that name ({details})")
        if code is grpc.StatusCode.UNAUTHENTICATED:
            return UntrustedError(f"{self.address}: {details}")
        if why := wire_channel.broken_handshake(details, self._identity):
            return UntrustedError(f"{self.address}: {self.note or why} ({details})")
        kind = UnreachableError if code in _AWAY else ServerError if code in _SERVERS_OWN else TransportError
        return kind(f"{self.address}: {code.name}: {details}")


def _forget_old(current: Path) -> None:
    """Keeps the newest of its kind."""
    files = sorted(current.parent.glob(f"*{current.suffix}"), key=lambda path: path.stat().st_mtime_ns)
    others = [path for path in files if path != current]
    for path in others[: max(0, len(others) + 1 - _KEPT_FILES)]:
        path.unlink()


def _checked(task: Task) -> Task:
    """All of these become file names here, so a coordinator must not choose them freely."""
    if not _TASK_ID.fullmatch(task.task_id):
        raise ProtocolError(f"task id {task.task_id[:80]!r} is not made of letters, digits, '.', '_' and '-'")
    for kind, digest in (("weights", task.weights_digest), ("graph", task.graph_digest)):
        if not _DIGEST.fullmatch(digest):
            raise ProtocolError(f"{kind} digest {digest[:80]!r} is not a sha256 in hex")
    if task.attempt < 0 or task.weights_bytes < 0 or not task.plan.stages:
        raise ProtocolError(
            f"task {task.task_id}: attempt {task.attempt}, {task.weights_bytes} bytes of weights, "
            f"{len(task.plan.stages)} stages cannot be"
        )
    if not 0 < task.graph_bytes <= MOST_BYTES:
        raise ProtocolError(f"task {task.task_id}: a graph of {task.graph_bytes} bytes; at most {MOST_BYTES} are read")
    odd = [s.block for s in task.plan.stages if not 0 <= s.first <= s.last or min(s.micro_batch, s.build_batch) < 1]
    if odd or task.training.batch < 1 or task.training.local_epochs < 1:
        raise ProtocolError(
            f"task {task.task_id}: batches of {task.training.batch}, {task.training.local_epochs} epochs, "
            f"and stages {', '.join(odd[:20]) or 'without fault'} cannot be"
        )
    return task
