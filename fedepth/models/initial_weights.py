"""Weights that a job begins with, from a local file: a safetensors file, or a checkpoint that holds tensors only.

Everything that the file holds has to fit the model by name and shape, but for two things that fine-tuning changes: the
classifier, which is for other classes, and the grid of position embeddings, which is for images of another size.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from fedepth.errors import ModelError
from fedepth.models.source import first_line
from fedepth.printable import printable

# Where training scripts put the weights in what they save.
_NESTED = ("state_dict", "model_state_dict", "model", "module", "net", "ema", "state_dict_ema", "params", "weights")
_NAMED = 5  # names in a message
_POSITIONS = re.compile(r"(^|\.)pos(ition)?_embed(ding)?s?$")  # torchvision's and timm's names
_EXTRA_TOKENS = (1, 0, 2)  # in front of the grid: a class token, none, or one for distillation as well
_NUMBER = re.compile(r"\d+")


def load_initial_weights(
    module: nn.Module, path: Path, classes: int, *, new_classifier: bool = False
) -> tuple[str, ...]:
    """Replaces a module's weights by those of a file. Returns notes for people.

    The classifier keeps its fresh weights where that of the file has another shape or is missing.

    Args:
        path: a .safetensors file, or one that torch.save wrote; of that only tensors are read, never code.
        classes: the job's number of classes.
        new_classifier: it keeps them in any case.

    Raises:
        ModelError: the file cannot be read, belongs to another model, or has values that are not finite; names the
            tensors.
    """
    own = dict(module.state_dict())
    given, prefix = _without_prefix(_read(path), own, path)
    head = classifier(module, classes)
    if new_classifier and not head:
        raise ModelError(
            f"[tuning] new_classifier: which layer is the classifier cannot be told, since the last one that the model "
            f"registers does not give a value for each of {classes} classes; assign it last in __init__()"
        )
    fitting: dict[str, torch.Tensor] = {}
    fresh, resized, wrong = [], [], []
    for name, tensor in own.items():
        found = given.get(name)
        if name in head and (new_classifier or found is None or found.shape != tensor.shape):
            fresh.append(name)
        elif found is None:
            if not name.endswith("num_batches_tracked"):
                wrong.append(f"{name} is missing")
        elif found.shape == tensor.shape:
            fitting[name] = found
        elif (grid := _positions(name, found, tensor.shape)) is not None:
            fitting[name] = grid
            resized.append(f"{name} from {_grid(found.shape)} to {_grid(tensor.shape)}")
        else:
            wrong.append(f"{name} has the shape {tuple(found.shape)}, the model's {tuple(tensor.shape)}")
    wrong += [
        f"{name} is of type {fitting[name].dtype}, the model's of {own[name].dtype}"
        for name in fitting
        if fitting[name].is_floating_point() != own[name].is_floating_point()
    ]
    unknown = sorted(given.keys() - own.keys())
    wrong += [f"{printable(name)} is of a layer that the model has not" for name in _further_layers(unknown, own)]
    if wrong:
        raise ModelError(
            f"{path} does not hold the weights of this model: {_listed(wrong, '; ')}; give the weights of the same "
            "model, for the same patches and widths"
        )
    if nothing := [name for name, tensor in fitting.items() if not bool(torch.isfinite(tensor).all())]:
        raise ModelError(
            f"{path} holds values that are not finite numbers: {_listed(nothing)}; give weights of a training run that "
            "did not diverge"
        )
    module.load_state_dict(fitting, strict=False)
    notes = [f"{len(fitting)} tensors of {path.name} are the initial weights{prefix and f', named {prefix}…'}"]
    if fresh:
        notes.append(f"a new classifier for {classes} classes: {', '.join(sorted(fresh))} keep fresh weights")
    if resized:
        notes.append(f"position embeddings were interpolated: {', '.join(resized)} patches")
    if unknown:
        notes.append(f"{len(unknown)} tensors of the file are not in the model: {_listed(map(printable, unknown))}")
    return tuple(notes)


def classifier(module: nn.Module, classes: int) -> frozenset[str]:
    """The names of the tensors of a module's classifier: the last layer with parameters, if it gives a value for every
    class, and others like it right before, as distilled models have. Empty where there is none."""
    names: list[str] = []
    kinds: set[tuple[torch.Size, ...]] = set()
    for path, each in reversed(list(module.named_modules())):
        tensors = dict(each.named_parameters(recurse=False))
        if not tensors:
            continue
        shapes = tuple(tensor.shape for tensor in tensors.values())
        kinds.add(shapes)
        gives_classes = all(shape[:1] == (classes,) for shape in shapes) and max(map(len, shapes)) > 1
        if not gives_classes or len(kinds) > 1:
            break
        names += [f"{path}.{name}".lstrip(".") for name in tensors]
    return frozenset(names)


def _positions(name: str, found: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    """Position embeddings of a square grid of patches as those of another one; None if they are no such.

    Bicubic, as in the paper on Vision Transformers (arXiv 2010.11929, section 3.2) and its followers.
    """
    if not _POSITIONS.search(name) or found.dim() != 3 or len(shape) != 3 or found.shape[2] != shape[2]:
        return None
    tokens = _extra_tokens(found.shape, shape)
    if tokens is None or not found.is_floating_point():
        return None
    old, new = (isqrt(count - tokens) for count in (found.shape[1], shape[1]))
    extra, grid = found[:, :tokens].float(), found[:, tokens:].float()
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False, antialias=new < old)
    return torch.cat([extra, grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)], dim=1)


def _extra_tokens(*shapes: torch.Size) -> int | None:
    """How many tokens stand in front of grids of these shapes (1, tokens, width); None if they are not square."""
    counts = [shape[1] for shape in shapes]
    fitting = (n for n in _EXTRA_TOKENS if all(count > n and isqrt(count - n) ** 2 == count - n for count in counts))
    return next(fitting, None) if all(shape[0] == 1 for shape in shapes) else None


def _grid(shape: torch.Size) -> str:
    side = isqrt(shape[1])
    return f"{side}×{side}"


def _further_layers(unknown: list[str], own: Mapping[str, torch.Tensor]) -> list[str]:
    """Those that are named as the model's own are, but for a number: of a deeper model, which half of would be left."""
    kinds = {_NUMBER.sub("#", name) for name in own if _NUMBER.search(name)}
    return [name for name in unknown if _NUMBER.search(name) and _NUMBER.sub("#", name) in kinds]


