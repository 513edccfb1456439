"""How known architectures fall into units and a head, as data.

A pattern lists steps. A step is
- the dotted path of a module, called with the output of the step before;
- "prefix.*", in the list of units only: every child of that module as a unit of its own, except those that
  another step names;
- "@name", one of the glue functions below, for what a model does in its own forward() between its modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from fedepth.costs import ModelCosts


@dataclass(frozen=True)
class Pattern:
    """Units and head of one architecture, each as a tuple of steps."""

    units: tuple[tuple[str, ...], ...]
    head: tuple[str, ...]


@dataclass(frozen=True)
class Glue:
    """A function of the model and the output of the step before.

    Attributes:
        function: what to compute.
        owns: the paths of the parameters and modules that it uses; they belong to the unit of the step.
    """

    function: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    owns: tuple[str, ...] = ()


def pattern_for(model: nn.Module) -> Pattern | None:
    """The pattern of a known architecture, with "prefix.*" expanded; None for any other model.

    It depends on the class alone, so that the coordinator and every device find the same units.
    """
    pattern = PATTERNS.get(f"{type(model).__module__}.{type(model).__qualname__}")
    return None if pattern is None else _expand(model, pattern)


def pattern_of(costs: ModelCosts) -> Pattern:
    """How the model was split that these costs were traced from."""
    head = costs.units[-1].exit if costs.units else None
    return Pattern(tuple(unit.steps for unit in costs.units), head.steps if head else ())


def _expand(model: nn.Module, pattern: Pattern) -> Pattern:
    used = {step for unit in (*pattern.units, pattern.head) for step in unit}
    units: list[tuple[str, ...]] = []
    for unit in pattern.units:
        if len(unit) == 1 and unit[0].endswith(".*"):
            prefix = unit[0][:-2]
            paths = [f"{prefix}.{child}" for child, _ in model.get_submodule(prefix).named_children()]
            units.extend((path,) for path in paths if path not in used)
        else:
            units.append(unit)
    return Pattern(tuple(units), pattern.head)


def _flatten(_: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1)


def _relu(_: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.relu(x)


def _class_token(_: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return tokens[:, 0]


def _vit_embed(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) images to (B, 1 + patches, D): patch embedding, class token, position embedding."""
    patches = model.get_submodule("conv_proj")(images).flatten(2).transpose(1, 2)
    class_token = model.get_parameter("class_token").expand(len(images), -1, -1)
    tokens = torch.cat((class_token, patches), dim=1)
    return tokens.add_(model.get_parameter("encoder.pos_embedding"))  # in place: the patches are still there


GLUE: dict[str, Glue] = {
    "@flatten": Glue(_flatten),
    "@relu": Glue(_relu),
    "@class_token": Glue(_class_token),
    "@vit_embed": Glue(_vit_embed, owns=("class_token", "conv_proj", "encoder.pos_embedding")),
}

PATTERNS: dict[str, Pattern] = {
    "fedepth.models.digits.DigitsCNN": Pattern(units=(("units.*",),), head=("head",)),
    "fedepth.models.preresnet.PreResNet": Pattern(units=(("stem",), ("blocks.*",)), head=("head",)),
    "torchvision.models.resnet.ResNet": Pattern(
        units=(
            ("conv1", "bn1", "relu", "maxpool"),
            ("layer1.*",),
            ("layer2.*",),
            ("layer3.*",),
            ("layer4.*",),
        ),
        head=("avgpool", "@flatten", "fc"),
    ),
    "torchvision.models.mobilenetv3.MobileNetV3": Pattern(
        units=(("features.*",),), head=("avgpool", "@flatten", "classifier")
    ),
    "torchvision.models.vision_transformer.VisionTransformer": Pattern(
        units=(
            ("@vit_embed", "encoder.dropout"),
            ("encoder.layers.*",),
        ),
        head=("encoder.ln", "@class_token", "heads"),
    ),
}
