"""What a message may hold, checked before any of it is converted.

A message of 1 MiB can hold a million numbers, and as Python objects they take a hundred times that. So lengths come
first: protobuf knows them without looking at what it holds. Every field of every message has a bound: the one below, or
the default of its type, so that a field added later is bounded without anybody thinking of it.

    integers    0 to 2^50
    floats      finite
    text        256 characters
    bytes       one chunk, 1 MiB
    repeated    1,024 elements
    depth       8 messages
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableSequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from fedepth.errors import ProtocolError
from fedepth.task import MOST_CHANNELS, MOST_CLASSES, MOST_COLUMNS

CHUNK_BYTES = 1 << 20
MOST_SIZE = 1 << 50
MOST_COUNT = 1 << 40
MOST_TEXT = 256
MOST_LONG_TEXT = 4096
MOST_ELEMENTS = 1024
MOST_DEPTH = 8


@dataclass(frozen=True)
class Bound:
    """What one field may hold; each applies to fields of its type.

    Attributes:
        least: the smallest number.
        most: the largest integer.
        finite: a float must be neither infinite nor NaN.
        least_float: the smallest float.
        length: characters of text, or bytes.
        elements: of a repeated field.
    """

    least: int = 0
    most: int = MOST_SIZE
    finite: bool = True
    least_float: float = -math.inf
    length: int = MOST_TEXT
    elements: int = MOST_ELEMENTS


DEFAULT = Bound()
_BYTES = Bound(length=CHUNK_BYTES)
_COUNT = Bound(most=MOST_COUNT)
_LONG_TEXT = Bound(length=MOST_LONG_TEXT)
_DIGEST = Bound(length=64)  # a sha256 in hex
_REQUEST = Bound(length=2048)  # for a certificate, with a key on P-256: some 200 bytes
_CERTIFICATE = Bound(length=8192)
_NOT_NEGATIVE = Bound(least_float=0.0)
# Of memory: a resource limit may be any number, and a bound that is none counts for nothing.
_ANY_SIZE = Bound(most=(1 << 63) - 1)
# Refused by admission, which says what to do about it.
_ANY_FLOAT = Bound(finite=False)

BOUNDS: Mapping[str, Mapping[str, Bound]] = {
    "MemoryLimit": {"available_bytes": _ANY_SIZE, "limit_bytes": _ANY_SIZE},
    "Budget": {
        "available_bytes": _ANY_SIZE,
        "limits": Bound(elements=64),
        "fraction": _NOT_NEGATIVE,
    },
    "DeviceReport": {
        "name": _LONG_TEXT,  # a coordinator rejects it with a message for the operator
        "hardware": _LONG_TEXT,
        "accelerator": _LONG_TEXT,
        "software": _LONG_TEXT,
        "sample_count": _COUNT,
        "class_counts": Bound(most=MOST_COUNT, elements=MOST_CLASSES),
        "class_names": Bound(length=MOST_LONG_TEXT, elements=MOST_CLASSES),
        "folder_names": Bound(length=MOST_LONG_TEXT, elements=2 * MOST_CLASSES),
        "folder_counts": Bound(most=MOST_COUNT, elements=2 * MOST_CLASSES),
        "data_digest": _DIGEST,
    },
    "DeviceData": {
        "class_counts": Bound(most=MOST_COUNT, elements=MOST_CLASSES),
        "class_names": Bound(length=MOST_LONG_TEXT, elements=MOST_CLASSES),
        "folder_names": Bound(length=MOST_LONG_TEXT, elements=2 * MOST_CLASSES),
        "folder_counts": Bound(most=MOST_COUNT, elements=2 * MOST_CLASSES),
    },
    "ColumnSums": {
        "asked": _DIGEST,
        "counts": Bound(most=MOST_COUNT, elements=MOST_COLUMNS),
        "means": Bound(elements=MOST_COLUMNS),
        "squares": Bound(elements=MOST_COLUMNS, least_float=0.0),
    },
    "Calibration": {
        "kept": _NOT_NEGATIVE,
        "kernel_share": _NOT_NEGATIVE,
        "depthwise_share": _NOT_NEGATIVE,
        "reordered_share": _NOT_NEGATIVE,
    },
    "ModelSpec": {
        "classes": Bound(elements=MOST_CLASSES),
        "input_shape": Bound(most=MOST_COUNT, elements=16),
        "mean": Bound(elements=MOST_CHANNELS),
        "std": Bound(elements=MOST_CHANNELS, least_float=0.0),
    },
    "TextSpec": {
        "text": Bound(elements=MOST_COLUMNS),
        "tokenizer": _DIGEST,
    },
    "TableSpec": {
        "numeric": Bound(elements=MOST_COLUMNS),
        "mean": Bound(elements=MOST_COLUMNS),
        "std": Bound(elements=MOST_COLUMNS, least_float=0.0),
        "categorical": Bound(elements=MOST_COLUMNS),
    },
    "Category": {"values": Bound(elements=MOST_CHANNELS)},
    "TrainingSpec": {
        "learning_rate": _NOT_NEGATIVE,
        "momentum": _NOT_NEGATIVE,
        "weight_decay": _NOT_NEGATIVE,
        "proximal_mu": _NOT_NEGATIVE,
        "distil_weight": _NOT_NEGATIVE,
        "distil_temperature": _NOT_NEGATIVE,
        "mutual": _COUNT,
        "mutual_weight": _NOT_NEGATIVE,
        "mutual_temperature": _NOT_NEGATIVE,
    },
    "Plan": {"models": _COUNT},
    "StageResult": {
        "loss_first": _ANY_FLOAT,
        "loss_last": _ANY_FLOAT,
        "steps": _COUNT,
        "samples_seen": _COUNT,
        "seconds": _ANY_FLOAT,
        "models": _COUNT,
    },
    "Result": {"sample_count": _COUNT, "seconds": _ANY_FLOAT, "weights_digest": _DIGEST},
    "PartInfo": {"digest": _DIGEST},
    "Task": {"index_digest": _DIGEST, "model_digest": _DIGEST},
    "FetchFileRequest": {"digest": _DIGEST, "piece_bytes": Bound(most=CHUNK_BYTES)},
    "UploadHeader": {"attempt": _COUNT, "part": _COUNT, "digest": _DIGEST},
    "Failure": {"message": _LONG_TEXT},
    "Progress": {"loss": _ANY_FLOAT},  # of a run that diverged, which must still be told
    "Rejected": {"message": _LONG_TEXT},
    "Refused": {"message": _LONG_TEXT},
    "Chunk": {"data": _BYTES},
    "EnrollRequest": {"secret": Bound(length=16), "request": _REQUEST},
    "EnrollReply": {"certificate": _CERTIFICATE, "authority": _CERTIFICATE},
    "RenewRequest": {"request": _REQUEST},
    "RenewReply": {"certificate": _CERTIFICATE},
    "JobStatusReply": {"accuracy": Bound(least_float=-1.0), "onnx_path": _LONG_TEXT},
    "Event": {"json": Bound(length=CHUNK_BYTES)},
}

_INTEGERS = frozenset({FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64})
_INTEGERS |= {FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64}
_FLOATS = frozenset({FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE})


def bound_of(message: str, field: str) -> Bound:
    """The bound of a field, by the names of its message and itself."""
    return BOUNDS.get(message, {}).get(field, DEFAULT)


def check_message(message: Message) -> None:
    """Checks a message and all that it holds against their bounds; converts nothing.

    Raises:
        ProtocolError: a field goes beyond its bound, or an enum has a value that this version does not know.

    Fields that it does not know are of a newer version and ignored: a fleet is not updated in one moment.
    """
    _check(message, 1)


def _check(message: Message, depth: int) -> None:
    descriptor: Any = message.DESCRIPTOR
    name = descriptor.name
    if depth > MOST_DEPTH:
        raise ProtocolError(f"{name} lies in {depth - 1} messages, allowed are {MOST_DEPTH - 1}")
    for field in descriptor.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        bound = bound_of(name, field.name)
        if not isinstance(value, MutableSequence):  # only repeated fields are
            value = (value,)
        elif len(value) > bound.elements:
            raise ProtocolError(f"{name}.{field.name} has {len(value)} elements, allowed are {bound.elements}")
        _check_values(name, field, value, bound, depth)


def _check_values(name: str, field: FieldDescriptor, values: Iterable[Any], bound: Bound, depth: int) -> None:
    where = f"{name}.{field.name}"
    if field.message_type is not None:
        for value in values:
            _check(value, depth + 1)
    elif field.enum_type is not None:
        known = field.enum_type.values_by_number
        for value in values:
            if value not in known:
                names = ", ".join(field.enum_type.values_by_name)
                raise ProtocolError(f"{where} is {value}; this version knows {names}")
    elif field.cpp_type in _INTEGERS:
        for value in values:
            if not bound.least <= value <= bound.most:
                raise ProtocolError(f"{where} is {value}, allowed are {bound.least} to {bound.most}")
    elif field.cpp_type in _FLOATS:
        for value in values:
            if bound.finite and not math.isfinite(value):
                raise ProtocolError(f"{where} is {value}, allowed are finite numbers")
            if value < bound.least_float:
                raise ProtocolError(f"{where} is {value}, allowed are numbers from {bound.least_float:g} on")
    elif field.cpp_type == FieldDescriptor.CPPTYPE_STRING:  # bytes too
        what = "characters" if field.type == FieldDescriptor.TYPE_STRING else "bytes"
        for value in values:
            if len(value) > bound.length:
                raise ProtocolError(f"{where} has {len(value)} {what}, allowed are {bound.length}")
