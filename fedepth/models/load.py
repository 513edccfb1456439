"""A whole model with weights from a file, for evaluation and export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fedepth.errors import ModelError
from fedepth.models.split import SplitModel, assign, split_spec
from fedepth.task import ModelSpec
from fedepth.weights import open_weights


def load_model(spec: ModelSpec, weights: Path, allowed: Sequence[str] | None = None) -> SplitModel:
    """The job's model on the CPU, in eval mode, with the weights of a safetensors file.

    Raises:
        ModelError: the model cannot be built, or the file's tensors are not the model's.
        StateError: the file is missing or damaged.
    """
    split_model = split_spec(spec, allowed)
    owners = (*split_model.units, split_model.head)
    with open_weights(weights) as reader:
        expected = {name for unit in owners for name in unit.tensor_names}
        if odd := sorted(expected.symmetric_difference(reader.names)):
            raise ModelError(
                f"{weights} does not hold the tensors of {spec.name}: {len(odd)} are missing or unknown, "
                f"such as {', '.join(odd[:3])}. It belongs to another model."
            )
        for name in sorted(expected):
            assign(split_model, name, torch.from_numpy(reader.read(name)), requires_grad=False)
    split_model.model.eval()
    return split_model
