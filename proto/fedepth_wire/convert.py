"""Messages ↔ core types. Field names are the same on both sides, so that one rule converts all of them.

On the way in, a message is first checked against its bounds (fedepth_wire.bounds), then its values against the core
types: a field out of bounds or of the wrong type raises ProtocolError.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import msgspec
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from fedepth.errors import ProtocolError
from fedepth_wire.bounds import check_message

M = TypeVar("M", bound=Message)
T = TypeVar("T")


def to_message(value: Any, kind: type[M]) -> M:
    """A core dataclass as a message of type `kind`."""
    return json_format.ParseDict(_with_enum_names(msgspec.to_builtins(value), kind.DESCRIPTOR, to_wire=True), kind())


def from_message(message: Message, kind: type[T]) -> T:
    """A message as the core dataclass `kind`.

    Raises:
        ProtocolError: a field is out of bounds, or does not fit `kind`.
    """
    check_message(message)
    fields = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    try:
        return msgspec.convert(_with_enum_names(fields, message.DESCRIPTOR, to_wire=False), kind, strict=False)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"{message.DESCRIPTOR.name} cannot be read as {kind.__name__}: {error}") from None


def _with_enum_names(value: Any, descriptor: Any, *, to_wire: bool) -> Any:
    """Maps "paper" to POLICY_PAPER and back, in every enum field below `descriptor`."""
    fields = {field.name: field for field in descriptor.fields}
    return {name: _field(item, fields[name], to_wire) if name in fields else item for name, item in value.items()}


def _field(item: Any, field: FieldDescriptor, to_wire: bool) -> Any:
    if item is None:  # an optional message: unset on the wire
        return None
    if isinstance(item, (list, tuple)):
        return [_field(each, field, to_wire) for each in item]
    if field.enum_type is not None:
        prefix = field.enum_type.values[0].name.removesuffix("UNSPECIFIED")
        if to_wire:
            return prefix + item.upper()
        return item.removeprefix(prefix).lower()
    if to_wire and isinstance(item, float) and not math.isfinite(item):
        # JSON has no such numbers, and the loss of a run that diverged must still be told.
        return "NaN" if math.isnan(item) else "Infinity" if item > 0 else "-Infinity"
    if field.message_type is not None:
        return _with_enum_names(item, field.message_type, to_wire=to_wire)
    return item
