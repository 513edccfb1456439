"""Building the models that a job may name. torchvision costs 170 MiB, so only the builders that need it import it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fedepth.errors import FedepthError, ModelError
from fedepth.models.catalog import ZOO
from fedepth.task import ModelSpec


def build(spec: ModelSpec, allowed: Sequence[str] | None = None) -> nn.Module:
    """Builds a model with fresh weights, on the device that `torch.device` as a context names.

    Args:
        spec: `spec.name` is a name of the zoo, or "module:function"; the function is called with the spec if
            it takes an argument, else without.
        allowed: the "module:function" names that may be imported here. None allows any: only the coordinator,
            whose operator wrote the job, passes that.

    Raises:
        ModelError: the name is unknown, not allowed here, cannot be imported, or gives no module.
    """
    if spec.name in ZOO:
        return _call(_resolve(ZOO[spec.name].builder, spec.name), spec)
    if ":" not in spec.name:
        names = ", ".join(sorted(ZOO))
        raise ModelError(f"There is no model {spec.name!r}. Name one of {names}, or your own as 'module:function'.")
    if allowed is not None and spec.name not in allowed:
        listed = ", ".join(allowed) or "none"
        raise ModelError(
            f"The job wants the model {spec.name!r}, which this device may not import (allowed: {listed}). "
            "If you trust that code, add the name to the models that the device's configuration allows."
        )
    return _call(_resolve(spec.name, spec.name), spec)


def digits_cnn(spec: ModelSpec) -> nn.Module:
    from fedepth.models.digits import DigitsCNN

    return DigitsCNN(spec.input_shape[0], len(spec.classes))


def preresnet20(spec: ModelSpec) -> nn.Module:
    from fedepth.models.preresnet import PreResNet

    return PreResNet(spec.input_shape[0], len(spec.classes))


def resnet18(spec: ModelSpec) -> nn.Module:
    from torchvision.models import resnet18 as build_resnet18

    model: nn.Module = build_resnet18(weights=None, num_classes=len(spec.classes))
    if spec.input_shape[0] != 3:
        stem = nn.Conv2d(spec.input_shape[0], 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        model.conv1 = stem
    return model


def mobilenet_v3_small(spec: ModelSpec) -> nn.Module:
    from torchvision.models import mobilenet_v3_small as build_mobilenet

    model: nn.Module = build_mobilenet(weights=None, num_classes=len(spec.classes))
    if spec.input_shape[0] != 3:
        stem = nn.Conv2d(spec.input_shape[0], 16, 3, stride=2, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out")
        model.get_submodule("features.0").register_module("0", stem)
    return model


def vit_tiny(spec: ModelSpec) -> nn.Module:
    """Width 192, 12 layers, 3 heads; patches of an eighth of the image's side (4 px at 32 px)."""
    return _vit(spec, patch=spec.input_shape[1] // 8, width=192, depth=12, heads=3)


def vit_b_16(spec: ModelSpec) -> nn.Module:
    """Width 768, 12 layers, 12 heads; patches of 16 px."""
    return _vit(spec, patch=16, width=768, depth=12, heads=12)


def _vit(spec: ModelSpec, *, patch: int, width: int, depth: int, heads: int) -> nn.Module:
    from torchvision.models import VisionTransformer

    channels, height, side = spec.input_shape
    if height != side or patch == 0 or side % patch:
        raise ModelError(
            f"{spec.name} needs square images whose side is a multiple of its {patch or 8} px patches; the "
            f"job has {height}×{side}. Change the job's input_shape."
        )
    model: nn.Module = VisionTransformer(
        image_size=side,
        patch_size=patch,
        num_layers=depth,
        num_heads=heads,
        hidden_dim=width,
        mlp_dim=4 * width,
        num_classes=len(spec.classes),
    )
    if channels != 3:
        stem = nn.Conv2d(channels, width, patch, stride=patch)
        nn.init.trunc_normal_(stem.weight, std=(1 / (channels * patch * patch)) ** 0.5)
        model.conv_proj = stem
    # torchvision starts with a classifier of zeros, through which a first stage gets no gradient at all.
    nn.init.trunc_normal_(model.get_submodule("heads.head").get_parameter("weight"), std=0.02)
    return model


def _resolve(path: str, name: str) -> Callable[..., Any]:
    module_name, _, function_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ModelError(f"The model {name!r} cannot be imported: {error}. Install what it needs.") from error
    except Exception as error:  # whatever that code does when it is imported
        raise ModelError(f"The model {name!r} cannot be imported: {_told(error)}. Correct its code.") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ModelError(f"The model {name!r}: {module_name} has no function {function_name!r}. Correct the name.")
    return function  # type: ignore[no-any-return]


def _call(function: Callable[..., Any], spec: ModelSpec) -> nn.Module:
    takes_spec = any(
        parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        for parameter in inspect.signature(function).parameters.values()
    )
    try:
        model = function(spec) if takes_spec else function()
    except (FedepthError, MemoryError):
        raise
    except Exception as error:  # whatever that code does
        raise ModelError(f"The model {spec.name!r} cannot be built: {_told(error)}. Correct its code.") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"The model {spec.name!r} gave a {type(model).__name__}. It must return a torch.nn.Module.")
    return model


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
