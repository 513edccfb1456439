"""One task on one device, opened: its model without weights, its weights file, its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fedepth.costs import ModelCosts
from fedepth.data.read import Images
from fedepth.encoding import DecodedPart
from fedepth.models.run import Model, RunnableUnit
from fedepth.models.table_input import table_features
from fedepth.plan import Plan
from fedepth.task import InputType, ModelSpec, Task
from fedepth.training.objective import Exit, shared_head
from fedepth.weights import Reader


@dataclass(frozen=True)
class TrainingContext:
    """What the training functions work on.

    Attributes:
        model: holds the tensors of what is trained just now, and no others.
        costs: of its units on this device.
        output: where finished blocks go.
        cache: where cached inputs go that do not lie in RAM.
        enforce: set RLIMIT_DATA, and stop a stage whose first step goes over the budget.
        release_freed: a stage gives back what it frees at once, as in its rehearsal; else it keeps a little of it, for
            speed.
        cache_room: samples that a cache has room for beyond the images; a rehearsal leaves out most of them.
        first_samples: only so many of the images are trained on, as in a rehearsal; 0 for all.
        trained: by their names, where tensors are that training has changed since `weights`.
        peers: files of other models to train with (fedepth.training.peers), by slot; None, as what is not there, for
            one that begins anew.
        peers_output: where they go; None where nobody keeps them.
        left_out: what the encoding has left out of updates before, by tensor (fedepth.residuals).
        left_out_output: where what it leaves out of this one goes; None where nobody keeps it.
        exit: from the output of a block to the logits that it is trained on.
        must_stay_finite: stop where the loss or the weights are not finite any more. A rehearsal and a warm-up go on:
            they measure, and train on too little to judge by.
    """

    task: Task
    plan: Plan
    model: Model
    costs: ModelCosts
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
    trained: Mapping[str, Reader | DecodedPart] = field(default_factory=dict)
    exit: Exit = shared_head
    must_stay_finite: bool = True
    peers: tuple[Path | None, ...] = ()
    peers_output: Path | None = None
    left_out: Mapping[str, Reader] = field(default_factory=dict)
    left_out_output: Path | None = None

    @property
    def cached_samples(self) -> int:
        """How many samples a cache of a block's inputs has room for."""
        return len(self.images) + self.cache_room

    def with_part(self, part: Path) -> TrainingContext:
        """The same with a block trained, whose tensors lie in `part`: later ones learn from it as it goes up."""
        reader = DecodedPart(self.weights, part)
        return replace(self, trained={**self.trained, **dict.fromkeys(reader.names, reader)})


def load(context: TrainingContext, unit: RunnableUnit, *, trainable: bool) -> None:
    """Reads a unit's tensors, as they are by now, from their file to the device, unless they are there already."""
    for name in unit.unit.tensor_names:
        if name in unit.tensors:
            continue
        tensor = read(context, context.trained.get(name, context.weights), name)
        unit.tensors[name] = tensor.requires_grad_() if trainable and name in unit.unit.parameters else tensor


def read(context: TrainingContext, reader: Reader | DecodedPart, name: str) -> torch.Tensor:
    """A tensor of a weights file, on the device and in the model's memory format."""
    tensor = torch.from_numpy(reader.read(name)).to(context.device)
    return tensor.to(memory_format=torch.channels_last) if context.channels_last and tensor.dim() == 4 else tensor


def to_device(context: TrainingContext, x: torch.Tensor, *, from_data: bool) -> torch.Tensor:
    """A cached batch as the unit wants it: the model's input if it holds data, else as it was kept; in the memory
    format of the model."""
    x = x.to(context.device)
    if from_data:
        x = model_input(context.task.model, x)
    if context.channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x


def model_input(spec: ModelSpec, data: torch.Tensor) -> torch.Tensor:
    """Samples (B, *sample_shape) as the first unit takes them: (x / 255 - mean) / std by channel, token ids, or the
    features of a table."""
    if spec.table is not None:
        return table_features(data, spec.table)
    if spec.input_type is InputType.TOKENS:
        return data.long()
    mean, std = (
        torch.tensor(values, device=data.device).view(-1, *(1,) * (data.dim() - 2)) for values in (spec.mean, spec.std)
    )
    return data.float().div_(255.0).sub_(mean).div_(std)
