"""The device's end of the protocol: one channel to the coordinator, and core types in and out.

Transfers fail on lack of progress, never on their total duration: a slow link that moves is a working link.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

import grpc
import grpc.aio
import structlog
from fedepth_wire import channel as wire_channel
from fedepth_wire.bounds import MOST_LONG_TEXT
from fedepth_wire.convert import from_message, to_message
from fedepth_wire.report_messages import report_message
from fedepth_wire.task_messages import task_of
from fedepth_wire.times import CHECK_S, STALL_S
from fedepth_wire.tls import Identity, Insecure
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1 import trust_pb2
from fedepth_wire.v1.federation_pb2_grpc import FederationStub
from fedepth_wire.v1.trust_pb2_grpc import CertificatesStub

from edge_client.call_errors import CutError, as_error
from edge_client.downloads import Downloads
from edge_client.outbox import Entry
from edge_client.streams import Streams
from fedepth.errors import ProtocolError, TransportError
from fedepth.files import disk_errors, open_regular
from fedepth.models.graph import MOST_BYTES
from fedepth.plan import Plan
from fedepth.printable import printable
from fedepth.task import DeviceReport, Failure, ModelSpec, PartInfo, Progress, Task
from fedepth.tensor_index import MOST_INDEX_BYTES

LONGEST_CALL_S = 3600.0  # of calls over a channel whose certificate is replaced: longer than any has by itself
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TASK_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")

T = TypeVar("T")
_log = structlog.get_logger()


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

    @property
    def moved_bytes(self) -> int: ...

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
        note: what is known to be wrong with this device's certificate; "" if nothing is.
    """

    def __init__(self, address: str, state: Path, identity: Identity | Insecure, stall_s: float = STALL_S) -> None:
        self.address = address
        self.note = ""
        self._stall_s = stall_s
        self._identity = identity
        self._channel = wire_channel.open_channel(address, identity)
        self._stub = FederationStub(self._channel)
        self._leaving: set[asyncio.Task[None]] = set()
        self._streams = Streams(lambda: self._stub, address, self._as_error, stall_s)
        self._downloads = Downloads(state, self._streams)

    @property
    def moved_bytes(self) -> int:
        """Bytes of files that were sent and received since the start."""
        return self._streams.moved_bytes

    @property
    def spent_bytes(self) -> int:
        """Bytes of files that were sent and asked for since the start, also those that were lost with a cut."""
        return self._streams.spent_bytes

    async def close(self) -> None:
        for leaving in self._leaving:
            leaving.cancel()
        await self._channel.close(None)

    async def use(self, identity: Identity) -> None:
        """Makes all calls from now on with another certificate. Calls that are going on end as they are, streams with
        their next message; what they carry goes on over the new channel."""
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
        device, data = report_message(report)
        request = pb.NextTaskRequest(device=device, wait_ms=int(wait_s * 1000))
        reply = await self._next_task(request, wait_s)
        if reply.WhichOneof("outcome") == "describe":
            header = pb.UploadHeader(device_id=report.device_id, size_bytes=len(data), digest=device.data_digest)
            await self._sent(header, lambda: BytesIO(data), describes=True)
            reply = await self._next_task(request, wait_s)
        kind = reply.WhichOneof("outcome")
        if kind == "task":
            return _checked(task_of(reply.task, await self._downloads.model(reply.task)))
        if kind == "retry":
            return RetryLater(reply.retry.retry_after_ms / 1000, reply.retry.reason)
        if kind == "finished":
            return Finished(reply.finished.job, reply.finished.rounds)
        if kind == "rejected":
            return Rejected(reply.rejected.message, reply.rejected.retry_after_ms / 1000, reply.rejected.reason)
        if kind == "survey":
            return Survey(reply.survey.job, from_message(reply.survey.model, ModelSpec))
        raise ProtocolError(f"{self.address} answered NextTask with no outcome; is it a newer version?")

    async def _next_task(self, request: pb.NextTaskRequest, wait_s: float) -> pb.NextTaskReply:
        call = self._stub.NextTask(request, timeout=wait_s + self._stall_s, compression=grpc.Compression.Gzip)
        return await self._call(call)

    async def fetch_weights(self, task: Task) -> Path:
        """The task's global weights as a file; see `Downloads`."""
        return await self._downloads.weights(task)

    async def fetch_graph(self, task: Task) -> Path:
        """The traced model of the task's job as a file; see `Downloads`."""
        return await self._downloads.graph(task)

    async def deliver(self, entry: Entry) -> Accepted | Refused:
        """Sends what the coordinator does not hold yet of an update, and declares it complete."""
        result = entry.result
        for info in result.parts:
            part = Part(result.task_id, result.attempt, result.device_id, result.plan, info, entry.part_path(info))
            refused = await self.send_part(part)
            if refused:
                return refused
        request = pb.CommitUpdateRequest(result=to_message(result, pb.Result))
        patience = max(CHECK_S, self._stall_s)
        call = self._stub.CommitUpdate(request, timeout=patience, compression=grpc.Compression.Gzip)
        reply = await self._call(call)
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
        header = pb.UploadHeader(
            task_id=part.task_id,
            attempt=part.attempt,
            device_id=part.device_id,
            part=info.part,
            size_bytes=info.size_bytes,
            digest=info.digest,
        )
        with disk_errors(f"{part.path.name} cannot be read", part.path.parent):
            reply = await self._sent(header, lambda: open_regular(part.path))
        if reply.WhichOneof("outcome") == "refused":
            return Refused(reply.refused.reason, reply.refused.message)
        return None

    async def _sent(
        self, header: pb.UploadHeader, opened: Callable[[], BinaryIO], describes: bool = False
    ) -> pb.UploadPartReply:
        """`Streams.send`, again for as long as something moves."""
        while True:
            try:
                return await self._streams.send(header, opened, describes)
            except CutError as error:
                _log.debug("an upload was cut; resuming", part=header.part, error=str(error))

    async def report_failure(self, failure: Failure) -> bool:
        # A path in it may not be text, and a long one must not keep the coordinator from hearing of it.
        told = replace(failure, message=printable(failure.message)[:MOST_LONG_TEXT])
        call = self._stub.ReportFailure(to_message(told, pb.Failure), timeout=self._stall_s)
        return (await self._call(call)).wanted

    async def report_progress(self, progress: Progress) -> bool:
        """Renews the task's lease; False if nobody waits for it any more."""
        call = self._stub.ReportProgress(to_message(progress, pb.Progress), timeout=self._stall_s)
        return (await self._call(call)).wanted

    async def _call(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise self._as_error(error) from None

    def _as_error(self, error: grpc.aio.AioRpcError) -> TransportError:
        return as_error(self.address, error, self._identity, self.note)


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
    if task.index_digest and not (_DIGEST.fullmatch(task.index_digest) and 0 < task.index_bytes <= MOST_INDEX_BYTES):
        raise ProtocolError(f"task {task.task_id}: an index {task.index_digest[:80]!r} of {task.index_bytes} bytes")
    if not 0 < task.graph_bytes <= MOST_BYTES:
        raise ProtocolError(f"task {task.task_id}: a graph of {task.graph_bytes} bytes; at most {MOST_BYTES} are read")
    odd = [s.block for s in task.plan.stages if not 0 <= s.first <= s.last or min(s.micro_batch, s.build_batch) < 1]
    if odd or task.training.batch < 1 or task.training.local_epochs < 1:
        raise ProtocolError(
            f"task {task.task_id}: batches of {task.training.batch}, {task.training.local_epochs} epochs, "
            f"and stages {', '.join(odd[:20]) or 'without fault'} cannot be"
        )
    return task
