"""Weights that a job begins with, from a local file: a safetensors file, or a checkpoint that holds tensors only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fedepth.errors import ModelError
from fedepth.models.source import first_line

# Where training scripts put the weights in what they save.
_NESTED = ("state_dict", "model_state_dict", "model", "module", "net", "ema", "state_dict_ema", "params", "weights")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
_NAMED = 5  # names in a message


def load_initial_weights(module: nn.Module, path: Path, classes: int) -> tuple[str, ...]:
    """Replaces a module's weights by those of a file. Returns notes for people.

    A classifier for another number of classes keeps its fresh weights; everything else has to fit.

    Args:
        path: a .safetensors file, or one that torch.save wrote; of that only tensors are read, never code.
        classes: the job's number of classes.

    Raises:
        ModelError: the file cannot be read, or belongs to another model; names the tensors.
    """
    given = _without_prefix(_read(path), module)
    own = dict(module.state_dict())
    missing = [name for name in own if name not in given and not name.endswith("num_batches_tracked")]
    unknown = sorted(name for name in given if name not in own)
    fresh: list[str] = []
    wrong: list[str] = []
    for name in own.keys() & given.keys():
        if given[name].shape != own[name].shape:
            same_otherwise = given[name].shape[1:] == own[name].shape[1:]
            (fresh if same_otherwise and own[name].shape[:1] == (classes,) else wrong).append(name)
    if missing or wrong:
        what = [f"{name} is missing" for name in missing] + [
            f"{name} has the shape {tuple(given[name].shape)}, the model's {tuple(own[name].shape)}"
            for name in sorted(wrong)
        ]
        raise ModelError(
            f"{path} does not hold the weights of this model: {'; '.join(what[:_NAMED])}"
            f"{f', and {len(what) - _NAMED} more' if len(what) > _NAMED else ''}; give the weights of the same model"
        )
    taken = {name: tensor for name, tensor in given.items() if name in own and name not in fresh}
    module.load_state_dict(taken, strict=False)
    notes = [f"{len(taken)} tensors of {path.name} are the initial weights"]
    if fresh:
        notes.append(f"a new classifier for {classes} classes: {', '.join(sorted(fresh))} keep fresh weights")
    if unknown:
        notes.append(f"{len(unknown)} tensors of the file are not in the model: {', '.join(unknown[:_NAMED])}")
    return tuple(notes)


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
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{path} cannot be read as a checkpoint of tensors: {text}; save model.state_dict(), best as safetensors"
        ) from None
    tensors = _tensors(found)
    if not tensors:
        raise ModelError(f"{path} holds no tensors by name; save model.state_dict()")
    return tensors


def _tensors(found: Any) -> dict[str, torch.Tensor]:
    if not isinstance(found, Mapping):
        return {}
    for key in _NESTED:
        if isinstance(found.get(key), Mapping):
            return _tensors(found[key])
    return {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _without_prefix(given: dict[str, torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor]:
    """Names as the module has them: wrappers for training on several GPUs put something in front of all of them."""
    own = set(module.state_dict())
    while not any(name in own for name in given):
        prefix = next((each for each in _PREFIXES if all(name.startswith(each) for name in given)), "")
        if not prefix:
            break
        given = {name.removeprefix(prefix): tensor for name, tensor in given.items()}
    return given
