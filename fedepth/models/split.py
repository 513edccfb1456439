"""A model as units and a head, over the one underlying model, so that tensor names are its state dict's own.

A trainer builds on the meta device and puts real tensors only where it works:

    split_model = split_spec(spec, allowed)                       # no weights yet
    for unit in block: assign(split_model, name, tensor, True)    # for each name in unit.tensor_names
    ...
    release(split_model.units[3])                                 # meta tensors again, memory given back
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fedepth.costs import ModelCosts
from fedepth.errors import ModelError
from fedepth.estimate.peak import FLOAT_BYTES
from fedepth.layout import ModelLayout, TensorInfo, UnitLayout
from fedepth.models import zoo
from fedepth.models.discover import discover_pattern
from fedepth.models.patterns import GLUE, Pattern, pattern_for, pattern_of
from fedepth.task import ModelSpec

DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
}
RANDOM_FILLS = {"uniform_", "normal_", "bernoulli_", "exponential_", "random_", "log_normal_", "cauchy_"}


@dataclass(frozen=True, eq=False)
class Unit:
    """One unit, or the head: steps of the underlying model, called one after the other.

    Attributes:
        name: the path of its first step.
        paths: its steps as patterns name them.
        steps: what to call.
        modules: the modules among the steps and those that glue functions use.
        parameter_names: names of its parameters in the model's state dict.
        buffer_names: names of its buffers in the model's state dict.
        model: the underlying model.
    """

    name: str
    paths: tuple[str, ...]
    steps: tuple[Callable[[torch.Tensor], torch.Tensor], ...]
    modules: tuple[nn.Module, ...]
    parameter_names: tuple[str, ...]
    buffer_names: tuple[str, ...]
    model: nn.Module

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Parameters, then buffers."""
        return self.parameter_names + self.buffer_names

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            x = step(x)
        return x

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """State-dict names and parameters as they are now; ask again after `assign` or `release`."""
        return [(name, self.model.get_parameter(name)) for name in self.parameter_names]

    def buffers(self) -> list[tuple[str, torch.Tensor]]:
        """State-dict names and buffers as they are now."""
        return [(name, self.model.get_buffer(name)) for name in self.buffer_names]

    def train(self, mode: bool = True) -> None:
        """Sets training mode: False keeps running statistics as they are and switches dropout off."""
        for module in self.modules:
            module.train(mode)

    def layout(self) -> UnitLayout:
        tensors: list[tuple[str, torch.Tensor]] = [*self.parameters(), *self.buffers()]
        return UnitLayout(self.name, tuple(_tensor_info(name, tensor) for name, tensor in tensors))


@dataclass(frozen=True, eq=False)
class SplitModel:
    """A model that was split.

    Attributes:
        model: the underlying model.
        units: in order.
        head: what follows the last unit; gives logits.
        input_shapes: each unit's input without the batch.
        head_shape: the head's input without the batch, where every skip connection leads.
    """

    model: nn.Module
    units: tuple[Unit, ...]
    head: Unit
    input_shapes: tuple[tuple[int, ...], ...]
    head_shape: tuple[int, ...]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) float images to (B, classes) logits; the same as `model(x)`."""
        for unit in self.units:
            x = unit(x)
        return self.head(x)

    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Each unit's output without the batch."""
        return (*self.input_shapes[1:], self.head_shape)

    def layout(self) -> ModelLayout:
        return ModelLayout(tuple(unit.layout() for unit in self.units), self.head.layout().tensors)


def split_spec(
    spec: ModelSpec,
    allowed: Sequence[str] | None = None,
    device: torch.device | str = "meta",
    costs: ModelCosts | None = None,
) -> SplitModel:
    """Builds a job's model and splits it.

    Args:
        spec: names the model.
        allowed: see `zoo.build`.
        device: "meta" for a model without weights, or where its fresh weights shall be.
        costs: split it as it was when these were traced. Without them, every unit is run once on one sample, and a
            model of no known architecture is built once with all its weights, to be watched.

    Raises:
        ModelError: see `zoo.build` and `split`.
    """
    with torch.device(device), _NoRandomFill():
        model = zoo.build(spec, allowed)
    return split(model, spec.name, spec.input_shape, partial(zoo.build, spec, allowed), costs)


