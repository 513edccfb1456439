"""Test data, opened for many evaluations."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedepth.errors import DataError
from fedepth.evaluation import BatchFigures, open_test_images, total
from fedepth.task import InputType, ModelSpec, TextSpec

SPEC = ModelSpec("texts", ("a", "b"), (4,), (), (), InputType.TOKENS, text=TextSpec("label", ("text",), 50))


def test_rows_are_read_again_only_where_they_are_other_ones(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    path.write_text("label,text\na,one\nb,two\n")
    first = open_test_images(str(path), SPEC)
    assert open_test_images(str(path), SPEC) is first
    swapped = ModelSpec("texts", ("b", "a"), (4,), (), (), InputType.TOKENS, text=SPEC.text)
    assert open_test_images(str(path), swapped).labels.tolist() == [1, 0]
    path.write_text("label,text\nb,one\nb,two\n")
    os.utime(path, ns=(1, 1))  # a clock may stand still
    assert open_test_images(str(path), SPEC).labels.tolist() == [1, 1]


def test_figures_of_all_batches_are_added_up_and_nothing_is_no_accuracy() -> None:
    found = total([BatchFigures(3, 1, 1.5, ("bad",)), BatchFigures(1, 1, 0.5, ())], 5, 0.5)
    assert (found.accuracy, found.loss, found.samples) == (0.5, 0.5, 4)
    with pytest.raises(DataError, match="none of the 1 test samples can be read; bad"):
        total([BatchFigures(0, 0, 0.0, ("bad",))], 1, 1.0)
