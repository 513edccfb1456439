"""What an export is compared with torch on: samples of the test data, or made up where there are none."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedepth import evaluation
from fedepth.data.read import read_sound
from fedepth.errors import DataError
from fedepth.export.onnx import random_samples
from fedepth.models.traced import TracedModel
from fedepth.task import ModelSpec

EXPORT_SAMPLES = 256


def comparison_samples(spec: ModelSpec, traced: TracedModel, test_data: str) -> tuple[npt.NDArray[Any], str]:
    """Samples as `export` takes them, and what they are, for people.

    Args:
        test_data: a path, "digits", or "" for none.
    """
    why = "the job has no test data"
    if test_data:
        try:
            images = evaluation.open_test_images(test_data, spec, traced.tokenizer)
            chosen = np.linspace(0, len(images) - 1, min(EXPORT_SAMPLES, len(images))).astype(np.int64)
            pixels, sound, errors = read_sound(images, chosen)
            if not len(sound):
                raise errors[0]
            return pixels, f"{len(sound)} samples of the test data"
        except (DataError, OSError) as error:
            why = f"the test data cannot be read: {error}"
    return random_samples(spec, traced.graph, EXPORT_SAMPLES), f"{EXPORT_SAMPLES} random inputs, since {why}"
