"""A whole model with weights from a file, for evaluation and export."""

from __future__ import annotations

from pathlib import Path

import torch

from fedepth.errors import ModelError
from fedepth.models.graph import Graph
from fedepth.models.run import Model
from fedepth.weights import open_weights


def load_model(graph: Graph, weights: Path) -> Model:
    """The model on the CPU, in evaluation mode, with the weights of a safetensors file; without its auxiliary heads.

    Raises:
        ModelError: the file's tensors are not the model's.
        StateError: the file is missing or damaged.
    """
    model = Model(graph.without_auxiliary)
    with open_weights(weights) as reader:
        if odd := sorted(set(graph.tensors).symmetric_difference(reader.names)):
            raise ModelError(
                f"{weights} does not hold the tensors of this model: {len(odd)} are missing or unknown, such as "
                f"{', '.join(odd[:3])}; it belongs to another model"
            )
        for name, expected in graph.tensors.items():
            if reader.info(name) != expected:
                raise ModelError(f"{weights} holds {name} as {reader.info(name)}, the model as {expected}")
        model.load(lambda name: torch.from_numpy(reader.read(name)))
    model.train(False)
    return model
