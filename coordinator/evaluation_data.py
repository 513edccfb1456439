"""A look at a job's test data before it is served: `python -m coordinator.evaluation_data`, in a process of its own.

Opening data takes numpy and PIL, which the server process does without. One line of JSON asks, one answers.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fedepth.child import module_argv, run_child
from fedepth.errors import DataError, FedepthError
from fedepth.files import disk_errors
from fedepth.task import ModelSpec

DECODED = 8  # samples that are read, spread over all of them

LOOK_ARGV = module_argv("coordinator.evaluation_data")


@dataclass(frozen=True)
class Request:
    """`data` is a folder, or "digits"."""

    data: str
    model: ModelSpec


@dataclass(frozen=True)
class Answer:
    """What the data is, or in `problem` why it cannot be used.

    Attributes:
        class_counts: samples of each class, in label order.
    """

    class_counts: tuple[int, ...] = ()
    problem: str = ""


def look(request: Request) -> Answer:
    """Opens the data, counts the samples of every class, and reads a few."""
    try:
        with disk_errors("the test data cannot be read", Path(request.data)):
            return Answer(_counts(request))
    except FedepthError as error:
        return Answer(problem=str(error))


def _counts(request: Request) -> tuple[int, ...]:
    import numpy as np

    from fedepth.data.read import DIGITS, open_images, read_sound

    images = open_images(request.data if request.data == DIGITS else Path(request.data), request.model, "test")
    if len(images) == 0:
        raise DataError(f"{request.data} holds no test samples")
    chosen = np.linspace(0, len(images) - 1, min(DECODED, len(images))).astype(np.int64)
    _, sound, errors = read_sound(images, chosen)
    if not len(sound):
        raise errors[0]
    return tuple(np.bincount(images.labels, minlength=len(request.model.classes)).tolist())


def main() -> None:
    # Standard output is for the answer; whatever a library prints goes to standard error.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        answers.write(msgspec.json.encode(look(msgspec.json.decode(sys.stdin.buffer.readline(), type=Request))))


if __name__ == "__main__":
    run_child(main)
