"""One step of the finest plan, before any device sees a job: what fails, or gives other gradients, in the layout that a
trainer uses, is found where the model came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch

from fedepth.errors import ModelError
from fedepth.models.graph import Graph, Unit
from fedepth.models.run import Model, RunnableUnit
from fedepth.models.source import first_line
from fedepth.models.verify import one_thread
from fedepth.training import checkpoint
from fedepth.training.objective import any_exit, objective

# Of a gradient's largest value. The same kernels run in the same order, on the same strides or nearly.
TOLERANCE = 1e-3
# Of the largest gradient of a unit: some units in the last place of float32. A gradient no larger than that is a zero
# of which rounding has left something, such as that of a scale whose output is normalised again: all of it may differ.
ROUNDING = 1e-6
_SEED = 11
T = TypeVar("T")


@one_thread()
def try_one_step(graph: Graph, tensors: Mapping[str, torch.Tensor], inputs: torch.Tensor) -> None:
    """Trains every unit alone for one step, and all of them at once, with and without checkpointing.

    Args:
        tensors: all of the graph's; they stay as they are.
        inputs: (B, *input_shape), B at least the smallest micro-batch.

    Raises:
        ModelError: a unit fails, or checkpointing changes a gradient or a buffer; names the unit.
    """
    if graph.channels_last and inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    targets = torch.zeros(len(inputs), dtype=torch.int64)
    plain = _fresh(graph, tensors)
    loss_of = partial(_loss, targets)
    torch.manual_seed(_SEED)
    x = inputs
    for index, unit in enumerate(plain.units):
        with torch.no_grad():
            given = x.detach()
        x = _guarded(f"unit {unit.unit.name}", partial(unit, x))
        _alone(graph, tensors, unit.unit, plain.exit(index).unit, given, targets)
    _guarded("the backward pass of all units", lambda: torch.autograd.backward(loss_of(plain.head, x)))
    again = _fresh(graph, tensors)
    torch.manual_seed(_SEED)
    finish = partial(loss_of, again.head)
    _guarded("a checkpointed step of all units", lambda: checkpoint.forward_backward(again.units, inputs, finish))
    _compare(plain, again)


def _alone(
    graph: Graph, tensors: Mapping[str, torch.Tensor], unit: Unit, exit_: Unit, x: torch.Tensor, targets: torch.Tensor
) -> None:
    """The unit as a block of its own."""
    state = torch.get_rng_state()
    fresh, ending = RunnableUnit(unit), RunnableUnit(exit_)
    for each in (fresh, ending):
        _load(graph, each, tensors)
    finish = partial(_loss, targets, ending)
    what = f"unit {unit.name}"
    loss = _guarded(what, lambda: finish(fresh(x.clone())))
    if loss.requires_grad:
        _guarded(what, lambda: torch.autograd.backward(loss))
    torch.set_rng_state(state)


def _loss(targets: torch.Tensor, exit_: RunnableUnit, output: torch.Tensor) -> torch.Tensor:
    logits = any_exit(output, head=exit_, head_shape=exit_.unit.input_shape)
    return objective(logits, targets=targets, batch=len(targets))


def _guarded(what: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except ModelError:
        raise
    except Exception as error:  # whatever an operator does with this model's sizes
        text = first_line(error)
        raise ModelError(
            f"{what} of the model fails in one training step as devices run it: {text}; change that part of the model"
        ) from error


def _fresh(graph: Graph, tensors: Mapping[str, torch.Tensor]) -> Model:
    model = Model(graph)
    for unit in (*model.units, model.head):
        _load(graph, unit, tensors)
    return model


def _load(graph: Graph, unit: RunnableUnit, tensors: Mapping[str, torch.Tensor]) -> None:
    for name in unit.unit.tensor_names:
        tensor = tensors[name].detach().clone()
        if graph.channels_last and tensor.dim() == 4:
            tensor = tensor.to(memory_format=torch.channels_last)
        unit.tensors[name] = tensor.requires_grad_() if name in unit.unit.parameters else tensor


def _compare(plain: Model, checkpointed: Model) -> None:
    for one, other in zip((*plain.units, plain.head), (*checkpointed.units, checkpointed.head), strict=True):
        gradients = [one.tensors[name].grad for name in one.unit.parameters]
        largest = max((float(each.abs().max()) for each in gradients if each is not None and each.numel()), default=0.0)
        for name in one.unit.tensor_names:  # also those that nothing should have written
            mine, theirs, rounding = one.tensors[name], other.tensors[name], 0.0
            if name in one.unit.parameters:
                mine, theirs = (each if each.grad is None else each.grad for each in (mine, theirs))
                rounding = ROUNDING * largest
            size = max(float(mine.detach().double().abs().max()), 1e-6) if mine.numel() else 1.0
            difference = float((mine.detach().double() - theirs.detach().double()).abs().max()) if mine.numel() else 0.0
            if not difference <= max(TOLERANCE * size, rounding):
                raise ModelError(
                    f"unit {one.unit.name} of the model gives other results when it is run again for its backward "
                    f"pass: {name} differs by {difference / size:.2g} of its size; devices train so where memory is "
                    "short"
                )
