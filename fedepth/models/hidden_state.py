"""What a model keeps outside its parameters and buffers: counters, random generators, tensors as plain attributes.

A graph knows nothing of it. So that nothing of it changes unseen, all that a module can reach is looked through: its
attributes and those of its classes, containers and objects in them, and what its functions and hooks close over.
"""

from __future__ import annotations

import itertools
import random
import types
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), Enum)
_COUNTERS = (itertools.count, itertools.cycle)
_FUNCTIONS = (types.FunctionType, types.MethodType)
# What torch itself keeps in a module, but for its hooks.
_TORCHS = {"_parameters", "_buffers", "_modules", "training", "_non_persistent_buffers_set", "_is_full_backward_hook"}
_FOREIGN = ("torch.", "numpy.", "builtins", "typing", "functools", "collections", "logging", "threading", "_thread")
_DEEPEST = 8
_LONGEST = 1000  # elements of one container that are looked at


def hidden_values(module: nn.Module) -> dict[str, object]:
    """Everything but tensors that a run of the model might change, by where it is, such as "layers.0.calls"."""
    return {path: value for path, value in _reachable(module) if not isinstance(value, torch.Tensor)}


def hidden_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Its tensors that are neither parameters nor buffers, by where they are."""
    known = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    found = ((path, value) for path, value in _reachable(module) if isinstance(value, torch.Tensor))
    return {path: tensor for path, tensor in found if id(tensor) not in known and not tensor.is_meta}


@contextmanager
def undone(module: nn.Module) -> Iterator[None]:
    """What happens in the block to such tensors, to attributes and buffers, and to containers in them, is undone at its
    end.

    To export a model runs it, with tensors that hold nothing: one that it keeps must not be found by later runs.
    """
    before = [(tensor, tensor.detach().clone()) for tensor in hidden_tensors(module).values()]
    containers = [pair for each in module.modules() for pair in _containers(vars(each), set())]
    try:
        yield
    finally:
        for container, content in containers:
            container.clear()
            (container.update if isinstance(container, dict | set) else container.extend)(content)
        with torch.no_grad():
            for tensor, value in before:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def _reachable(module: nn.Module) -> Iterator[tuple[str, object]]:
    seen: set[int] = set()
    for path, each in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in vars(each).items():
            if name not in _TORCHS:
                yield from _inside(f"{prefix}{name}", value, seen, 0)
        for kind in type(each).__mro__:
            if not _is_foreign(kind):
                yield from _of_class(kind, seen)


def _containers(value: Any, seen: set[int]) -> Iterator[tuple[Any, Any]]:
    """A container that can be changed, and those in it, each with a copy."""
    if id(value) in seen or not isinstance(value, dict | list | set | deque):
        return
    seen.add(id(value))
    yield value, value.copy()
    for each in itertools.islice(value.values() if isinstance(value, dict) else value, _LONGEST):
        yield from _containers(each, seen)


def _of_class(kind: type, seen: set[int]) -> Iterator[tuple[str, object]]:
    for name, value in vars(kind).items():
        if not name.startswith("__") and not isinstance(value, (*_FUNCTIONS, property, classmethod, staticmethod)):
            yield from _inside(f"{kind.__name__}.{name}", value, seen, 0)


def _inside(path: str, value: Any, seen: set[int], depth: int) -> Iterator[tuple[str, object]]:
    """A value in a form that can be compared, or what is in it."""
    if isinstance(value, _PLAIN):
        yield path, repr(value) if isinstance(value, float | complex) else value  # so that NaN equals itself
        return
    if id(value) in seen or depth > _DEEPEST:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield path, value
    elif (state := _state_of(value)) is not None:
        yield path, state
    elif not isinstance(value, nn.Module | type | types.ModuleType):
        yield from _parts(path, value, seen, depth + 1)


def _state_of(value: Any) -> object | None:
    """Of numpy's numbers and arrays, random generators and counters."""
    if isinstance(value, np.generic | np.ndarray):
        array = np.asarray(value)
        return None if array.dtype.hasobject else (array.dtype.str, array.shape, array.tobytes())
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state(legacy=False))
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    return repr(value) if isinstance(value, _COUNTERS) else None


def _parts(path: str, value: Any, seen: set[int], depth: int) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        parts = [(f"{path}[{key!r}]", each) for key, each in itertools.islice(value.items(), _LONGEST)]
        yield f"{path} (length)", len(value)
    elif isinstance(value, list | tuple | deque):
        parts = [(f"{path}[{at}]", each) for at, each in enumerate(itertools.islice(value, _LONGEST))]
        yield f"{path} (length)", len(value)
    elif isinstance(value, set | frozenset):
        parts = []
        yield path, frozenset(each for each in value if isinstance(each, _PLAIN))
    elif isinstance(value, types.MethodType):
        parts = [(path, value.__self__), (path, value.__func__)]
    elif isinstance(value, types.FunctionType):
        parts = [(path, _content(cell)) for cell in value.__closure__ or ()]
    elif not _is_foreign(type(value)) and hasattr(value, "__dict__"):
        parts = [(f"{path}.{name}", each) for name, each in vars(value).items()]
    else:
        parts = []
    for name, each in parts:
        yield from _inside(name, each, seen, depth)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _is_foreign(kind: type) -> bool:
    return f"{kind.__module__}.".startswith(_FOREIGN) or kind.__module__ == "torch"
