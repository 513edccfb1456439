"""The proof that a graph is the module it came from: the same outputs, gradients and tensors, to the last bit.

What a graph cannot hold shows here: a custom backward pass, hooks, random numbers of Python or numpy, counters. So
every model, also one of the zoo, is compared before a job starts, and once more in the memory format of a trainer.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedepth.errors import ModelError
from fedepth.models.export import Exported, is_spread, perturbed
from fedepth.models.hidden_state import hidden_values
from fedepth.models.run import Model
from fedepth.models.source import error_line, first_line, is_users

# On one thread kernels sum in the same order every time. A wrong graph, or a random number, is off by far more.
TOLERANCE = 1e-4
# In another memory format other kernels run: logits are compared, for gradients of a hundred layers differ by percents.
LAYOUT_TOLERANCE = 1e-3
_SEED = 7


@dataclass(frozen=True)
class _Trial:
    """One comparison: a batch of inputs of some scale, in one mode, with weights as they are or perturbed.

    Attributes:
        gradient: scale of the gradient of the logits; what is clipped shows where it is large.
        channels_last: the graph runs in this memory format.
    """

    samples: int
    scale: float
    training: bool
    perturbed: bool
    gradient: float = 1.0
    channels_last: bool = False

    def __str__(self) -> str:
        mode = "training" if self.training else "evaluation"
        layout = ", channels_last" if self.channels_last else ""
        return f"{mode} mode, batch {self.samples}, inputs of scale {self.scale:g}{layout}"


@dataclass(frozen=True)
class _Outcome:
    """Of one step. `tensors`: parameters, buffers and constants as they are behind it; the unchanged are no copies."""

    logits: torch.Tensor
    gradients: Mapping[str, torch.Tensor]
    tensors: Mapping[str, torch.Tensor]


@contextmanager
def one_thread() -> Iterator[None]:
    """Kernels of several threads may sum in another order from run to run. A BatchNorm over a few values makes a lot of
    that: gradients of MobileNetV3 at batch 1 differed by 0.1 %, once in 25 times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def verify(module: nn.Module, exported: Exported, name: str) -> float:
    """Compares a graph with its module; returns the largest difference, relative to the size of what is compared.

    The trial in the trainer's memory format does not count into that: other kernels run there.

    Raises:
        ModelError: they differ; names the mode and the first tensor that does.
    """
    worst = 0.0
    graph = exported.graph
    original = _Original(module, exported, name)
    try:
        original.draw_only_for_logits(exported.left_out)
        trained: Mapping[str, torch.Tensor] = {}  # as a step has left them: evaluation has to see what training wrote
        for trial in _trials(graph.smallest_micro_batch, graph.channels_last):
            moved = original.writable if trial.perturbed else ()
            start = {**original.start, **(perturbed(original.start, moved) if trial.training or not moved else trained)}
            inputs = exported.examples(trial.samples, trial.scale)
            again = original.step(start, inputs, trial)
            if trial.channels_last and original.draws(start, inputs, trial, again):
                continue  # random numbers come in the order in which values lie in memory
            found = _run_graph(exported, inputs, trial, start)
            difference, what = _difference(again, found, gradients=not trial.channels_last)
            if not difference <= (LAYOUT_TOLERANCE if trial.channels_last else TOLERANCE):
                raise ModelError(
                    f"the graph of the model {name} differs from the model by {difference:.3g} in {what} ({trial}); "
                    "it does something that torch.export does not record, such as a hook, a custom backward pass, "
                    "torch.utils.checkpoint with use_reentrant=True, or writing to what may be a view or a copy"
                )
            if not trial.channels_last:
                worst = max(worst, difference)
            if trial.training and trial.perturbed:
                trained = found.tensors
    finally:
        original.restore()
    return worst


def _trials(smallest: int, channels_last: bool) -> Iterator[_Trial]:
    yield _Trial(max(smallest, 1), 1.0, True, False)
    yield _Trial(5, 8.0, True, True, gradient=1000.0)
    yield _Trial(1, 1.0, False, True)
    yield _Trial(4, 8.0, False, False)
    if channels_last:
        yield _Trial(3, 1.0, False, False, channels_last=True)


