"""A message is checked before it is converted: every field has a bound, and a refusal says which was passed."""

from __future__ import annotations

import math
import time
import tracemalloc
from collections.abc import Iterator

import pytest
from fedepth_wire import bounds
from fedepth_wire.bounds import BOUNDS, DEFAULT, bound_of, check_message
from fedepth_wire.channel import (
    CLIENT_OPTIONS,
    MESSAGE_LIMIT_BYTES,
    SERVER_OPTIONS,
)
from fedepth_wire.convert import from_message
from fedepth_wire.task_messages import MOST_MODEL_BYTES
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1 import trust_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from fedepth.errors import ProtocolError
from fedepth.models.graph import MOST_UNITS
from fedepth.task import MOST_CHANNELS, MOST_CLASSES, DeviceReport, Result


def _fields() -> Iterator[tuple[type[Message], FieldDescriptor]]:
    for name, descriptor in sorted(pb.DESCRIPTOR.message_types_by_name.items()):
        for field in descriptor.fields:
            yield getattr(pb, name), field


FIELDS = list(_fields())
NAMES = [f"{kind.__name__}.{field.name}" for kind, field in FIELDS]


def too_much(kind: type[Message], field: FieldDescriptor) -> Message:
    """A message with that field beyond its bound, or with something beyond a bound in it."""
    message, bound = kind(), bound_of(kind.DESCRIPTOR.name, field.name)
    if field.message_type is not None:
        inner = getattr(pb, field.message_type.name)
        if not field.message_type.fields:
            return message
        value = too_much(inner, field.message_type.fields[0])
    elif field.enum_type is not None:
        value = 99
    elif field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
        value = "x" * (bound.length + 1) if field.type == FieldDescriptor.TYPE_STRING else bytes(bound.length + 1)
    elif field.type == FieldDescriptor.TYPE_DOUBLE:
        value = math.nan if bound.finite else None
    elif field.type == FieldDescriptor.TYPE_BOOL:
        value = None
    else:
        value = bound.most + 1 if bound.most < (1 << 63) - 1 else -1
    held = getattr(message, field.name)
    if hasattr(held, "extend"):
        held.extend([value])
    elif field.message_type is not None:
        held.CopyFrom(value)
    elif value is not None:
        setattr(message, field.name, value)
    return message


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=NAMES)
def test_every_field_has_a_bound(kind: type[Message], field: FieldDescriptor) -> None:
    """A field that is added later is found here without a change."""
    check_message(kind())
    message = too_much(kind, field)
    if message == kind():  # a flag, or a float that may be anything
        return
    with pytest.raises(ProtocolError) as caught:
        check_message(message)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=NAMES)
def test_every_repeated_field_has_a_length(kind: type[Message], field: FieldDescriptor) -> None:
    message = kind()
    held = getattr(message, field.name)
    if not hasattr(held, "extend"):
        return
    most = bound_of(kind.DESCRIPTOR.name, field.name).elements
    one = {str: "", bytes: b"", float: 0.0}
    value = getattr(pb, field.message_type.name)() if field.message_type else one.get(type(field.default_value), 0)
    if field.type == FieldDescriptor.TYPE_STRING:
        value = ""
    held.extend([value] * most)
    check_message(message)
    held.extend([value])
    with pytest.raises(ProtocolError, match=rf"\.{field.name} has {most + 1} elements, allowed are {most}$"):
        check_message(message)


MESSAGES = {**pb.DESCRIPTOR.message_types_by_name, **trust_pb2.DESCRIPTOR.message_types_by_name}


