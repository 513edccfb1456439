"""One plain training loop over a data set, in a process of its own: what a simulation's workers are measured by.

    python -m benchmarks.plain_training < REQUEST

The whole model as torch modules, torch.optim.SGD, pixels in memory, the job's batch and memory format. A `Plain` as
JSON on standard input; {"images", "seconds", "cpu_seconds"} on standard output, without the start and the first step.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch.nn import functional

from fedepth.data.read import DIGITS, open_images
from fedepth.models import zoo
from fedepth.models.traced import read_traced
from fedepth.task import ModelSpec, TrainingSpec
from fedepth.training.block import epoch_batches
from fedepth.training.warmup import start


@dataclass(frozen=True)
class Plain:
    """What to train: `data` is a folder, or "digits"."""

    model: ModelSpec
    training: TrainingSpec
    data: str
    graph: str
    epochs: int


def train(request: Plain) -> dict[str, float]:
    """All images in every epoch."""
    spec = request.training
    images = open_images(request.data if request.data == DIGITS else Path(request.data), request.model, "train")
    model = zoo.build(request.model)
    layout = torch.contiguous_format
    if read_traced(Path(request.graph)).graph.channels_last:
        layout = torch.channels_last
        model = model.to(memory_format=layout)
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), spec.learning_rate, momentum=spec.momentum, weight_decay=spec.weight_decay
    )
    pixels = torch.from_numpy(images.read(np.arange(len(images))))
    labels = torch.from_numpy(np.asarray(images.labels, np.int64))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (request.model.mean, request.model.std))
    order = torch.Generator().manual_seed(spec.seed)

    def step(indices: torch.Tensor) -> None:
        x = pixels[indices].float().div_(255.0).sub_(mean).div_(std).contiguous(memory_format=layout)
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(x), labels[indices]))
        optimizer.step()

    step(torch.arange(spec.batch))
    began, began_cpu = time.monotonic(), time.process_time()
    for _ in range(request.epochs):
        for indices in epoch_batches(len(images), -(-len(images) // spec.batch), order):
            step(indices)
    return {
        "images": request.epochs * len(images),
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - began_cpu,
    }


def main() -> None:
    start(torch.device("cpu"))
    print(msgspec.json.encode(train(msgspec.json.decode(sys.stdin.buffer.read(), type=Plain))).decode(), flush=True)


if __name__ == "__main__":
    main()
