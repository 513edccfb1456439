"""Messages from the network: any bytes end in a value or in a sentence."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from fedepth_wire.bounds import check_message
from fedepth_wire.convert import from_message, to_message
from fedepth_wire.v1 import federation_pb2 as pb
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from coordinator.admission import check_report, check_result
from coordinator.store.records import TaskRecord
from fedepth.budget import Budget, MemoryLimit
from fedepth.errors import FedepthError, UpdateError
from fedepth.job_sections import LimitsSection
from fedepth.layout import ModelLayout, TensorInfo, UnitLayout
from fedepth.plan import CachePlace, PeakComponents, Plan, Policy, Stage
from fedepth.task import (
    DeviceReport,
    Failure,
    ModelSpec,
    Outcome,
    PartInfo,
    Progress,
    Result,
    StageResult,
    Task,
    TrainingSpec,
)
from tests.fuzz.damage import damaged, fuzzing

PEAK = PeakComponents(1, 2, 3, 4, 5, 6, 7)
PLAN = Plan((Stage(0, 1, 8, CachePlace.RAM, 8, PEAK),), (2,), Policy.AUTO, 100)
MODEL = ModelSpec("m", ("a", "b"), (1, 8, 8), (0.5,), (0.25,))
TRAINING = TrainingSpec(8, 1, "sgd", 0.1, 0.9, 0.0, 0.0, "none", 1)
STAGE = StageResult(0, 1, 8, 28, 27, 26, 25, 100, 2.0, 1.0, 3, 20, 0.5)
VALUES: list[Any] = [
    DeviceReport("d", "name", Budget(9, 9, (MemoryLimit("MemAvailable", 9, 9),), 0, 0, 0.9, 0, 5), 20, (10, 10)),
    Result("t", 1, "d", 1, 20, PLAN, (0, 1), (STAGE,), (PartInfo(0, 10, "f" * 64),), 1.0, "malloc", 0),
    Failure("t", 1, "d", Outcome.DATA, "no data", 1, 2),
    Progress("t", 1, "d", "training", loss=float("nan")),
    Task("t", 1, "job", 1, MODEL, TRAINING, Policy.AUTO, PLAN, "f" * 64, 10, "f" * 64, 10, "run"),
]
CORE = {type(value).__name__: type(value) for value in VALUES}
GOOD = {
    name: to_message(value, getattr(pb, name)).SerializeToString() for name, value in zip(CORE, VALUES, strict=True)
}
REQUESTS = [
    *(pb.NextTaskRequest, pb.FetchFileRequest, pb.UploadPartRequest, pb.CommitUpdateRequest),
    *(pb.Failure, pb.Progress, pb.NextTaskReply, pb.CommitUpdateReply, pb.UploadPartReply, pb.Chunk, pb.Event),
]
LAYOUT = ModelLayout(tuple(UnitLayout(f"u{n}", (TensorInfo(f"w{n}", (1,), "F32"),)) for n in range(3)), ())
TASK = TaskRecord("t", 1, "d", 1, "given", PLAN, 20)


def parsed(kind: type[Message], data: bytes) -> Message | None:
    """None: grpc refuses the call before anything of ours sees it."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


def use(name: str, message: Message) -> None:
    """What either side does first with a message; tells a refusal's text."""
    try:
        value: Any = from_message(message, CORE[name])
        if isinstance(value, DeviceReport):
            assert len(check_report(value, ("a", "b"), LimitsSection())) < 500
        elif isinstance(value, Result):
            check_result(value, TASK, LAYOUT, 7)
    except UpdateError as error:
        assert len(str(error)) < 800
    except FedepthError as error:
        assert len(str(error)) < 500


@pytest.mark.parametrize("name", CORE)
def test_damaged_messages_are_values_or_refused(name: str) -> None:
    @fuzzing(150)
    @given(damaged(GOOD[name]))
    def try_one(data: bytes) -> None:
        message = parsed(getattr(pb, name), data)
        if message is not None:
            use(name, message)

    try_one()


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.__name__)
def test_any_bytes_are_a_message_within_bounds_or_refused(kind: type[Message]) -> None:
    @fuzzing(40)
    @given(st.binary(max_size=200))
    def try_one(data: bytes) -> None:
        message = parsed(kind, data)
        if message is not None:
            try:
                check_message(message)
            except FedepthError as error:
                assert len(str(error)) < 500

    try_one()


@fuzzing(60)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 20), st.sampled_from([0, 1, 2]), st.binary(max_size=12), st.sampled_from([1, 30, 3000])
        ),
        max_size=6,
    )
)
def test_repeated_fields_take_memory_by_their_bytes_only(fields: list[tuple[int, int, bytes, int]]) -> None:
    """What grpc's parser has made of a message is bounded by its length; nothing of ours may multiply that."""
    data = b""
    for number, kind, content, times in fields:
        tag = bytes([(number << 3 | kind) & 0x7F]) if number < 16 else bytes([(number << 3 | kind) & 0x7F | 0x80, 1])
        body = {0: b"\x01", 1: b"\x00" * 8, 2: bytes([len(content)]) + content}[kind]
        data += (tag + body) * times
    for name in CORE:
        message = parsed(getattr(pb, name), data)
        if message is None:
            continue
        tracemalloc.start()
        use(name, message)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20
