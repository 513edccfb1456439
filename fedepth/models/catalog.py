"""The zoo's names and what a command line says of a model. No torch: whoever only names a model stays light."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from fedepth.errors import ConfigError
from fedepth.printable import printable, quoted
from fedepth.task import MOST_CHANNELS, MOST_NUMBERS, InputType, ModelSpec

DEFAULT_VOCABULARY = 8192  # of words that are hashed
_SHAPE = re.compile(r"[1-9][0-9]{0,9}(x[1-9][0-9]{0,9}){0,2}")


@dataclass(frozen=True)
class ZooEntry:
    """One model of the zoo.

    Attributes:
        builder: "module:function"; the function takes a ModelSpec.
        description: one line for people.
        input_shape: (channels, height, width), or the tokens of a text, or the features of a table, that it is commonly
            trained on; a job may name another.
    """

    builder: str
    description: str
    input_shape: tuple[int, ...]
    input_type: InputType = InputType.FLOAT


ZOO: dict[str, ZooEntry] = {
    "digits-cnn": ZooEntry(
        "fedepth.models.zoo:digits_cnn", "six GroupNorm convolutions for small images, 87 k parameters", (1, 8, 8)
    ),
    "preresnet20": ZooEntry(
        "fedepth.models.zoo:preresnet20", "PreResNet-20 for 32 px, BatchNorm, 272 k parameters", (3, 32, 32)
    ),
    "resnet18": ZooEntry("fedepth.models.zoo:resnet18", "torchvision's ResNet-18, 11.2 M parameters", (3, 64, 64)),
    "mobilenet-v3-small": ZooEntry(
        "fedepth.models.zoo:mobilenet_v3_small", "torchvision's MobileNetV3-Small, 1.5 M", (3, 64, 64)
    ),
    "vit-tiny": ZooEntry(
        "fedepth.models.zoo:vit_tiny", "ViT-Tiny: 12 layers of width 192, 8×8 patches, 5.4 M", (3, 64, 64)
    ),
    "vit-b-16": ZooEntry(
        "fedepth.models.zoo:vit_b_16", "ViT-B/16: 12 layers of width 768, 86 M parameters", (3, 224, 224)
    ),
    "text-transformer": ZooEntry(
        "fedepth.models.zoo:text_transformer",
        "encoder for texts: 4 layers of width 128, 1.8 M parameters with 8,192 words",
        (128,),
        InputType.TOKENS,
    ),
    "table-mlp": ZooEntry("fedepth.models.zoo:table_mlp", "4 linear layers of width 128 for tables", (32,)),
    "table-resnet": ZooEntry(
        "fedepth.models.zoo:table_resnet", "4 residual blocks of width 128 for tables, 270 k parameters", (32,)
    ),
}


def named_spec(model: str, shape: str | None, classes: int) -> ModelSpec:
    """A model as a command line names it, for trials without real data.

    Args:
        shape: "CxHxW"; None for what the zoo's models are commonly trained on.

    Raises:
        ConfigError: the shape is none, or it is missing and the zoo does not know the model; or there is no class.
    """
    if classes < 1:
        raise ConfigError(f"{classes} classes: a model needs one at least")
    shape_of_input = _input_shape(model, shape)
    channels = shape_of_input[0]
    labels = tuple(str(label) for label in range(classes))
    kind = ZOO[model].input_type if model in ZOO else InputType.FLOAT
    return ModelSpec(model, labels, shape_of_input, (0.0,) * channels, (1.0,) * channels, kind)


def _input_shape(model: str, text: str | None) -> tuple[int, ...]:
    if text is not None:
        if not isinstance(text, str) or not _SHAPE.fullmatch(text):
            raise ConfigError(
                f"--input: {quoted(str(text))} is not a shape; write channels, height and width, as 3x32x32"
            )
        shape = tuple(map(int, text.split("x")))
        if math.prod(shape) > MOST_NUMBERS or shape[0] > MOST_CHANNELS:
            raise ConfigError(
                f"--input: {text} has {math.prod(shape)} numbers in {shape[0]} channels; a sample has at most "
                f"{MOST_NUMBERS} in {MOST_CHANNELS}"
            )
        return shape
    if model not in ZOO:
        raise ConfigError(
            f"{printable(model) or 'a model without a name'} is none of {', '.join(sorted(ZOO))}; for "
            "torchvision:NAME, timm:NAME or a custom model as module:function, say what it is trained on, as "
            "--input 3x32x32"
        )
    return ZOO[model].input_shape