def split(
    model: nn.Module,
    name: str,
    input_shape: Sequence[int],
    factory: Callable[[], nn.Module] | None = None,
    costs: ModelCosts | None = None,
) -> SplitModel:
    """Splits a model into units and a head.

    Known architectures are split by their pattern. Any other model is run once on a small random input, to
    find the order of its children and to prove that calling them in order gives what its forward() gives; a
    model on the meta device cannot be run, so `factory` then builds a real copy for it, which is dropped at
    once.

    Args:
        model: on any device.
        name: for messages.
        input_shape: (channels, height, width).
        factory: builds the same model with real weights.
        costs: of the same model, if it was split and traced before.

    Raises:
        ModelError: the model cannot be split; the message names the child or the tensors, and says what to
            change.
    """
    _check_tensors(model, name)
    pattern = pattern_for(model) if costs is None else _told_pattern(model, name, costs)
    if pattern is None:
        real = model
        if any(tensor.is_meta for tensor in model.state_dict().values()):
            if factory is None:
                raise ModelError(f"The model {name} has no weights yet, and no factory was given to run it once.")
            with torch.random.fork_rng(devices=[]):
                real = factory()
        pattern = discover_pattern(real, name, tuple(input_shape))
    units = tuple(_unit(model, steps) for steps in pattern.units)
    head = _unit(model, pattern.head)
    _check_owners(model, name, (*units, head))
    shapes = _shapes(units, tuple(input_shape)) if costs is None else _told_shapes(name, tuple(input_shape), costs)
    return SplitModel(model, units, head, shapes[:-1], shapes[-1])


def assign(split_model: SplitModel | nn.Module, name: str, tensor: torch.Tensor, requires_grad: bool) -> None:
    """Puts a tensor where the model has its parameter or buffer `name`. The tensor is not copied.

    Raises:
        ModelError: the model has no such tensor, or one of another shape or dtype.
    """
    owner, leaf = _owner(split_model.model if isinstance(split_model, SplitModel) else split_model, name)
    old: torch.Tensor | None = {**owner._buffers, **owner._parameters}.get(leaf)
    if old is None:
        raise ModelError(f"The model has no tensor {name!r}. These weights belong to another model.")
    if old.shape != tensor.shape or old.dtype != tensor.dtype:
        raise ModelError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype} in the weights and {tuple(old.shape)} "
            f"{old.dtype} in the model. These weights belong to another model, or to a job with other "
            "classes or another input_shape."
        )
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=requires_grad)
    else:
        owner._buffers[leaf] = tensor


def release(unit: Unit) -> None:
    """Puts meta tensors back, so that the memory of the unit's tensors and gradients can be given back."""
    for name in unit.tensor_names:
        owner, leaf = _owner(unit.model, name)
        parameter = owner._parameters.get(leaf)
        if parameter is not None:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            owner._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
            continue
        buffer = owner._buffers[leaf]
        assert buffer is not None
        owner._buffers[leaf] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")


