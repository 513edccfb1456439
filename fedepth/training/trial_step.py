"""One step of the finest plan, before any device sees a job: what fails, or gives other gradients, in the layout that a
trainer uses, is found where the model came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
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
# Some gradients are zero but for rounding, such as that of a scale whose output is normalised again: of what is left,
# any part may differ. Nudging all parameters by a few units in their last place shows how much that is.
_NUDGE = 8  # units in the last place of 1
_ROUNDING = 30.0  # times what the nudge makes of a gradient
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
    torch.manual_seed(_SEED)
    _step(plain, inputs, targets, lambda unit, exit_, given: _alone(graph, tensors, unit, exit_, given, targets))
    again = _fresh(graph, tensors)
    torch.manual_seed(_SEED)
    finish = partial(_loss, targets, again.head)
    _guarded("a checkpointed step of all units", lambda: checkpoint.forward_backward(again.units, inputs, finish))
    if found := _differences(plain, again):
        nudged = _fresh(graph, _nudged(graph, tensors))
        torch.manual_seed(_SEED)
        _step(nudged, inputs, targets)
        _refuse(found, _apart(plain, nudged))


def _step(
    model: Model,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    also: Callable[[Unit, Unit, torch.Tensor], None] = lambda unit, exit_, given: None,
) -> None:
    """All units at once. `also` is called with each, its exit, and what it is given, after it has run."""
    x = inputs
    for index, unit in enumerate(model.units):
        with torch.no_grad():
            given = x.detach()
        x = _guarded(f"unit {unit.unit.name}", partial(unit, x))
        also(unit.unit, model.exit(index).unit, given)
    _guarded("the backward pass of all units", lambda: torch.autograd.backward(_loss(targets, model.head, x)))


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


def _nudged(graph: Graph, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    nudged = dict(tensors)
    for unit in (*graph.units, graph.head):
        for name in unit.parameters:
            tensor = tensors[name].detach()
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            nudged[name] = tensor * (1 + _NUDGE * torch.finfo(tensor.dtype).eps * noise)
    return nudged


@dataclass(frozen=True)
class _Apart:
    """How far two steps are apart in a tensor of a unit, or in its gradient, and the largest value of that."""

    unit: str
    name: str
    difference: float
    size: float


def _apart(one: Model, other: Model) -> Iterator[_Apart]:
    """In all tensors of all units, also those that nothing should have written."""
    for here, there in zip((*one.units, one.head), (*other.units, other.head), strict=True):
        for name in here.unit.tensor_names:
            mine, theirs = here.tensors[name], there.tensors[name]
            if name in here.unit.parameters:
                mine, theirs = (each if each.grad is None else each.grad for each in (mine, theirs))
            if mine.numel():
                mine, theirs = mine.detach().double(), theirs.detach().double()
                size = max(float(mine.abs().max()), 1e-6)
                yield _Apart(here.unit.name, name, float((mine - theirs).abs().max()), size)


def _differences(plain: Model, checkpointed: Model) -> list[_Apart]:
    return [each for each in _apart(plain, checkpointed) if not each.difference <= TOLERANCE * each.size]


def _refuse(found: Iterable[_Apart], nudged: Iterable[_Apart]) -> None:
    """Refuses a difference that rounding cannot have made.

    Raises:
        ModelError: names the first.
    """
    rounding = {(each.unit, each.name): _ROUNDING * each.difference for each in nudged}
    for each in found:
        if not each.difference <= rounding[each.unit, each.name]:
            raise ModelError(
                f"unit {each.unit} of the model gives other results when it is run again for its backward pass: "
                f"{each.name} differs by {each.difference / each.size:.2g} of its size; devices train so where memory "
                "is short"
            )
