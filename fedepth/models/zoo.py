"""Building the models that a job may name, with fresh weights. At the coordinator only: devices have their graphs."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedepth.errors import FedepthError, ModelError
from fedepth.models.catalog import DEFAULT_VOCABULARY, ZOO
from fedepth.models.source import error_line
from fedepth.task import InputType, ModelSpec


def build(spec: ModelSpec, folder: Path | None = None) -> nn.Module:
    """Builds a model with fresh weights.

    Args:
        spec: `spec.name` is a name of the zoo, "torchvision:NAME", "timm:NAME", or "module:function" of the operator's
            own; such a function is called with the spec if it takes an argument, else without.
        folder: where such a module is looked for first.

    Raises:
        ModelError: the name is unknown, or its code cannot be imported, fails, or gives no module.
    """
    if spec.name in ZOO:
        return _call(_resolve(ZOO[spec.name].builder, spec.name), spec)
    source, colon, name = spec.name.partition(":")
    if not colon:
        names = ", ".join(sorted(ZOO))
        raise ModelError(
            f"there is no model {spec.name!r}; name one of {names}, or torchvision:NAME, timm:NAME, or a custom model "
            "as module:function"
        )
    if source in _LIBRARIES:
        return _built(lambda: _LIBRARIES[source](name, spec), spec)
    with _importing_from(folder):
        return _call(_resolve(spec.name, spec.name, folder), spec)


def has_width(spec: ModelSpec) -> bool:
    """Whether `build_width` builds this model."""
    return spec.name in _OF_ANY_WIDTH


def build_width(spec: ModelSpec, width: Fraction) -> nn.Module:
    """A model of the zoo with `width` times as many channels in every layer, rounded up (HeteroFL, arXiv 2010.01264).

    Raises:
        ModelError: it has no setting for that, see `has_width`.
    """
    if not has_width(spec):
        raise ModelError(f"the model {spec.name!r} has no setting for its width; {', '.join(_OF_ANY_WIDTH)} have")
    return _built(lambda: _OF_ANY_WIDTH[spec.name](spec, width), spec)


def digits_cnn(spec: ModelSpec, width: Fraction = Fraction(1)) -> nn.Module:
    from fedepth.models.digits import DigitsCNN

    return DigitsCNN(spec.input_shape[0], len(spec.classes), width)


def preresnet20(spec: ModelSpec, width: Fraction = Fraction(1)) -> nn.Module:
    from fedepth.models.preresnet import PreResNet

    return PreResNet(spec.input_shape[0], len(spec.classes), width)


_OF_ANY_WIDTH: dict[str, Callable[[ModelSpec, Fraction], nn.Module]] = {
    "digits-cnn": digits_cnn,
    "preresnet20": preresnet20,
}


def resnet18(spec: ModelSpec) -> nn.Module:
    return _torchvision("resnet18", spec)


def mobilenet_v3_small(spec: ModelSpec) -> nn.Module:
    return _torchvision("mobilenet_v3_small", spec)


def vit_tiny(spec: ModelSpec) -> nn.Module:
    """Width 192, 12 layers, 3 heads; patches of an eighth of the image's side (4 px at 32 px)."""
    return _vit(spec, patch=spec.input_shape[1] // 8, width=192, depth=12, heads=3)


def vit_b_16(spec: ModelSpec) -> nn.Module:
    """Width 768, 12 layers, 12 heads; patches of 16 px."""
    return _vit(spec, patch=16, width=768, depth=12, heads=12)


def text_transformer(spec: ModelSpec) -> nn.Module:
    """Width 128, 4 layers, 4 heads; token ids of the job's [text], or up to 8,191."""
    from fedepth.models.text_transformer import TextTransformer

    if spec.input_type is not InputType.TOKENS or len(spec.input_shape) != 1:
        raise ModelError(
            f"{spec.name} takes token ids of shape (length,); the job has {spec.input_type.value} of "
            f"{spec.input_shape}. Give the job a [text] section."
        )
    vocabulary = spec.text.vocabulary if spec.text else DEFAULT_VOCABULARY
    return TextTransformer(vocabulary, spec.input_shape[0], len(spec.classes))


def table_mlp(spec: ModelSpec) -> nn.Module:
    from fedepth.models.tables import TableMLP

    return TableMLP(_features(spec), len(spec.classes))


def table_resnet(spec: ModelSpec) -> nn.Module:
    from fedepth.models.tables import TableResNet

    return TableResNet(_features(spec), len(spec.classes))


def _features(spec: ModelSpec) -> int:
    if spec.input_type is not InputType.FLOAT or len(spec.input_shape) != 1:
        raise ModelError(
            f"{spec.name} takes the features of a table, of shape (features,); the job has {spec.input_type.value} of "
            f"{spec.input_shape}. Give the job a [table] section."
        )
    return spec.input_shape[0]


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
    return _with_gradient(_with_channels(model, channels))


def _torchvision(name: str, spec: ModelSpec) -> nn.Module:
    """A classifier of torchvision for the job's classes and channels."""
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        raise ModelError(f"torchvision has no classifier {name!r}; it has {', '.join(names)}")
    options: dict[str, Any] = {"num_classes": len(spec.classes)}
    if name.startswith("vit_"):
        options["image_size"] = spec.input_shape[-1]
    if name.startswith("maxvit"):
        options["input_size"] = tuple(spec.input_shape[-2:])
    if name in ("googlenet", "inception_v3"):  # their auxiliary classifiers are no part of what is trained here
        options.update(aux_logits=False, init_weights=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about initialisation that a newer release changes
        model: nn.Module = models.get_model(name, weights=None, **options)
    return _with_gradient(_with_channels(model, spec.input_shape[0]))


def _timm(name: str, spec: ModelSpec) -> nn.Module:
    """A classifier of timm for the job's classes, channels and, where it depends on it, image size."""
    try:
        import timm
    except ImportError:
        raise ModelError(f"the model timm:{name} needs timm here: pip install 'fedepth[timm]'") from None
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:8]) or "see timm.list_models()"
        raise ModelError(f"timm has no model {name!r}; it has {near}, …")
    options: dict[str, Any] = {"num_classes": len(spec.classes), "in_chans": spec.input_shape[0]}
    try:
        model = timm.create_model(name, pretrained=False, img_size=tuple(spec.input_shape[-2:]), **options)
    except TypeError:  # it takes images of any size
        model = timm.create_model(name, pretrained=False, **options)
    return _with_gradient(model)


