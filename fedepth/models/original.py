"""The module that a graph came from, as the proof runs it: twice each time, so that it first agrees with itself."""

from __future__ import annotations

import random
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fedepth.errors import ModelError
from fedepth.models.comparison import SEED, TOLERANCE, Outcome, Trial, backward, difference, gradients, relative, same
from fedepth.models.export import Exported, is_spread
from fedepth.models.hidden_state import hidden_tensors, hidden_values
from fedepth.models.outputs import logits_of
from fedepth.models.source import error_line, first_line, is_users


class Original:
    """The module itself, not a copy: hooks on parameters, and functions that know the module, are not copied.

    Attributes:
        name: for messages.
        start: its tensors as they were, by name.
        writable: names of its parameters and buffers, but for those that hold one value in many places.
    """

    def __init__(self, module: nn.Module, exported: Exported, name: str) -> None:
        self._module = module
        self.name = name
        self._names = exported.tensors.keys()
        registered = dict(self._registered())
        self.writable = frozenset(each for each in registered.keys() & self._names if not is_spread(registered[each]))
        # Those that are plain attributes, as it holds them, and what its code makes of numbers.
        self._constants = {each: tensor for each, tensor in exported.tensors.items() if each not in registered}
        self.start = {each: tensor.detach().clone() for each, tensor in self._tensors().items()}
        self._was_training = module.training
        self._rates: dict[nn.Module, float] = {}
        self._before = {id(tensor): tensor for tensor in self._reachable().values()}

    def draw_only_for_logits(self, left_out: Mapping[str, str]) -> None:
        """Switches dropout off where it serves outputs that are left out: the graph does not draw for them.

        Raises:
            ModelError: something else draws random numbers for them.
        """
        for path, line in left_out.items():
            found = self._module.get_submodule(path)
            if not isinstance(found, nn.modules.dropout._DropoutNd):
                raise ModelError(
                    f"the model {self.name} draws random numbers at {line} for an output that is left out, so that "
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

    def step(self, start: Mapping[str, torch.Tensor], inputs: torch.Tensor, trial: Trial) -> Outcome:
        """One forward and backward pass, when it has agreed with itself.

        Raises:
            ModelError: it fails, or what it gives depends on more than its tensors and torch's random numbers.
        """
        name = self.name
        first = self._run(start, inputs, trial, seed=0)
        before = hidden_values(self._module)
        again = self._run(start, inputs, trial, seed=1)
        now = hidden_values(self._module)
        if changed := sorted(each for each in before.keys() | now.keys() if before.get(each) != now.get(each)):
            raise ModelError(
                f"the model {name} changes {changed[0]} whenever it runs, which devices cannot follow; use a buffer, "
                "or torch's random functions"
            )
        apart, what = difference(first, again)
        if not apart <= TOLERANCE:
            raise ModelError(
                f"the model {name} is not deterministic: with the same torch seed, {what} differs from run to run "
                f"({trial}; look for a counter, a global, or random numbers that torch does not draw); use torch's "
                "random functions and buffers"
            )
        if not trial.training:
            self._without_gradients(start, inputs, trial, again)
        return again

    def repeats(self, start: Mapping[str, torch.Tensor], inputs: torch.Tensor, trial: Trial, known: Outcome) -> bool:
        """Whether another trial with the same inputs has a known outcome."""
        return difference(self._run(start, inputs, trial, seed=1), known)[0] <= TOLERANCE

    def caches(self, start: Mapping[str, torch.Tensor], inputs: torch.Tensor, trial: Trial) -> list[str]:
        """Where it keeps tensors that it made in an earlier run, and has not replaced in another one."""
        made = {path: tensor for path, tensor in self._reachable().items() if id(tensor) not in self._before}
        self._run(start, inputs, trial, seed=1)
        now = self._reachable()
        return [path for path, tensor in made.items() if now.get(path) is tensor]

    def draws(self, start: Mapping[str, torch.Tensor], inputs: torch.Tensor, trial: Trial, known: Outcome) -> bool:
        """Whether the seed of torch's random numbers makes a difference."""
        return difference(self._run(start, inputs, trial, seed=1, torch_seed=SEED + 1), known)[0] > TOLERANCE

    def _run(
        self,
        start: Mapping[str, torch.Tensor],
        inputs: torch.Tensor,
        trial: Trial,
        *,
        seed: int,
        torch_seed: int = SEED,
    ) -> Outcome:
        module, name = self._module, self.name
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
        self._guarded(lambda: backward(logits, trial), trial)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        found = gradients({each: parameter for each, parameter in parameters.items() if each in start}, trial)
        module.zero_grad()  # lets go of them: copies of a large model's would not fit beside its weights
        tensors = {each: tensor.detach() for each, tensor in self._tensors().items() if each in self._names}
        return Outcome(
            logits.detach(),
            found,
            {each: start[each] if same(tensor, start[each]) else tensor.clone() for each, tensor in tensors.items()},
        )

    def _logits(self, inputs: torch.Tensor, trial: Trial) -> torch.Tensor:
        self._module.train(trial.training)
        with _no_hooks(self.name):
            logits: torch.Tensor = self._guarded(lambda: logits_of(self._module(inputs.clone())), trial)
        if logits.dim() != 2 or len(logits) != len(inputs):
            raise ModelError(
                f"the model {self.name} returns logits of shape {tuple(logits.shape)} for a batch of {len(inputs)}; "
                "return (batch, classes), also for a batch of 1: squeeze() without a dimension drops that one, "
                "flatten(1) does not"
            )
        return logits

    def _without_gradients(
        self, start: Mapping[str, torch.Tensor], inputs: torch.Tensor, trial: Trial, known: Outcome
    ) -> None:
        self._set(start)
        torch.manual_seed(SEED)
        with torch.no_grad():
            logits = self._logits(inputs, trial)
        if not relative(logits, known.logits) <= TOLERANCE:
            raise ModelError(
                f"the model {self.name} gives other logits under torch.no_grad(), as with torch.is_grad_enabled(); "
                "branch on self.training instead"
            )

    def _guarded(self, call: Any, trial: Trial) -> Any:
        try:
            return call()
        except ModelError:
            raise
        except Exception as error:  # whatever the model's own code does
            where = error_line(error)
            raise ModelError(
                f"the model {self.name} fails in {trial}{f' at {where}' if where else ''}: {first_line(error)}"
            ) from error

    def _registered(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._module.named_parameters()
        yield from self._module.named_buffers()

    def _reachable(self) -> dict[str, torch.Tensor]:
        return {**dict(self._module.named_buffers()), **hidden_tensors(self._module)}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Looked up anew each time: a buffer may be assigned another tensor."""
        return {**dict(self._registered()), **self._constants}

    def _set(self, values: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for each, tensor in self._tensors().items():
                if each in values and not same(tensor, values[each]):  # one value in many places cannot be written to
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


def _other_random_states() -> tuple[Any, ...]:
    """Of Python's and numpy's generators."""
    _, keys, position, *_ = np.random.get_state()
    return random.getstate(), np.asarray(keys).tobytes(), position
