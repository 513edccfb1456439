"""The proof that a graph is the module it came from: the same outputs, gradients and buffers, to the last bit.

What a graph cannot hold shows here: a custom backward pass, hooks, random numbers of Python or numpy, counters. So
every model, also one of the zoo, is compared before a job starts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedepth.errors import ModelError
from fedepth.models.export import Exported, example_inputs, perturbed
from fedepth.models.run import Model
from fedepth.models.source import error_line, first_line

# Kernels may sum in another order in another memory layout, and on several threads even from run to run: gradients of
# one SqueezeNet differed by 1.3e-6. A wrong graph, or a random number, is off by far more.
TOLERANCE = 1e-4
_SEED = 7


@dataclass(frozen=True)
class _Trial:
    """One comparison: a batch of inputs of some scale, in one mode, with weights as they are or perturbed."""

    samples: int
    scale: float
    training: bool
    perturbed: bool

    def __str__(self) -> str:
        mode = "training" if self.training else "evaluation"
        return f"{mode} mode, batch {self.samples}, inputs of scale {self.scale:g}"


@dataclass(frozen=True)
class _Outcome:
    logits: torch.Tensor
    gradients: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]


def verify(module: nn.Module, exported: Exported, name: str) -> float:
    """Compares a graph with its module; returns the largest difference, relative to the size of what is compared.

    Raises:
        ModelError: they differ; names the mode and the first unit or tensor that does.
    """
    worst = 0.0
    graph = exported.graph
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    before = {each: tensor.detach().clone() for each, tensor in own.items()}
    was_training = module.training
    try:
        for trial in _trials(graph.smallest_micro_batch):
            moved = [each for each in exported.tensors if each in own] if trial.perturbed else []
            start = {**before, **perturbed(exported.tensors, moved)}
            inputs = example_inputs(graph.input_shape, graph.input_type, trial.samples, trial.scale)
            # The module itself, not a copy: hooks on parameters, and functions that know the module, are not copied.
            first, again = (_run_module(module, own, start, inputs, trial, seed=seed, name=name) for seed in (0, 1))
            if not _difference(first, again)[0] <= TOLERANCE:
                raise ModelError(
                    f"the model {name} does not agree with itself: with the same torch seed it gives other results "
                    "each time it runs (random numbers of Python or numpy, a counter, or a global); use torch's random "
                    "functions"
                )
            found = _run_graph(exported, inputs, trial, start)
            difference, what = _difference(again, found)
            if not difference <= TOLERANCE:
                raise ModelError(
                    f"the graph of the model {name} differs from the model by {difference:.3g} in {what} ({trial}); "
                    "it does something that torch.export does not record, such as a hook or a custom backward pass"
                )
            worst = max(worst, difference)
    finally:
        _restore(own, before)
        module.zero_grad()
        module.train(was_training)
    return worst


def _trials(smallest: int) -> Iterator[_Trial]:
    yield _Trial(max(smallest, 1), 1.0, True, False)
    yield _Trial(5, 8.0, True, True)
    yield _Trial(1, 1.0, False, True)
    yield _Trial(4, 8.0, False, False)


def _restore(own: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for each, tensor in own.items():
            tensor.copy_(values[each])


def _run_module(
    module: nn.Module,
    own: Mapping[str, torch.Tensor],
    start: Mapping[str, torch.Tensor],
    inputs: torch.Tensor,
    trial: _Trial,
    *,
    seed: int,
    name: str,
) -> _Outcome:
    module.train(trial.training)
    _restore(own, start)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(_SEED)
    module.zero_grad()
    try:
        logits = _first_tensor(module(inputs.clone()))
        _backward(logits)
    except Exception as error:  # whatever the model's own code does
        where = error_line(error)
        raise ModelError(
            f"the model {name} fails in {trial}{f' at {where}' if where else ''}: {first_line(error)}"
        ) from error
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return _Outcome(
        logits.detach(),
        {each: p.grad.clone() for each, p in parameters.items() if p.grad is not None and each in start},
        {each: buffer.clone() for each, buffer in module.named_buffers(remove_duplicate=False) if each in start},
    )


def _run_graph(
    exported: Exported, inputs: torch.Tensor, trial: _Trial, weights: Mapping[str, torch.Tensor]
) -> _Outcome:
    model = Model(exported.graph)
    fresh = {each: tensor.clone() for each, tensor in weights.items()}
    model.load(fresh.__getitem__, trainable=True)
    model.train(trial.training)
    torch.manual_seed(_SEED)
    logits = model(inputs.clone())
    _backward(logits)
    parameters = {each for unit in (*model.units, model.head) for each in unit.unit.parameters}
    return _Outcome(
        logits.detach(),
        {each: gradient for each in parameters if (gradient := fresh[each].grad) is not None},
        {each: tensor for each, tensor in fresh.items() if each not in parameters},
    )


def _first_tensor(output: object) -> torch.Tensor:
    leaves = torch.utils._pytree.tree_leaves(output)
    return next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def _backward(logits: torch.Tensor) -> None:
    if logits.requires_grad:
        weights = torch.linspace(-1.0, 1.0, logits.numel()).view_as(logits)
        torch.autograd.backward((logits * weights).sum())


def _difference(one: _Outcome, other: _Outcome) -> tuple[float, str]:
    """The largest relative difference, and where it is."""
    pairs = [("the logits", one.logits, other.logits)]
    for kind, mine, theirs in (
        ("the gradient of", one.gradients, other.gradients),
        ("the buffer", one.buffers, other.buffers),
    ):
        for each in mine.keys() | (theirs.keys() if kind != "the buffer" else ()):
            if each not in mine or each not in theirs:
                known = mine.get(each, theirs.get(each))
                assert known is not None
                if kind == "the buffer":
                    continue
                pairs.append((f"{kind} {each}", known, torch.zeros_like(known)))
            else:
                pairs.append((f"{kind} {each}", mine[each], theirs[each]))
    return max(((_relative(a, b), what) for what, a, b in pairs), key=lambda each: each[0])


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    if one.numel() == 0 or torch.equal(one, other):
        return 0.0
    one, other = one.double(), other.double()
    size = max(float(one.abs().max()), float(other.abs().max()), 1e-6)
    difference = float((one - other).abs().max()) / size
    return difference if difference == difference else float("inf")