def test_the_table_names_only_what_there_is() -> None:
    for message, named in BOUNDS.items():
        known = {field.name for field in MESSAGES[message].fields}
        assert set(named) <= known, message
        assert all(bound != DEFAULT for bound in named.values()), message


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (pb.Result(sample_count=(1 << 40) + 1), "Result.sample_count is 1099511627777, allowed are 0 to 1099511627776"),
        (pb.Result(baseline_bytes=-1), "Result.baseline_bytes is -1, allowed are 0 to 1125899906842624"),
        (pb.Result(task_id="x" * 257), "Result.task_id has 257 characters, allowed are 256"),
        (pb.Chunk(data=bytes((1 << 20) + 1)), "Chunk.data has 1048577 bytes, allowed are 1048576"),
        (pb.FetchFileRequest(digest="f" * 65), "FetchFileRequest.digest has 65 characters, allowed are 64"),
        (
            pb.FetchFileRequest(credit_bytes=-1),
            "FetchFileRequest.credit_bytes is -1, allowed are 0 to 1125899906842624",
        ),
        (
            pb.FetchFileRequest(piece_bytes=(1 << 20) + 1),
            "FetchFileRequest.piece_bytes is 1048577, allowed are 0 to 1048576",
        ),
        (pb.FetchFileRequest(ranges=[pb.Range(begin=-1)]), "Range.begin is -1, allowed are 0 to 1125899906842624"),
        (
            pb.FetchFileRequest(ranges=[pb.Range()] * 1025),
            "FetchFileRequest.ranges has 1025 elements, allowed are 1024",
        ),
        (pb.UploadHeader(digest="f" * 65), "UploadHeader.digest has 65 characters, allowed are 64"),
        (pb.UploadHeader(part=-1), "UploadHeader.part is -1, allowed are 0 to 1099511627776"),
        (
            pb.UploadHeader(attempt=(1 << 40) + 1),
            "UploadHeader.attempt is 1099511627777, allowed are 0 to 1099511627776",
        ),
        (pb.Plan(stages=[pb.Stage()] * 1025), "Plan.stages has 1025 elements, allowed are 1024"),
        (pb.Calibration(kept=math.inf), "Calibration.kept is inf, allowed are finite numbers"),
        (pb.Calibration(kept=-0.5), "Calibration.kept is -0.5, allowed are numbers from 0 on"),
        (pb.Plan(policy=7), "Plan.policy is 7; this version knows POLICY_UNSPECIFIED, POLICY_PAPER, POLICY_AUTO"),
        (
            pb.NextTaskRequest(device=pb.DeviceReport(class_counts=[1, -2])),
            "DeviceReport.class_counts is -2, allowed are 0 to 1099511627776",
        ),
    ],
)
def test_a_refusal_says_what_there_is_and_what_is_allowed(message: Message, said: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        check_message(message)
    assert str(caught.value) == said


def test_a_loss_may_be_anything() -> None:
    for loss in (math.nan, math.inf, -math.inf):
        check_message(pb.Progress(loss=loss))
        check_message(pb.Result(stages=[pb.StageResult(loss_first=loss, loss_last=loss, seconds=loss)]))


def test_messages_that_lie_too_deep_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    message = pb.CommitUpdateRequest(result=pb.Result(plan=pb.Plan(stages=[pb.Stage()])))
    check_message(message)
    monkeypatch.setattr(bounds, "MOST_DEPTH", 3)
    with pytest.raises(ProtocolError, match="Stage lies in 3 messages, allowed are 2"):
        check_message(message)


@pytest.mark.parametrize(
    ("data", "kind", "core"),
    [
        pytest.param(
            pb.DeviceReport(class_counts=[1] * 1_000_000).SerializeToString(),
            pb.DeviceReport,
            DeviceReport,
            id="counts",
        ),
        pytest.param(
            pb.Result(trained_units=[1] * 1_000_000).SerializeToString(), pb.Result, Result, id="trained units"
        ),
        pytest.param(b"\x42\x00" * 500_000, pb.Result, Result, id="empty stages"),
        pytest.param(b"\xf8\x07\x01" * 330_000, pb.Result, Result, id="unknown fields"),
    ],
)
def test_a_million_elements_are_refused_without_converting_them(data: bytes, kind: type[Message], core: type) -> None:
    assert len(data) <= MESSAGE_LIMIT_BYTES
    message = kind.FromString(data)
    tracemalloc.start()
    try:
        start = time.process_time()
        with pytest.raises(ProtocolError):
            from_message(message, core)
        took = time.process_time() - start
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    assert took < 0.5


def test_the_largest_messages_that_are_within_bounds_can_be_received() -> None:
    stage = pb.StageResult(**{field.name: (1 << 40) for field in pb.StageResult.DESCRIPTOR.fields})
    planned = pb.Stage(
        first=512, last=512, micro_batch=1 << 20, build_batch=1 << 20, predicted=pb.PeakComponents(activations=1 << 50)
    )
    part = pb.PartInfo(part=515, size_bytes=1 << 50, digest="f" * 64)
    result = pb.Result(
        plan=pb.Plan(stages=[planned] * MOST_UNITS),
        trained_units=range(MOST_UNITS),
        stages=[stage] * MOST_UNITS,
        parts=[part] * (MOST_UNITS + 4),
    )
    report = pb.DeviceReport(name="ü" * 4096, class_counts=[10_000_000] * MOST_CLASSES)
    chunk = pb.UploadPartRequest(chunk=pb.Chunk(offset=1 << 50, data=bytes(1 << 20)))
    for message in (result, report, chunk):
        check_message(message)
        assert message.ByteSize() < MESSAGE_LIMIT_BYTES
    channels = [0.5] * MOST_CHANNELS
    model = pb.ModelSpec(classes=["123456789" * 3] * MOST_CLASSES, mean=channels, std=channels)
    check_message(model)
    assert model.ByteSize() < MOST_MODEL_BYTES  # which is a file


def test_each_side_sends_no_more_than_the_other_receives() -> None:
    client, server = dict(CLIENT_OPTIONS), dict(SERVER_OPTIONS)
    send, receive = "grpc.max_send_message_length", "grpc.max_receive_message_length"
    assert client[send] == server[receive] == (1 << 20) + (64 << 10)
    assert server[send] == client[receive] == (1 << 20) + (64 << 10)
