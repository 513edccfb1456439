"""The augmented views that a task trains on.

A stage that begins with the first unit sees a new view of every sample in every epoch, as in training of the whole
model: with one view for a whole task, ten local epochs learn its samples by heart. What is computed once for several
epochs needs one view for all of them, the first: activations behind frozen units, and what the global model says of a
sample, for tasks that distil from it.
"""

from __future__ import annotations

import torch

from fedepth.data.transforms import augment, views_key
from fedepth.task import Distil
from fedepth.training.context import TrainingContext


def views(context: TrainingContext, x: torch.Tensor, indices: torch.Tensor, epoch: int = 0) -> torch.Tensor:
    """The views that an epoch, from 0 on, has of samples as they are stored.

    Args:
        x: (n, *sample_shape), in main memory.
        indices: (n,), of these samples.
    """
    training = context.task.training
    if training.augmentation == "none":
        return x
    drawn = 0 if training.distil is Distil.GLOBAL else epoch
    key = views_key(training.seed, context.task.round, context.device_id, drawn)
    return torch.from_numpy(augment(x.numpy(), training.augmentation, key, indices.numpy()))