class _Original:
    """The module itself, not a copy: hooks on parameters, and functions that know the module, are not copied.

    Attributes:
        start: its tensors as they were, by name.
        writable: names of its parameters and buffers, but for those that hold one value in many places.
    """

    def __init__(self, module: nn.Module, exported: Exported, name: str) -> None:
        self._module = module
        self._name = name
        self._names = exported.tensors.keys()
        registered = dict(self._registered())
        self.writable = frozenset(each for each in registered.keys() & self._names if not is_spread(registered[each]))
        # Those that are plain attributes, as it holds them, and what its code makes of numbers.
        self._constants = {each: tensor for each, tensor in exported.tensors.items() if each not in registered}
        self.start = {each: tensor.detach().clone() for each, tensor in self._tensors().items()}
        self._was_training = module.training
        self._rates: dict[nn.Module, float] = {}

    def draw_only_for_logits(self, left_out: Mapping[str, str]) -> None:
        """Switches dropout off where it serves outputs that are left out: the graph does not draw for them.

        Raises:
            ModelError: something else draws random numbers for them.
        """
        for path, line in left_out.items():
            found = self._module.get_submodule(path)
            if not isinstance(found, nn.modules.dropout._DropoutNd):
                raise ModelError(
                    f"the model {self._name} draws random numbers at {line} for an output that is left out, so that "
                    "its graph cannot be compared with it; use an nn.Dropout module there, or return the logits only"
                )
            self._rates[found] = found.p
            found.p = 0.0

    def restore(self) -> None:
        """Makes it as it was."""
        for dropout, rate in self._rates.items():
            dropout.p = rate  # type: ignore[assignment]
        self._set(self.start)
        self._module.zero_grad()
        self._module.train(self._was_training)

    def step(self, start: Mapping[str, torch.Tensor], inputs: torch.Tensor, trial: _Trial) -> _Outcome:
        """One forward and backward pass, when it has agreed with itself.

        Raises:
            ModelError: it fails, or what it gives depends on more than its tensors and torch's random numbers.
        """
        name = self._name
        first = self._run(start, inputs, trial, seed=0)
        before = hidden_values(self._module)
        again = self._run(start, inputs, trial, seed=1)
        now = hidden_values(self._module)
        if changed := sorted(each for each in before.keys() | now.keys() if before.get(each) != now.get(each)):
            raise ModelError(
                f"the model {name} changes {changed[0]} whenever it runs, which devices cannot follow; use a buffer, "
                "or torch's random functions"
            )
        difference, what = _difference(first, again)
        if not difference <= TOLERANCE:
            raise ModelError(
                f"the model {name} is not deterministic: with the same torch seed, {what} differs from run to run "
                f"({trial}; look for a counter, a global, or random numbers that torch does not draw); use torch's "
                "random functions and buffers"
            )
        if not trial.training:
            self._without_gradients(start, inputs, trial, again)
        return again

    def draws(self, start: Mapping[str, torch.Tensor], inputs: torch.Tensor, trial: _Trial, known: _Outcome) -> bool:
        """Whether the seed of torch's random numbers makes a difference."""
        return _difference(self._run(start, inputs, trial, seed=1, torch_seed=_SEED + 1), known)[0] > TOLERANCE

    def _run(
        self,
        start: Mapping[str, torch.Tensor],
        inputs: torch.Tensor,
        trial: _Trial,
        *,
        seed: int,
        torch_seed: int = _SEED,
    ) -> _Outcome:
        module, name = self._module, self._name
        self._set(start)
        module.zero_grad()
        random.seed(seed)
        np.random.seed(seed)
        before = _other_random_states()
        torch.manual_seed(torch_seed)
        logits = self._logits(inputs, trial)
        if _other_random_states() != before:
            raise ModelError(
                f"the model {name} draws random numbers from Python or numpy in its forward pass, so that it is not "
                "deterministic; use torch's random functions"
            )
        self._guarded(lambda: _backward(logits, trial.gradient), trial)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        gradients = {each: p.grad for each, p in parameters.items() if p.grad is not None and each in start}
        module.zero_grad()  # lets go of them: copies of a large model's would not fit beside its weights
        tensors = {each: tensor.detach() for each, tensor in self._tensors().items() if each in self._names}
        return _Outcome(
            logits.detach(),
            gradients,
            {each: start[each] if _same(tensor, start[each]) else tensor.clone() for each, tensor in tensors.items()},
        )

    def _logits(self, inputs: torch.Tensor, trial: _Trial) -> torch.Tensor:
        self._module.train(trial.training)
        with _no_hooks(self._name):
            logits: torch.Tensor = self._guarded(lambda: _first_tensor(self._module(inputs.clone())), trial)
        if logits.dim() != 2 or len(logits) != len(inputs):
            raise ModelError(
                f"the model {self._name} returns logits of shape {tuple(logits.shape)} for a batch of {len(inputs)}; "
                "return (batch, classes), also for a batch of 1: squeeze() without a dimension drops that one, "
                "flatten(1) does not"
            )
        return logits

    def _without_gradients(
        self, start: Mapping[str, torch.Tensor], inputs: torch.Tensor, trial: _Trial, known: _Outcome
    ) -> None:
        self._set(start)
        torch.manual_seed(_SEED)
        with torch.no_grad():
            logits = self._logits(inputs, trial)
        if not _relative(logits, known.logits) <= TOLERANCE:
            raise ModelError(
                f"the model {self._name} gives other logits under torch.no_grad(), as with torch.is_grad_enabled(); "
                "branch on self.training instead"
            )

    def _guarded(self, call: Any, trial: _Trial) -> Any:
        try:
            return call()
        except ModelError:
            raise
        except Exception as error:  # whatever the model's own code does
            where = error_line(error)
            raise ModelError(
                f"the model {self._name} fails in {trial}{f' at {where}' if where else ''}: {first_line(error)}"
            ) from error

    def _registered(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._module.named_parameters()
        yield from self._module.named_buffers()

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Looked up anew each time: a buffer may be assigned another tensor."""
        return {**dict(self._registered()), **self._constants}

    def _set(self, values: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for each, tensor in self._tensors().items():
                if not _same(tensor, values[each]):  # one value in many places cannot be written to
                    tensor.copy_(values[each])


@contextmanager
def _no_hooks(name: str) -> Iterator[None]:
    """Refuses hooks on gradients of activations: they may do nothing in all trials, as one that clips at 10 does."""
    before = torch.Tensor.register_hook

    def refuse(*_: Any, **__: Any) -> Any:
        lines = [frame for frame in traceback.extract_stack()[:-1] if is_users(frame.filename)]
        where = f" at {lines[-1].filename}:{lines[-1].lineno}" if lines else ""
        raise ModelError(
            f"the model {name} hooks into the gradient of an activation{where}, which devices would not run; leave it "
            "out, or write what it does into forward()"
        )

    torch.Tensor.register_hook = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.register_hook = before  # type: ignore[method-assign]


def _run_graph(
    exported: Exported, inputs: torch.Tensor, trial: _Trial, weights: Mapping[str, torch.Tensor]
) -> _Outcome:
    model = Model(exported.graph)
    fresh = {each: _laid_out(weights[each].clone(), trial) for each in exported.tensors}
    model.load(fresh.__getitem__, trainable=True)
    model.train(trial.training)
    torch.manual_seed(_SEED)
    logits = model(_laid_out(inputs.clone(), trial))
    _backward(logits, trial.gradient)
    return _Outcome(
        logits.detach(),
        {each: tensor.grad for each, tensor in fresh.items() if tensor.grad is not None},
        {each: tensor.detach() for each, tensor in fresh.items()},
    )


def _other_random_states() -> tuple[Any, ...]:
    """Of Python's and numpy's generators."""
    _, keys, position, *_ = np.random.get_state()
    return random.getstate(), np.asarray(keys).tobytes(), position


def _laid_out(tensor: torch.Tensor, trial: _Trial) -> torch.Tensor:
    if trial.channels_last and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def _first_tensor(output: object) -> torch.Tensor:
    leaves = torch.utils._pytree.tree_leaves(output)
    return next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def _backward(logits: torch.Tensor, scale: float) -> None:
    if logits.requires_grad:
        weights = torch.linspace(-scale, scale, logits.numel()).view_as(logits)
        torch.autograd.backward((logits * weights).sum())


def _difference(one: _Outcome, other: _Outcome, *, gradients: bool = True) -> tuple[float, str]:
    """The largest relative difference, and where it is."""
    pairs = [("the logits", one.logits, other.logits)]
    for each in one.gradients.keys() | other.gradients.keys() if gradients else ():
        known = one.gradients.get(each, other.gradients.get(each))
        assert known is not None
        zeros = torch.zeros_like(known)
        mine, theirs = one.gradients.get(each, zeros), other.gradients.get(each, zeros)
        pairs.append((f"the gradient of {each}", mine, theirs))
    pairs += [(each, one.tensors[each], other.tensors[each]) for each in one.tensors]
    return max(((_relative(a, b), what) for what, a, b in pairs), key=lambda each: each[0])


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of the larger; what is no number in both is the same."""
    if one.shape != other.shape:
        return float("inf")
    if one.numel() == 0 or torch.equal(one, other):
        return 0.0
    one, other = one.double(), other.double()
    both = ~(one.isnan() & other.isnan() | (one == other))
    one, other = one[both], other[both]
    if one.numel() == 0:
        return 0.0
    size = max(float(one.abs().max()), float(other.abs().max()), 1e-6)
    difference = float((one - other).abs().max()) / size
    return difference if difference == difference else float("inf")
