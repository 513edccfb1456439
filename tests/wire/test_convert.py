"""Messages and core types: everything that travels arrives as it was sent."""

from __future__ import annotations

import dataclasses
import enum
import math
import types
import typing
from typing import Any

import pytest
from fedepth_wire.convert import from_message, to_message
from fedepth_wire.v1 import federation_pb2 as pb
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from fedepth import budget, costs, plan, task
from fedepth.errors import ProtocolError

# They come with the graph, in one file per job.
NOT_ON_THE_WIRE = {
    *(costs.Size, costs.Convolution, costs.PassCost, costs.StepCost, costs.UnitCost, costs.ModelCosts),
}
KINDS: dict[type, type[Message]] = {
    kind: getattr(pb, kind.__name__)
    for module in (plan, costs, budget, task)
    for kind in vars(module).values()
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind not in NOT_ON_THE_WIRE
}
LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(0, 2**40),  # the smallest bound of any integer
    float: st.floats(0, allow_nan=False, allow_infinity=False),
    str: st.text(max_size=8),
    bool: st.booleans(),
}


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a core type, by its annotations: a new field is covered without a change here."""
    if kind in LEAVES:
        return LEAVES[kind]
    if typing.get_origin(kind) is types.UnionType:
        (present,) = (each for each in typing.get_args(kind) if each is not types.NoneType)
        return st.none() | st.deferred(lambda: values(present))
    if typing.get_origin(kind) is tuple:
        return st.lists(values(typing.get_args(kind)[0]), max_size=2).map(tuple)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return st.sampled_from(kind)
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{field.name: values(hints[field.name]) for field in dataclasses.fields(kind)})


def smallest(kind: Any) -> Any:
    """A value whose every field is zero, empty or the first."""
    if typing.get_origin(kind) is types.UnionType:
        return None
    if typing.get_origin(kind) is tuple:
        return ()
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return next(iter(kind))
    if kind in LEAVES:
        return kind()
    hints = typing.get_type_hints(kind)
    return kind(**{field.name: smallest(hints[field.name]) for field in dataclasses.fields(kind)})


PLAN = plan.Plan((), (), plan.Policy.PAPER, 5)


def test_there_is_a_message_for_every_core_type() -> None:
    assert {
        task.Task,
        task.Result,
        task.DeviceReport,
        task.Failure,
        task.Progress,
        task.ModelSpec,
    } <= KINDS.keys()


# What a message names by digest, and has in the fields of the core type when the file is there.
FILES = {task.Task: ("model_digest", "model_bytes"), task.DeviceReport: ("data_digest",)}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_core_type_survives_the_wire(kind: type) -> None:
    @settings(derandomize=True, deadline=None, max_examples=15)
    @given(value=values(kind))
    def check(value: Any) -> None:
        data = to_message(value, KINDS[kind]).SerializeToString()
        message = KINDS[kind].FromString(data)
        assert from_message(message, kind) == value

    check()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_zeros_and_empty_fields_survive_the_wire(kind: type) -> None:
    value = smallest(kind)
    assert from_message(KINDS[kind].FromString(to_message(value, KINDS[kind]).SerializeToString()), kind) == value


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_fields_have_the_same_names_in_the_same_order_on_both_sides(kind: type) -> None:
    descriptor: Descriptor = KINDS[kind].DESCRIPTOR
    names = [field.name for field in descriptor.fields if field.name not in FILES.get(kind, ())]
    assert names == [field.name for field in dataclasses.fields(kind)]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_no_finite_number_survives_the_wire(value: float) -> None:
    progress = task.Progress("t", 1, "d", "training", loss=value)
    message = pb.Progress.FromString(to_message(progress, pb.Progress).SerializeToString())
    back = from_message(message, task.Progress).loss
    assert back == value or (math.isnan(back) and math.isnan(value))


def test_enums_have_their_prefixed_names_on_the_wire() -> None:
    stage = plan.Stage(0, 1, 2, plan.CachePlace.DISK, 4, plan.PeakComponents(1, 2, 3, 4, 5, 6, 7))
    message = to_message(dataclasses.replace(PLAN, stages=(stage,)), pb.Plan)
    assert message.policy == pb.POLICY_PAPER
    assert message.stages[0].cache == pb.CACHE_PLACE_DISK
    assert message.stages[0].predicted.scratch == 6


@pytest.mark.parametrize("kind", [plan.Policy, plan.CachePlace, task.Outcome, task.InputType])
def test_every_enum_has_an_unspecified_zero_and_the_values_of_the_core_type(kind: type[enum.Enum]) -> None:
    names = [value.name for value in pb.DESCRIPTOR.enum_types_by_name[kind.__name__].values]
    prefix = names[0].removesuffix("UNSPECIFIED")
    assert names[0].endswith("_UNSPECIFIED")
    assert names[1:] == [prefix + member.value.upper() for member in kind]


def test_an_unspecified_enum_is_refused() -> None:
    message = to_message(PLAN, pb.Plan)
    message.policy = pb.POLICY_UNSPECIFIED
    with pytest.raises(ProtocolError, match=r"Plan cannot be read as Plan: .*policy"):
        from_message(message, plan.Plan)


def test_an_enum_value_from_a_newer_side_is_refused() -> None:
    message = pb.Plan.FromString(to_message(PLAN, pb.Plan).SerializeToString() + b"\x18\x63")  # field 3, value 99
    with pytest.raises(ProtocolError, match=r"^Plan\.policy is 99; this version knows POLICY_UNSPECIFIED, "):
        from_message(message, plan.Plan)


def test_a_message_that_was_left_empty_is_refused() -> None:
    with pytest.raises(ProtocolError, match="Task cannot be read as Task"):
        from_message(pb.Task(), task.Task)


def test_a_field_from_a_newer_side_is_ignored_at_any_depth() -> None:
    data = to_message(PLAN, pb.Plan).SerializeToString() + b"\xf8\x07\x01"  # field 127, value 1
    newer = pb.Plan.FromString(data)
    assert from_message(newer, plan.Plan) == PLAN
    assert from_message(pb.Result(plan=newer).plan, plan.Plan) == PLAN


def test_what_an_older_side_does_not_say_means_one_model() -> None:
    """A fleet is not updated in one moment."""
    assert from_message(pb.Plan(policy=pb.POLICY_AUTO), plan.Plan).models == 1
    assert from_message(pb.StageResult(), task.StageResult).models == 1
    spec = from_message(pb.TrainingSpec(cache_type=pb.CACHE_TYPE_FLOAT32), task.TrainingSpec)
    assert (spec.mutual, spec.mutual_weight, spec.mutual_temperature) == (1, 1.0, 1.0)
