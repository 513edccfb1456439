"""A device that is only a client: it asks, fetches, uploads and commits, and its updates come from no training.

For questions about the coordinator alone: many devices in one process, and messages that no agent would send.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import msgspec
import numpy as np
from fedepth_wire.convert import to_message
from fedepth_wire.task_messages import task_of
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationStub
from safetensors.numpy import load, save

from fedepth.budget import Budget
from fedepth.models.traced import TracedModel
from fedepth.plan import Plan
from fedepth.task import SETTINGS, DeviceReport, PartInfo, Result, StageResult, Task

CHUNK_BYTES = 1 << 20
CALL_S = 60.0
_GIB = 1 << 30


@dataclass(frozen=True)
class Part:
    """One part of an update, in memory."""

    number: int
    data: bytes

    @property
    def info(self) -> PartInfo:
        return PartInfo(self.number, len(self.data), hashlib.sha256(self.data).hexdigest())


@dataclass
class Fetched:
    """Files by their digest; may be shared among devices. Only the newest weights are kept."""

    models: dict[str, bytes] = field(default_factory=dict)
    graphs: dict[str, TracedModel] = field(default_factory=dict)
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)


class SimulatedDevice:
    """One device on a channel."""

    def __init__(
        self, channel: grpc.aio.Channel, device_id: str, samples: int = 64, fetched: Fetched | None = None
    ) -> None:
        self.stub = FederationStub(channel)
        self.device_id = device_id
        self.samples = samples
        self.fetched = fetched or Fetched()

    def report(self, **changes: Any) -> pb.DeviceReport:
        """What it says of itself, with fields of the message replaced."""
        budget = Budget(8 * _GIB, 8 * _GIB, (), 0, 0, 1.0, 0, _GIB)
        report = DeviceReport(self.device_id, self.device_id, budget, self.samples, self._counts(), settings=SETTINGS)
        message = to_message(report, pb.DeviceReport)
        if "instance" in message.DESCRIPTOR.fields_by_name:
            setattr(message, "instance", hashlib.sha256(self.device_id.encode()).hexdigest()[:16])  # noqa: B010
        message.MergeFrom(pb.DeviceReport(**changes))
        return message

    def _counts(self) -> tuple[int, ...]:
        each = self.samples // 10
        return (self.samples - 9 * each, *(each,) * 9)

    async def ask(self, report: pb.DeviceReport | None = None, wait_s: float = 20.0) -> pb.NextTaskReply:
        request = pb.NextTaskRequest(device=report or self.report(), wait_ms=int(wait_s * 1000))
        return await self.stub.NextTask(request, timeout=wait_s + CALL_S)

    async def next_task(self, wait_s: float = 20.0) -> Task | None:
        """The task that it is given; None for any other answer."""
        return await self.task_in(await self.ask(wait_s=wait_s))

    async def task_in(self, reply: pb.NextTaskReply) -> Task | None:
        if reply.WhichOneof("outcome") != "task":
            return None
        digest = reply.task.model_digest
        if digest not in self.fetched.models:
            self.fetched.models[digest] = await self._fetch(digest, reply.task.model_bytes)
        return task_of(reply.task, self.fetched.models[digest])

    async def model(self, task: Task) -> TracedModel:
        """The task's graph and costs."""
        if task.graph_digest not in self.fetched.graphs:
            data = await self._fetch(task.graph_digest, task.graph_bytes)
            self.fetched.graphs[task.graph_digest] = msgspec.json.decode(data, type=TracedModel)
        return self.fetched.graphs[task.graph_digest]

    async def weights(self, task: Task) -> dict[str, Any]:
        """The task's global weights."""
        if task.weights_digest not in self.fetched.weights:
            data = await self._fetch(task.weights_digest, task.weights_bytes)
            self.fetched.weights.clear()
            self.fetched.weights[task.weights_digest] = load(data)
        return self.fetched.weights[task.weights_digest]

    async def update(self, task: Task, plan: Plan, noise: float, seed: int) -> Part:
        """An update for this plan: the global weights and a little noise."""
        layout = (await self.model(task)).in_training(task.training).graph.layout()
        tensors = await self.weights(task)
        random = np.random.default_rng(seed)
        trained = layout.trained_tensors(plan)
        changed = {
            each.name: tensors[each.name]
            + random.normal(0, noise, tensors[each.name].shape).astype(tensors[each.name].dtype)
            for each in trained
        }
        return Part(0, encoded(changed))

    def result(self, task: Task, plan: Plan, parts: Sequence[Part]) -> Result:
        """What it says of an update."""
        stages = tuple(
            StageResult(
                s.first, s.last, s.micro_batch, s.predicted_peak_bytes, 1, 1, 1, _GIB, 2.0, 1.0, 2, self.samples, 0.01
            )
            for s in plan.stages
        )
        return Result(
            task.task_id,
            task.attempt,
            self.device_id,
            task.round,
            self.samples,
            plan,
            plan.trained_units,
            stages,
            tuple(part.info for part in parts),
            0.01,
            "none",
            1,
            task.weights_digest,
        )

    async def upload(self, task: Task, content: Part, **changes: Any) -> pb.UploadPartReply:
        """Sends a part, with fields of its header replaced."""
        info = content.info
        fields: dict[str, Any] = {
            "task_id": task.task_id,
            "attempt": task.attempt,
            "device_id": self.device_id,
            "part": content.number,
            "size_bytes": info.size_bytes,
            "digest": info.digest,
        }
        header = pb.UploadHeader(**{**fields, **changes})

        async def requests() -> AsyncIterator[pb.UploadPartRequest]:
            yield pb.UploadPartRequest(header=header)
            for begin in range(0, len(content.data), CHUNK_BYTES):
                data = content.data[begin : begin + CHUNK_BYTES]
                yield pb.UploadPartRequest(chunk=pb.Chunk(offset=begin, data=data))

        replies = [reply async for reply in self.stub.UploadPart(requests(), timeout=CALL_S)]
        return replies[-1]

    async def commit(self, result: Result) -> pb.CommitUpdateReply:
        request = pb.CommitUpdateRequest(result=to_message(result, pb.Result))
        return await self.stub.CommitUpdate(request, timeout=CALL_S)

    async def _fetch(self, digest: str, size_bytes: int) -> bytes:
        wanted = pb.FetchFileRequest(digest=digest, ranges=[pb.Range(begin=0, end=size_bytes)], credit_bytes=size_bytes)

        async def requests() -> AsyncIterator[pb.FetchFileRequest]:
            yield wanted

        return b"".join([chunk.data async for chunk in self.stub.FetchFile(requests(), timeout=CALL_S)])


def encoded(tensors: dict[str, Any]) -> bytes:
    """A safetensors file of these tensors."""
    return save(tensors)
