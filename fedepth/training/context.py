"""One task on one device, opened: its model on the meta device, its weights file, its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fedepth.data.read import Images
from fedepth.models.split import SplitModel, Unit, assign
from fedepth.plan import Plan
from fedepth.task import Task
from fedepth.weights import Reader, open_weights


@dataclass(frozen=True)
class TrainingContext:
    """What the training functions work on.

    Attributes:
        split: the model, on the meta device.
        output: where finished blocks go.
        cache: where cached inputs go that do not lie in RAM.
        enforce: set RLIMIT_DATA, and stop a stage whose first step goes over the budget.
        release_freed: a stage gives back what it frees at once, as in its rehearsal; else it keeps a little of it, for
            speed.
        cache_room: samples that a cache has room for beyond the images; a rehearsal leaves out most of them.
        first_samples: only so many of the images are trained on, as in a rehearsal; 0 for all.
        trained: by their names, where tensors are that training has changed since `weights`.
    """

    task: Task
    plan: Plan
    split: SplitModel
    weights: Reader
    images: Images
    output: Path
    cache: Path
    device_id: str
    device: torch.device
    channels_last: bool
    enforce: bool = True
    release_freed: bool = False
    cache_room: int = 0
    first_samples: int = 0
    trained: Mapping[str, Reader] = field(default_factory=dict)

    @property
    def cached_samples(self) -> int:
        """How many samples a cache of a block's inputs has room for."""
        return len(self.images) + self.cache_room

    def with_part(self, part: Path) -> TrainingContext:
        """The same with a block trained, whose tensors lie in `part`."""
        reader = open_weights(part)
        return replace(self, trained={**self.trained, **dict.fromkeys(reader.names, reader)})


def load(context: TrainingContext, unit: Unit, *, trainable: bool) -> None:
    """Reads a unit's tensors, as they are by now, from their file to the device, unless they are there already."""
    for name, present in (*unit.parameters(), *unit.buffers()):
        if not present.is_meta:
            continue
        tensor = read(context, context.trained.get(name, context.weights), name)
        assign(context.split, name, tensor, requires_grad=trainable and name in unit.parameter_names)


def read(context: TrainingContext, reader: Reader, name: str) -> torch.Tensor:
    """A tensor of a weights file, on the device and in the model's memory format."""
    tensor = torch.from_numpy(reader.read(name)).to(context.device)
    return tensor.to(memory_format=torch.channels_last) if context.channels_last and tensor.dim() == 4 else tensor


def to_device(context: TrainingContext, x: torch.Tensor, *, from_pixels: bool) -> torch.Tensor:
    """A cached batch as the unit wants it: float32, normalised if it holds pixels, in the model's memory format."""
    x = x.to(context.device)
    if from_pixels:
        spec = context.task.model
        mean = torch.tensor(spec.mean, device=context.device).view(-1, 1, 1)
        std = torch.tensor(spec.std, device=context.device).view(-1, 1, 1)
        x = x.float().div_(255.0).sub_(mean).div_(std)
    if context.channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x