class _NoRandomFill(TorchFunctionMode):
    """Skips random initialisation of meta tensors: there is nothing to fill, but torch's meta kernels for it
    import sympy and torch._dynamo, over 150 MiB that a trainer would keep.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in RANDOM_FILLS and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def _unit(model: nn.Module, paths: tuple[str, ...]) -> Unit:
    steps: list[Callable[[torch.Tensor], torch.Tensor]] = []
    owned: list[str] = []
    for path in paths:
        if path in GLUE:
            steps.append(partial(GLUE[path].function, model))
            owned.extend(GLUE[path].owns)
        else:
            steps.append(model.get_submodule(path))
            owned.append(path)
    modules_by_name = dict(model.named_modules())
    return Unit(
        name=paths[0].lstrip("@"),
        paths=paths,
        steps=tuple(steps),
        modules=tuple(modules_by_name[path] for path in owned if path in modules_by_name),
        parameter_names=tuple(name for name, _ in model.named_parameters() if _belongs(name, owned)),
        buffer_names=tuple(name for name, _ in model.named_buffers() if _belongs(name, owned)),
        model=model,
    )


def _belongs(name: str, owned: Sequence[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in owned)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        return model.get_submodule(path), leaf
    except AttributeError:
        raise ModelError(f"The model has no tensor {name!r}. These weights belong to another model.") from None


def _check_tensors(model: nn.Module, name: str) -> None:
    """Every tensor has to travel under one name of its own."""
    local = [
        f"{path}.{leaf}".lstrip(".")
        for path, module in model.named_modules()
        for leaf in sorted(module._non_persistent_buffers_set)
        if module._buffers.get(leaf) is not None
    ]
    if local:
        raise ModelError(
            f"The model {name} has non-persistent buffers, which no weights file carries to a device: "
            f"{', '.join(local)}. Register them with persistent=True, or compute them in forward()."
        )
    first_name: dict[int, str] = {}
    tied: list[str] = []
    for tensor_name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        first = first_name.setdefault(id(tensor), tensor_name)
        if first != tensor_name:
            tied.append(f"{first} = {tensor_name}")
    if tied:
        raise ModelError(
            f"The model {name} ties tensors, which cannot be trained unit by unit: {', '.join(tied)}. "
            "Give each module tensors of its own."
        )
    odd = [n for n, tensor in model.state_dict().items() if tensor.dtype not in DTYPE_NAMES]
    if odd:
        raise ModelError(f"The model {name} has tensors of types that cannot travel: {', '.join(odd)}.")


def _told_pattern(model: nn.Module, name: str, costs: ModelCosts) -> Pattern:
    """A pattern that came from elsewhere has to fit the model that the code here builds."""
    pattern = pattern_of(costs)
    known = {*GLUE, *(path for path, _ in model.named_modules() if path)}
    parts = (*pattern.units, pattern.head)
    unknown = [step for part in parts for step in part if step not in known]
    if unknown or not all(parts):
        told = f"it has no {', '.join(unknown[:8])}" if unknown else "not every unit has a step"
        raise ModelError(
            f"The model {name} cannot be split as it was where its costs were traced: {told}. "
            "Install the same version of the model's code here as there."
        )
    return pattern


def _told_shapes(name: str, input_shape: tuple[int, ...], costs: ModelCosts) -> tuple[tuple[int, ...], ...]:
    """Shapes that came from elsewhere have to be those that the costs were counted for."""
    told = (*costs.units, costs.head)
    if told[0].input_shape != input_shape:
        raise ModelError(
            f"The model {name} takes images of {input_shape}, and its costs were traced for {told[0].input_shape}. "
            "Trace them for this job's input_shape."
        )
    odd = [unit.name for unit in told if prod(unit.input_shape) * FLOAT_BYTES != unit.input_bytes]
    if odd:
        raise ModelError(f"The costs of the model {name} do not fit the shapes of the inputs of {', '.join(odd[:8])}.")
    return tuple(unit.input_shape for unit in told)


def _check_owners(model: nn.Module, name: str, units: Sequence[Unit]) -> None:
    owners: dict[str, list[str]] = {tensor_name: [] for tensor_name in model.state_dict()}
    for unit in units:
        for tensor_name in unit.tensor_names:
            owners[tensor_name].append(unit.name)
    wrong = [f"{tensor} ({', '.join(found) or 'none'})" for tensor, found in owners.items() if len(found) != 1]
    if wrong:
        raise ModelError(
            f"The model {name} has tensors that do not belong to exactly one unit: {'; '.join(wrong[:8])}. "
            "Each has to belong to one child that the forward pass calls."
        )


def _shapes(units: Sequence[Unit], input_shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The input shape of each unit and of the head, without the batch.

    A unit on the meta device gets uninitialised memory for the one call, rather than being run there: meta
    kernels import sympy and torch._dynamo, over 150 MiB that a trainer would keep.
    """
    shapes = [input_shape]
    for unit in units:
        on_meta = [(name, tensor) for name, tensor in (*unit.parameters(), *unit.buffers()) if tensor.is_meta]
        for name, tensor in on_meta:
            assign(unit.model, name, torch.empty(tensor.shape, dtype=tensor.dtype), requires_grad=False)
        modes = [(module, module.training) for top in unit.modules for module in top.modules()]
        unit.train(False)
        device = next((tensor.device for _, tensor in unit.parameters()), torch.device("cpu"))
        try:
            with torch.no_grad():
                shapes.append(tuple(unit(torch.zeros((1, *shapes[-1]), device=device)).shape[1:]))
        except RuntimeError as error:
            raise ModelError(
                f"Unit {unit.name} cannot take an input of shape {shapes[-1]}: {error}. Check the job's input_shape."
            ) from error
        finally:
            for module, mode in modes:
                module.training = mode
            if on_meta:
                release(unit)
    return tuple(shapes)


def _tensor_info(name: str, tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(name, tuple(tensor.shape), DTYPE_NAMES[tensor.dtype])
