"""Tasks on the wire. What all tasks of a job have in common is a file, which devices fetch once.

The names of ten thousand classes have more than 100 kB, also compressed: as part of a message they would have to arrive
whole, again with every task, and on a link that is cut more often than that, never did.
"""

from __future__ import annotations

import hashlib

from google.protobuf.message import DecodeError

from fedepth.errors import ProtocolError
from fedepth.task import ModelSpec, Task
from fedepth_wire.chunks import Source
from fedepth_wire.convert import from_message, to_message
from fedepth_wire.v1 import federation_pb2 as pb

MOST_MODEL_BYTES = 4 << 20  # names of at most 1 MiB, and mean and standard deviation of every channel


def model_source(model: ModelSpec) -> Source:
    """A job's model as the file that its tasks name: a ModelSpec message."""
    data = to_message(model, pb.ModelSpec).SerializeToString(deterministic=True)
    return Source(data, len(data), hashlib.sha256(data).hexdigest())


def task_message(task: Task, model: Source) -> pb.Task:
    """A task, with its model by digest."""
    message = to_message(task, pb.Task)
    message.ClearField("model")
    message.model_digest, message.model_bytes = model.digest, model.size_bytes
    return message


def task_of(message: pb.Task, model: bytes) -> Task:
    """The task of a message whose model was fetched.

    Raises:
        ProtocolError: a field of either is out of bounds, or does not fit.
    """
    try:
        message.model.ParseFromString(model)
    except DecodeError as error:
        raise ProtocolError(f"the model of task {message.task_id[:80]!r} cannot be read: {error}") from None
    return from_message(message, Task)
