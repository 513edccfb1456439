"""Reports on the wire. Where a device has many classes, what it says of its data is a file, which it sends once.

Ten thousand classes have more than 100 kB with their names and counts, also compressed, and a device asks for work
every half a minute.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from google.protobuf.message import DecodeError

from fedepth.errors import ProtocolError
from fedepth.task import DeviceReport
from fedepth_wire.convert import to_message
from fedepth_wire.v1 import federation_pb2 as pb

INLINE_BYTES = 8 << 10  # what a message may hold of it
MOST_DATA_BYTES = 4 << 20
_Field = Literal["class_counts", "class_names", "folder_names", "folder_counts"]
DATA_FIELDS: tuple[_Field, ...] = ("class_counts", "class_names", "folder_names", "folder_counts")


def report_message(report: DeviceReport) -> tuple[pb.DeviceReport, bytes]:
    """A report, and the file that it names; no bytes where all of it is in the message."""
    message = to_message(report, pb.DeviceReport)
    data = pb.DeviceData()
    for name in DATA_FIELDS:
        getattr(data, name).extend(getattr(message, name))
    content = data.SerializeToString(deterministic=True)
    if len(content) <= INLINE_BYTES:
        return message, b""
    for name in DATA_FIELDS:
        message.ClearField(name)
    message.data_digest = hashlib.sha256(content).hexdigest()
    return message, content


def put_into(message: pb.DeviceReport, content: bytes) -> None:
    """Puts what a report says of its data by digest into it, from a file with that digest.

    Raises:
        ProtocolError: it cannot be read.
    """
    try:
        data = pb.DeviceData.FromString(content)
    except DecodeError as error:
        raise ProtocolError(f"what a device says of its data cannot be read: {error}") from None
    for name in DATA_FIELDS:
        message.ClearField(name)
        getattr(message, name).extend(getattr(data, name))
