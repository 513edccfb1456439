"""Auxiliary classifiers: for every unit but the last a small one of its own, so that a block that ends behind it needs
no skip connection to the head that all blocks share (m-FeDepth, arXiv 2303.04887).

They are exported like the model itself, so that devices need no code of them, and have weights of their own in the
global weights: `auxiliary.<unit>.norm.weight` and so on. They are no part of the model: neither evaluation nor an
export knows of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from msgspec import structs
from torch import nn

from fedepth.errors import ModelError
from fedepth.models.channels import channels_of
from fedepth.models.cut import uncut
from fedepth.models.exits import tells_apart
from fedepth.models.export import Exported, flat_programs, named_tensors, perturbed
from fedepth.models.graph import VERSION_WITH_AUXILIARY, Scalar, Tensor, Unit, check, with_scalars
from fedepth.models.run import Model, RunnableUnit
from fedepth.models.skip import channel_dimension

PREFIX = "auxiliary."


class AuxiliaryClassifier(nn.Module):
    """Norm, mean over all positions, linear layer.

    The norm is over one sample: of a feature map over all of it, with a scale and a shift for each channel (Wu and He,
    arXiv 1803.08494, one group); of tokens, of maps with channels last and of vectors over their features (arXiv
    1607.06450). So it has no running statistics, and micro-batches of any size give the gradients of their batch.
    """

    def __init__(self, shape: tuple[int, ...], channels: int, classes: int) -> None:
        """For outputs of this shape, without the batch, whose dimension `channels` holds the channels."""
        super().__init__()
        width = shape[channels]
        last = channels == len(shape) - 1
        self.norm: nn.Module = nn.LayerNorm(width) if last else nn.GroupNorm(1, width)
        self.linear = nn.Linear(width, classes)
        self.positions = [1 + at for at in range(len(shape)) if at != channels]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, *shape) to (B, classes) logits."""
        x = self.norm(x)
        logits: torch.Tensor = self.linear(x.mean(self.positions) if self.positions else x)
        return logits


def with_auxiliary(exported: Exported, classes: int, *, seed: int) -> Exported:
    """The same model with an auxiliary classifier behind every unit but the last, wherever its logits then depend on
    the input. These, and no skip connections, are its exits.

    Args:
        classes: the job's number of classes.
        seed: of their weights, which torch initialises as it does any norm and linear layer.

    Raises:
        ModelError: the model has tensors of such names itself.
    """
    graph = exported.graph
    taken = sorted(name for name in graph.tensors if name.startswith(PREFIX))
    if taken:
        raise ModelError(
            f"the model has a tensor {taken[0]}, and names that begin with {PREFIX} are those of auxiliary heads; "
            'rename that module, or set [training] heads to "shared"'
        )
    torch.manual_seed(seed)
    by_form: dict[tuple[tuple[int, ...], int], Unit] = {}
    units: list[Unit] = []
    tensors: dict[str, torch.Tensor] = {}
    told = channels_of(graph.units)
    for index, (known, shape) in enumerate(zip(told[:-1], graph.output_shapes[:-1], strict=True)):
        channels = _channels(shape, graph.head_shape, known)
        module = AuxiliaryClassifier(shape, channels, classes)
        form = shape, channels
        if form not in by_form:
            by_form[form] = _exported(module, shape, classes)
        units.append(_renamed(by_form[form], f"{PREFIX}{index}"))
        tensors.update((f"{PREFIX}{index}.{name}", tensor.detach()) for name, tensor in module.named_parameters())
    return _where_they_tell(exported, units, tensors)


def _channels(shape: tuple[int, ...], head_shape: tuple[int, ...], known: int | None) -> int:
    """Which dimension of a unit's output holds its channels: as for a skip connection, where there is one."""
    found = channel_dimension(shape, head_shape, known)
    if found is None:
        found = channel_dimension(shape, (1,), known) or 0
    # The mean of a single channel is 0 behind its norm: what a map of 1×1 with channels last looks like.
    return found if shape[found] > 1 else shape.index(max(shape))


def _exported(module: nn.Module, shape: tuple[int, ...], classes: int) -> Unit:
    names, tensors = named_tensors(module, "auxiliary head")
    programs = flat_programs(module, "auxiliary head", (shape, "F32"), classes, names, tensors, set())
    return uncut(*programs, frozenset(tensors))


def _renamed(unit: Unit, name: str) -> Unit:
    """The unit with tensors of other names."""

    def renamed(each: Scalar) -> Scalar:
        return Tensor(f"{name}.{each.name}") if isinstance(each, Tensor) else each

    training, evaluation = (
        structs.replace(
            program, operations=tuple(with_scalars(each, renamed, each.results) for each in program.operations)
        )
        for program in (unit.training, unit.evaluation)
    )
    parameters = tuple(f"{name}.{each}" for each in unit.parameters)
    return structs.replace(unit, name=name, parameters=parameters, training=training, evaluation=evaluation)


def _where_they_tell(exported: Exported, units: list[Unit], tensors: dict[str, torch.Tensor]) -> Exported:
    """The model with those of the classifiers whose logits depend on the input."""
    graph = exported.graph
    known = {**exported.tensors, **tensors}
    moved = perturbed(known, [name for unit in (*graph.units, graph.head, *units) for name in unit.parameters])
    model = Model(graph)
    model.load(lambda name: moved[name] if name in moved else known[name].clone())
    model.train(False)
    kept: list[Unit | None] = []
    with torch.no_grad():
        x = exported.examples(4)
        for unit, auxiliary in zip(model.units, units, strict=False):
            x = unit(x)
            runnable = RunnableUnit(auxiliary)
            runnable.tensors = {name: moved[name] for name in auxiliary.tensor_names}
            runnable.training = False
            kept.append(auxiliary if tells_apart(runnable(x)) else None)
    used = [name for unit in kept if unit is not None for name in unit.tensor_names]
    changed = structs.replace(
        graph,
        version=VERSION_WITH_AUXILIARY,
        exits=(*(unit is not None for unit in kept), True),
        tensors=dict(sorted({**graph.tensors, **{name: ("F32", tuple(tensors[name].shape)) for name in used}}.items())),
        auxiliary=(*kept, None),
    )
    check(changed)
    return replace(exported, graph=changed, tensors={**exported.tensors, **{name: tensors[name] for name in used}})
