"""What the memory of a tier is measured on."""

from __future__ import annotations

import numpy as np
import pytest

from fedepth.data.transforms import model_inputs
from fedepth.simulation.worker.peak import Noise
from fedepth.task import Category, InputType, ModelSpec, TableSpec, TextSpec

COLUMNS = TableSpec("label", ("x", "y"), (1.0, 2.0), (2.0, 3.0), (Category("c", ("r",)), Category("d", ("s", "t"))))


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (ModelSpec("images", ("a", "b"), (3, 4, 4), (0.5,) * 3, (0.5,) * 3), np.uint8),
        (ModelSpec("bytes", ("a", "b"), (6,), (), (), InputType.TOKENS), np.uint8),
        (ModelSpec("texts", ("a", "b"), (6,), (), (), InputType.TOKENS, text=TextSpec("l", ("t",), 1000)), np.uint16),
        (ModelSpec("long", ("a", "b"), (6,), (), (), InputType.TOKENS, text=TextSpec("l", ("t",), 1 << 20)), np.int32),
        (ModelSpec("table", ("a", "b"), (COLUMNS.features,), (), (), table=COLUMNS), np.float64),
    ],
)
def test_noise_is_of_the_shape_and_type_of_a_model_s_samples(spec: ModelSpec, dtype: type) -> None:
    noise = Noise(spec, 5)
    found = noise.read(np.arange(5))
    assert found.shape == (5, *spec.sample_shape) and found.dtype == dtype
    assert found.std() > 0
    assert model_inputs(found, spec).shape == (5, *spec.input_shape)
    assert noise.labels.tolist() == [0, 1, 0, 1, 0]
