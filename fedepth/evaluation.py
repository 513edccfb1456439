"""What weights do on test data: accuracy and mean cross-entropy, batch by batch.

Batches are always the same, and their figures are added in their order, so that whoever computes which of them changes
nothing about the sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedepth.data.damage import check_share
from fedepth.data.read import DIGITS, Images, open_images, read_sound
from fedepth.data.row_files import find_rows, fingerprint
from fedepth.data.rows import Rows, damaged_only
from fedepth.data.transforms import model_inputs
from fedepth.errors import DataError
from fedepth.task import ModelSpec

if TYPE_CHECKING:
    from fedepth.models.run import Model

# One batch of input images; at 224 px 27 of them, at 32 px the 256 that are enough for any speed.
BATCH_BYTES = 16 << 20
LARGEST_BATCH = 256


@dataclass(frozen=True)
class BatchFigures:
    """What came of one batch.

    Attributes:
        loss: the sum over its samples.
        damaged: what is wrong with the images that cannot be read; they are not among the samples.
    """

    samples: int
    correct: int
    loss: float
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluated:
    """Accuracy as a fraction, mean cross-entropy, the samples that they are of, and those left out."""

    accuracy: float
    loss: float
    samples: int
    damaged: tuple[str, ...] = ()


def open_test_images(test_data: str, spec: ModelSpec, tokenizer: str = "") -> Images:
    """A job's test data.

    Args:
        tokenizer: of a job that trains on texts, as JSON; see `fedepth.data.text`.

    Raises:
        DataError: they cannot be read, or there are none.
    """
    if spec.columns is None:
        images = open_images(test_data if test_data == DIGITS else Path(test_data), spec, "test")
    else:
        images = _rows(fingerprint(find_rows(Path(test_data), "test")), test_data, spec, tokenizer)
    if len(images) == 0:
        what = damaged_only(images) if isinstance(images, Rows) else ""
        raise DataError(f"{test_data} holds no test samples{what}. Give the job test data, or leave it out.")
    return images


@lru_cache(maxsize=1)  # they take long to read, and are the same round by round
def _rows(fingerprint: int, test_data: str, spec: ModelSpec, tokenizer: str) -> Images:
    return open_images(Path(test_data), spec, "test", tokenizer=tokenizer)


def check_rows(rows: Rows, most_damaged: float) -> None:
    """Raises DataError if a larger share of a file's rows is damaged."""
    found = rows.damaged
    check_share(len(rows), found.count, most_damaged, found.messages, "[test] most_damaged", "rows")


def batch_size(spec: ModelSpec) -> int:
    """Samples of a batch."""
    return max(1, min(LARGEST_BATCH, BATCH_BYTES // (4 * int(np.prod(spec.input_shape)))))


def batches(
    model: Model, images: Images, spec: ModelSpec, first: int = 0, last: int | None = None
) -> Iterator[BatchFigures]:
    """The figures of the batches `first` to `last` - 1; by default of all.

    Args:
        model: in evaluation mode, with its weights.
    """
    import torch  # whoever only adds up what others computed has no use for it
    from torch.nn import functional as F

    size = batch_size(spec)
    starts = range(0, len(images), size)
    for start in starts[first:last]:
        pixels, sound, errors = read_sound(images, np.arange(start, min(start + size, len(images))))
        damaged = tuple(map(str, errors))
        if not len(sound):
            yield BatchFigures(0, 0, 0.0, damaged)
            continue
        with torch.inference_mode():
            logits = model(torch.from_numpy(model_inputs(pixels, spec)))
            labels = torch.from_numpy(images.labels[sound])
            loss = float(F.cross_entropy(logits, labels, reduction="sum"))
            correct = int((logits.argmax(dim=1) == labels).sum())
        yield BatchFigures(len(sound), correct, loss, damaged)


def total(figures: Iterator[BatchFigures] | Sequence[BatchFigures], count: int, most_damaged: float) -> Evaluated:
    """The figures of all batches, in their order.

    Args:
        count: of the images, damaged ones included.
        most_damaged: share of them that may be damaged.

    Raises:
        DataError: more are damaged, or all.
    """
    samples, correct, loss = 0, 0, 0.0
    damaged: dict[int, str] = {}
    for each in figures:
        samples, correct, loss = samples + each.samples, correct + each.correct, loss + each.loss
        damaged.update((len(damaged) + number, text) for number, text in enumerate(each.damaged))
        check_share(count - len(damaged), len(damaged), most_damaged, damaged, "[test] most_damaged")
    if not samples:
        raise DataError("; ".join([f"none of the {count} test samples can be read", *list(damaged.values())[:1]]))
    return Evaluated(correct / samples, loss / samples, samples, tuple(damaged.values()))
