"""Ways of training that fedepth is compared with, each in a process of its own.

    full       a plain loop: the whole model as torch modules, torch.optim.SGD, pixels in memory
    recompute  depth-wise, with the frozen prefix computed anew for every batch of every epoch

Run by benchmarks.overhead as `python -m benchmarks.reference_training WAY`, with a TrainRequest as JSON on standard
input; writes {"seconds", "peak_bytes", "allocator", "steps"} to standard output. Start and a warm-up on two samples, as
in the device's trainer, do not count; the first step of full size does, here as there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch.nn import functional

from edge_client.trainer.protocol import TrainRequest
from fedepth.data.read import Images, open_images
from fedepth.memory import allocator
from fedepth.memory.meter import Meter
from fedepth.models import zoo
from fedepth.models.run import Model, RunnableUnit
from fedepth.models.traced import read_traced
from fedepth.training.block import BlockTraining, epoch_batches
from fedepth.training.context import TrainingContext, load, to_device
from fedepth.training.pressure import MicroBatch
from fedepth.training.warmup import warm_up
from fedepth.weights import open_weights

WARM_SAMPLES = 2


class Recomputed:
    """The inputs of a stage without a cache: reads images and runs the frozen units on them every time."""

    def __init__(self, context: TrainingContext, units: list[RunnableUnit]) -> None:
        self._context, self._units = context, units

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        x = torch.from_numpy(self._context.images.read(indices.numpy()))
        if not self._units:
            return x
        with torch.no_grad():
            x = to_device(self._context, x, from_data=True)
            for unit in self._units:
                x = unit(x)
        return x


def train_recomputing(request: TrainRequest) -> dict[str, object]:
    """The plan's stages in order, without caches."""
    task = request.task
    traced = read_traced(Path(request.graph)).in_training(request.task.training)
    model = Model(traced.graph)
    output, cache = Path(request.output), Path(request.cache)
    for folder in (output, cache):
        folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu")
    with open_weights(Path(request.weights)) as weights:
        images = open_images(Path(request.data), task.model, "train")
        context = TrainingContext(
            task=task,
            plan=request.plan,
            model=model,
            costs=traced.costs,
            weights=weights,
            images=images,
            output=output,
            cache=cache,
            device_id="reference",
            device=device,
            channels_last=traced.graph.channels_last,
        )
        warm_up(context, request.plan.trained_units)
        meter = Meter()
        meter.reset()
        started = time.monotonic()
        steps = 0
        labels = torch.from_numpy(images.labels.astype(np.int64))
        for index, stage in enumerate(request.plan.stages):
            prefix = list(model.units[: stage.first])
            for unit in prefix:
                load(context, unit, trainable=False)
                unit.training = False
            source = Recomputed(context, prefix)
            micro_batch = MicroBatch(traced.costs, task.training, stage, len(images))
            block = BlockTraining(context, stage, source, labels, index, micro_batch, trains_head=True)
            for _ in range(task.training.local_epochs):
                for indices in block.epoch_batches():
                    block.step(indices)
            steps += block.steps
            block.close()
        return _figures(started, meter, steps)


def train_full(request: TrainRequest) -> dict[str, object]:
    """All parameters at once, the job's batch in one piece."""
    task, spec = request.task, request.task.training
    images = open_images(Path(request.data), task.model, "train")
    model = zoo.build(task.model)
    with open_weights(Path(request.weights)) as weights:
        model.load_state_dict({name: torch.from_numpy(weights.read(name)) for name in weights.names}, strict=False)
    if read_traced(Path(request.graph)).graph.channels_last:
        model = model.to(memory_format=torch.channels_last)
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), spec.learning_rate, momentum=spec.momentum, weight_decay=spec.weight_decay
    )
    labels = torch.from_numpy(images.labels.astype(np.int64))
    mean = torch.tensor(task.model.mean).view(-1, 1, 1)
    std = torch.tensor(task.model.std).view(-1, 1, 1)
    order = torch.Generator().manual_seed(spec.seed)

    def step(indices: torch.Tensor) -> None:
        x = _pixels(images, indices).float().div_(255.0).sub_(mean).div_(std)
        x = x.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(x), labels[indices]))
        optimizer.step()

    step(torch.arange(WARM_SAMPLES))
    meter = Meter()
    meter.reset()
    started = time.monotonic()
    steps = 0
    for _ in range(spec.local_epochs):
        for indices in epoch_batches(len(images), -(-len(images) // spec.batch), order):
            step(indices)
            steps += 1
    return _figures(started, meter, steps)


def _pixels(images: Images, indices: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(images.read(indices.numpy()))


def _figures(started: float, meter: Meter, steps: int) -> dict[str, object]:
    return {
        "seconds": time.monotonic() - started,
        "peak_bytes": meter.peak_bytes,
        "allocator": allocator.name(),
        "steps": steps,
    }


WAYS = {"full": train_full, "recompute": train_recomputing}


def main() -> None:
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=TrainRequest)
    print(msgspec.json.encode(WAYS[sys.argv[1]](request)).decode(), flush=True)


if __name__ == "__main__":
    main()