def _listed(names: Any, separator: str = ", ") -> str:
    each = list(names)
    more = f"{separator.strip()} and {len(each) - _NAMED} more" if len(each) > _NAMED else ""
    return separator.join(each[:_NAMED]) + more


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ModelError(f"there is no weights file {path}; correct [model] weights")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)  # which knows types that numpy has not, such as bfloat16
        except (SafetensorError, OSError) as error:
            raise ModelError(f"the initial weights {path} cannot be read: {first_line(error)}") from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - damaged files make torch.load raise anything
        # torch's own words are a key of a dictionary, or how to run the code in the file all the same.
        why = f"it is damaged, or of another kind ({type(error).__name__})"
        if "Weights only load failed" in str(error):
            why = "it holds objects of Python, such as a whole model, whose code is not run"
        raise ModelError(
            f"{path} cannot be read as a checkpoint of tensors: {why}; save model.state_dict(), best as safetensors"
        ) from None
    tensors = _tensors(found)
    if not tensors:
        raise ModelError(f"{path} holds no tensors by name; save model.state_dict()")
    # Of the others nobody can say whether they are finite, and some have no values at all.
    if odd := [name for name, tensor in tensors.items() if tensor.is_meta or tensor.layout != torch.strided]:
        raise ModelError(
            f"{path} holds tensors that are sparse or without values (meta): {_listed(odd)}; save them as plain ones"
        )
    return tensors


def _tensors(found: Any) -> dict[str, torch.Tensor]:
    if not isinstance(found, Mapping):
        return {}
    for key in _NESTED:
        if isinstance(found.get(key), Mapping):
            return _tensors(found[key])
    return {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _without_prefix(
    given: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor], path: Path
) -> tuple[dict[str, torch.Tensor], str]:
    """Names as the module has them, and what stood in front of them: wrappers for training on several GPUs, and
    frameworks that hold the model in an attribute, put something there.

    Raises:
        ModelError: two models in one file fit equally well.
    """
    if not own.keys().isdisjoint(given):
        return given, ""
    longest = max(map(len, own), default=0)
    hits: Counter[str] = Counter()
    for name in given:
        places = [at for at, letter in enumerate(name) if letter == "." and len(name) - at - 1 <= longest]
        hits.update(name[: at + 1] for at in places if name[at + 1 :] in own)
    best = hits.most_common(2)
    if not best:
        return given, ""
    if len(best) == 2 and best[0][1] == best[1][1] > 1:
        raise ModelError(
            f"{path} holds the model twice, under {printable(best[0][0])} and {printable(best[1][0])}; save the one to "
            "begin with in a file of its own"
        )
    prefix = best[0][0]
    return {
        name.removeprefix(prefix) if name.startswith(prefix) else name: each for name, each in given.items()
    }, prefix
