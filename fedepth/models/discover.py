"""Finds units and a head in a model that no pattern describes, by watching one forward pass.

The rule is for models whose forward() calls their children in order. Containers (nn.Sequential,
nn.ModuleList, nn.ModuleDict) are opened. What every step takes is compared with what the step before gave, so
that the first place where the model does something between its children is named.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from fedepth.errors import ModelError
from fedepth.models.patterns import GLUE, Pattern

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
POOLS = (_AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd)
TOLERANCE = 1e-5
HINT = (
    "Return a model whose forward() calls its children in order, nothing in between: what is computed there "
    "belongs into a child of its own."
)


@dataclass(frozen=True)
class _Call:
    """One call of a child during the forward pass."""

    path: str
    given: torch.Tensor
    result: torch.Tensor


def discover_pattern(model: nn.Module, name: str, input_shape: tuple[int, ...]) -> Pattern:
    """The units and the head of a model with real weights.

    Args:
        model: not on the meta device; it is run once in eval mode, without gradients.
        name: for messages.
        input_shape: (channels, height, width).

    Raises:
        ModelError: the model is not its children in order; names the child.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((2, *input_shape), generator=generator)
    calls, logits = _watch(model, name, images)
    steps = _chain(model, name, images, calls, logits)
    return _group(model, name, steps, calls)


def _children(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Children with their paths; containers are opened."""
    found: list[tuple[str, nn.Module]] = []
    for child_name, child in module.named_children():
        path = f"{prefix}{child_name}"
        in_order = isinstance(child, nn.Sequential) and type(child).forward is nn.Sequential.forward
        if in_order or isinstance(child, nn.ModuleList | nn.ModuleDict):
            found.extend(_children(child, f"{path}."))
        else:
            found.append((path, child))
    return found


def _watch(model: nn.Module, name: str, images: torch.Tensor) -> tuple[list[_Call], torch.Tensor]:
    calls: list[_Call] = []
    problems: list[str] = []

    def record(path: str, arguments: tuple[object, ...], keywords: dict[str, object], result: object) -> None:
        if len(arguments) == 1 and not keywords and isinstance(arguments[0], torch.Tensor):
            if isinstance(result, torch.Tensor):
                calls.append(_Call(path, given[path].pop(), result.clone()))
            else:
                problems.append(f"{path} gives a {type(result).__name__}, not one tensor")
        else:
            problems.append(f"{path} is called with more than one tensor")

    given: dict[str, list[torch.Tensor]] = {}
    handles = []
    for path, child in _children(model):
        # An in-place child changes what it was given, so that is copied before the call.
        def before(_: nn.Module, arguments: tuple[object, ...], path: str = path) -> None:
            if arguments and isinstance(arguments[0], torch.Tensor):
                given.setdefault(path, []).append(arguments[0].clone())

        def after(
            _: nn.Module,
            arguments: tuple[object, ...],
            keywords: dict[str, object],
            result: object,
            path: str = path,
        ) -> None:
            record(path, arguments, keywords, result)

        handles.append(child.register_forward_pre_hook(before))
        handles.append(child.register_forward_hook(after, with_kwargs=True))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            logits = model(images.clone())  # an in-place first child changes its input
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(
            f"The model {name} cannot take images of shape {tuple(images.shape[1:])}: {error}. "
            "Check the job's input_shape against the model."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    if problems:
        raise ModelError(f"The model {name} cannot be split: {problems[0]}. {HINT}")
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise ModelError(f"The model {name} must return logits of shape (batch, classes) as one tensor.")
    return calls, logits


def _chain(model: nn.Module, name: str, images: torch.Tensor, calls: list[_Call], logits: torch.Tensor) -> list[str]:
    """The steps in order, glue included; proves that they are the whole forward pass."""
    with_parameters = {path for path, child in _children(model) if any(True for _ in child.parameters())}
    called = [call.path for call in calls]
    for path in sorted(with_parameters):
        if called.count(path) != 1:
            times = "never" if path not in called else f"{called.count(path)} times"
            raise ModelError(f"The model {name} cannot be split: {path} has parameters and is called {times}. {HINT}")
    steps: list[str] = []
    previous, where = images, "the input"
    for call in calls:
        glue = _glue_between(model, previous, call.given)
        if glue is None:
            raise ModelError(
                f"The model {name} cannot be split at {call.path}: it takes {_shape(call.given)}, and "
                f"{where} gives {_shape(previous)} with other values or another shape, so forward() does "
                f"something in between (a skip over several children, a function). {HINT}"
            )
        steps.extend((*glue, call.path))
        previous, where = call.result, call.path
    if _glue_between(model, previous, logits) != ():
        raise ModelError(f"The model {name} cannot be split after {where}: its output is not the model's. {HINT}")
    return steps


def _glue_between(model: nn.Module, before: torch.Tensor, after: torch.Tensor) -> tuple[str, ...] | None:
    """The glue that turns one tensor into the other; None if there is none."""
    candidates: tuple[tuple[str, ...], ...] = ((), ("@flatten",), ("@relu",), ("@relu", "@flatten"))
    for glue in candidates:
        value = before
        for step in glue:
            value = GLUE[step].function(model, value)
        if value.shape == after.shape and torch.allclose(value, after, rtol=TOLERANCE, atol=TOLERANCE):
            return glue
    return None


def _group(model: nn.Module, name: str, steps: list[str], calls: list[_Call]) -> Pattern:
    """Steps up to the last feature map become units, the rest the head."""
    modules = {path: model.get_submodule(path) for path in steps if path not in GLUE}
    results = iter(calls)
    dimensions = [0 if path in GLUE else next(results).result.dim() for path in steps]
    cut = max((index + 1 for index, found in enumerate(dimensions) if found in (3, 4)), default=0)
    if not any(_weighty(modules.get(path)) for path in steps[cut:]):
        # A convolution as classifier: the head starts behind the last step but one that has parameters.
        cut = max((index for index, path in enumerate(steps) if _weighty(modules.get(path))), default=0)
    cut = _before_pooling(modules, steps, cut)
    units: list[list[str]] = [[]]
    for path in steps[:cut]:
        if _weighty(modules.get(path)) and any(_weighty(modules.get(earlier)) for earlier in units[-1]):
            units.append([])
        units[-1].append(path)
    head = tuple(steps[cut:])
    if not units[0] or not any(_weighty(modules.get(path)) for path in head):
        raise ModelError(
            f"The model {name} cannot be split: none of its children gives a feature map (batch, channels, "
            "height, width) or tokens (batch, tokens, width) with a classifier behind it. Children in "
            f"order: {', '.join(steps) or 'none'}. {HINT}"
        )
    return Pattern(tuple(tuple(unit) for unit in units), head)


def _before_pooling(modules: dict[str, nn.Module], steps: list[str], cut: int) -> int:
    """Moves pooling that ends the units into the head, with the norm and the activation right before it."""
    start = cut
    while start > 0 and not _weighty(modules.get(steps[start - 1])):
        start -= 1
    tail = steps[start:cut]
    return start if any(isinstance(modules.get(path), POOLS) for path in tail) else cut


def _weighty(module: nn.Module | None) -> bool:
    """Whether a step can start a unit: it has parameters and is not merely a norm."""
    if module is None or isinstance(module, NORMS):
        return False
    return any(True for _ in module.parameters())


def _shape(tensor: torch.Tensor) -> str:
    return "×".join(map(str, tensor.shape))