_LIBRARIES: dict[str, Callable[[str, ModelSpec], nn.Module]] = {"torchvision": _torchvision, "timm": _timm}


def _with_channels(model: nn.Module, channels: int) -> nn.Module:
    """The same for images of so many channels: its first convolution is made anew."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.in_channels != channels:
                fresh = nn.Conv2d(
                    channels,
                    module.out_channels,
                    module.kernel_size,  # type: ignore[arg-type]
                    stride=module.stride,  # type: ignore[arg-type]
                    padding=module.padding,  # type: ignore[arg-type]
                    bias=module.bias is not None,
                )
                nn.init.kaiming_normal_(fresh.weight, mode="fan_out", nonlinearity="relu")
                parent, _, leaf = path.rpartition(".")
                model.get_submodule(parent).register_module(leaf, fresh)
            break
    return model


def _with_gradient(model: nn.Module) -> nn.Module:
    """The same without a classifier of zeros, as some begin, through which a first stage gets no gradient at all."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not torch.any(module.weight):
            nn.init.trunc_normal_(module.weight, std=0.02)
    return model


@contextlib.contextmanager
def _importing_from(folder: Path | None) -> Iterator[None]:
    """Not for longer than a custom model is built: a `queue.py` there must not be taken for Python's."""
    if folder is None:
        yield
        return
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _resolve(path: str, name: str, folder: Path | None = None) -> Callable[..., Any]:
    module_name, _, function_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.partition(".")[0]:
            raise ModelError(f"the model {name!r} cannot be imported: {error}; install what it needs") from error
        where = f"in {folder} and " if folder else ""
        raise ModelError(
            f"the model {name!r} cannot be imported: {error}; it is looked for {where}where Python looks: install it, "
            "or put its file there"
        ) from error
    except ImportError as error:
        raise ModelError(f"the model {name!r} cannot be imported: {error}; install what it needs") from error
    except Exception as error:  # whatever that code does when it is imported
        raise ModelError(f"the model {name!r} cannot be imported: {_told(error)}; correct its code") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ModelError(f"the model {name!r}: {module_name} has no function {function_name!r}; correct the name")
    return function  # type: ignore[no-any-return]


def _call(function: Callable[..., Any], spec: ModelSpec) -> nn.Module:
    takes_spec = any(
        parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        for parameter in inspect.signature(function).parameters.values()
    )
    return _built((lambda: function(spec)) if takes_spec else function, spec)


def _built(function: Callable[[], Any], spec: ModelSpec) -> nn.Module:
    try:
        model = function()
    except (FedepthError, MemoryError):
        raise
    except Exception as error:  # whatever that code does
        raise ModelError(f"the model {spec.name!r} cannot be built: {_told(error)}; correct its code") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model {spec.name!r} gave a {type(model).__name__}; it must return a torch.nn.Module")
    return model


def _told(error: Exception) -> str:
    where = error_line(error)
    return f"{type(error).__name__}: {error}{f' (at {where})' if where else ''}"
