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
from fedepth.data.damage import MOST_DAMAGED, check_share
from fedepth.data.folders import LeftOut, never_a_folder
from fedepth.data.idx_sets import find_idx
from fedepth.data.scan import left_out
from fedepth.errors import DataError, FedepthError
from fedepth.files import disk_errors
from fedepth.job_sections import DIGITS
from fedepth.printable import visible
from fedepth.task import ModelSpec

DECODED = 8  # samples that are read, spread over all of them
AT_ONCE = 64

LOOK_ARGV = module_argv("coordinator.evaluation_data")


@dataclass(frozen=True)
class Request:
    """`data` is a folder or a file, or "digits"; `tokenizer` is the job's tokenizer file, or empty."""

    data: str
    model: ModelSpec
    most_damaged: float = MOST_DAMAGED
    tokenizer: str = ""


@dataclass(frozen=True)
class Answer:
    """What the data is, or in `problem` why it cannot be used.

    Attributes:
        class_counts: samples of each class, in label order; damaged ones not among them, if any was met.
        damaged: how many files or rows cannot be read; 0 where the few that were read are all sound.
        example: what is wrong with one.
        left_out: what else lies in the folder and is not taken.
    """

    class_counts: tuple[int, ...] = ()
    damaged: int = 0
    example: str = ""
    problem: str = ""
    left_out: tuple[LeftOut, ...] = ()


def look(request: Request) -> Answer:
    """Opens the data, counts the samples of every class, and reads a few; all, where one of these is damaged."""
    try:
        with disk_errors("the test data cannot be read", Path(request.data)):
            return _counts(request)
    except FedepthError as error:
        return Answer(problem=str(error))


def _counts(request: Request) -> Answer:
    import numpy as np

    from fedepth.data.read import open_images, read_sound
    from fedepth.data.rows import Rows, damaged_only
    from fedepth.data.text import read_tokenizer

    unused = _left_out(request)
    source = request.data if request.data == DIGITS else Path(request.data)
    tokenizer = read_tokenizer(Path(request.tokenizer)) if request.tokenizer else ""
    images = open_images(source, request.model, "test", tokenizer=tokenizer)
    if len(images) == 0:
        what = damaged_only(images) if isinstance(images, Rows) else ""
        raise DataError(f"{request.data} holds no test samples{what}")
    if isinstance(images, Rows):
        found = images.damaged
        check_share(len(images), found.count, request.most_damaged, found.messages, "[test] most_damaged", "rows")
        counts = np.bincount(images.labels, minlength=len(request.model.classes)).tolist()
        return Answer(tuple(counts), found.count, found.messages.get(0, ""), left_out=unused)
    chosen = np.linspace(0, len(images) - 1, min(DECODED, len(images))).astype(np.int64)
    damaged: dict[int, str] = {}
    if not read_sound(images, chosen)[2]:
        sound = images.labels
    else:
        kept = []
        for start in range(0, len(images), AT_ONCE):
            _, readable, errors = read_sound(images, np.arange(start, min(start + AT_ONCE, len(images))))
            kept.append(images.labels[readable])
            damaged.update((len(damaged) + number, str(error)) for number, error in enumerate(errors))
        sound = np.concatenate(kept)
        check_share(len(sound), len(damaged), request.most_damaged, damaged, "[test] most_damaged")
    counts = np.bincount(sound, minlength=len(request.model.classes)).tolist()
    return Answer(tuple(counts), len(damaged), damaged.get(0, ""), left_out=unused)


def _left_out(request: Request) -> tuple[LeftOut, ...]:
    """What is not taken of the test data.

    Raises:
        DataError: it can never hold one of the job's classes.
    """
    folder, classes = Path(request.data), request.model.classes
    if request.data == DIGITS:
        return ()
    has_folders = request.model.columns is None and find_idx(folder, "test") is None
    for name in classes if has_folders else ():
        why = never_a_folder(name)
        if why:
            raise DataError(
                f"{request.data} holds class folders, and class {visible(name)} can have none: {why}; give it another "
                "name in [model] classes"
            )
    return left_out(folder, request.model, "test")


def main() -> None:
    # Standard output is for the answer; whatever a library prints goes to standard error.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        answers.write(msgspec.json.encode(look(msgspec.json.decode(sys.stdin.buffer.readline(), type=Request))))


if __name__ == "__main__":
    run_child(main)
