import subprocess
import sys

import pytest
import torch
from torch import nn

from fedepth.errors import ModelError
from fedepth.models import zoo
from fedepth.models.catalog import ZOO
from fedepth.task import ModelSpec

PARAMETERS = {  # at 3 channels and 10 classes
    "digits-cnn": 86_962,
    "preresnet20": 272_282,
    "resnet18": 11_181_642,
    "mobilenet-v3-small": 1_528_106,
    "vit-tiny": 5_362_762,
}


def spec_of(name: str, channels: int = 3, size: int = 32, classes: int = 10) -> ModelSpec:
    labels = tuple(f"class {index}" for index in range(classes))
    return ModelSpec(name, labels, (channels, size, size), (0.5,) * channels, (0.5,) * channels)


def own_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


def own_model_of_spec(spec: ModelSpec) -> nn.Module:
    return nn.Linear(len(spec.classes), spec.input_shape[0])


def broken_model() -> nn.Module:
    raise ZeroDivisionError("division by zero")


def no_model() -> int:
    return 3


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameter_counts_are_those_of_the_architectures(name: str) -> None:
    with torch.device("meta"):
        model = zoo.build(spec_of(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", sorted(PARAMETERS))
@pytest.mark.parametrize(("channels", "classes"), [(1, 3), (4, 7)])
def test_models_adapt_to_channels_and_classes(name: str, channels: int, classes: int) -> None:
    spec = spec_of(name, channels, classes=classes)
    model = zoo.build(spec).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, channels, 32, 32)).shape == (2, classes)


def test_every_name_of_the_zoo_builds() -> None:
    for name in ZOO:
        with torch.device("meta"):
            assert isinstance(zoo.build(spec_of(name, size=64)), nn.Module)
        assert ZOO[name].description


def test_a_fresh_vit_sends_gradients_below_its_classifier() -> None:
    model = zoo.build(spec_of("vit-tiny"))
    model(torch.ones(2, 3, 32, 32)).square().sum().backward()
    gradient = model.get_parameter("class_token").grad
    assert gradient is not None
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(("size", "name"), [(4, "vit-tiny"), (28, "vit-tiny"), (30, "vit-b-16")])
def test_a_vit_refuses_images_that_its_patches_do_not_tile(size: int, name: str) -> None:
    with pytest.raises(ModelError, match=f"{name}.*{size}×{size}.*input_shape"):
        zoo.build(spec_of(name, size=size))


def test_an_unknown_name_lists_the_zoo() -> None:
    with pytest.raises(ModelError, match=r"no model 'resnet19'.*digits-cnn.*vit-tiny"):
        zoo.build(spec_of("resnet19"))


def test_own_models_get_the_spec_if_they_take_one() -> None:
    assert isinstance(zoo.build(spec_of(f"{__name__}:own_model")), nn.Sequential)
    built = zoo.build(spec_of(f"{__name__}:own_model_of_spec", classes=5))
    assert isinstance(built, nn.Linear)
    assert (built.in_features, built.out_features) == (5, 3)


def test_a_device_imports_only_what_it_allows(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path)
    with open(f"{path}/unwanted_model.py", "w") as file:
        file.write("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(path)
    with pytest.raises(ModelError, match=r"unwanted_model:build.*may not import \(allowed: other:build\)"):
        zoo.build(spec_of("unwanted_model:build"), allowed=("other:build",))
    with pytest.raises(ModelError, match="allowed: none"):
        zoo.build(spec_of("unwanted_model:build"), allowed=())
    with pytest.raises(SystemExit):
        zoo.build(spec_of("unwanted_model:build"), allowed=("unwanted_model:build",))


def test_names_of_the_zoo_need_no_permission() -> None:
    assert isinstance(zoo.build(spec_of("digits-cnn"), allowed=()), nn.Module)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:build", "cannot be imported.*no_such_module"),
        (f"{__name__}:missing", "has no function 'missing'"),
        (f"{__name__}:PARAMETERS", "has no function 'PARAMETERS'"),
        (f"{__name__}:no_model", "gave a int"),
        (f"{__name__}:broken_model", "cannot be built: ZeroDivisionError: division by zero"),
        (":build", "cannot be imported: ValueError"),
    ],
)
def test_what_is_wrong_with_an_own_model_is_told(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        zoo.build(spec_of(name))


@pytest.mark.parametrize("name", ["digits-cnn", "preresnet20"])
def test_a_trainer_that_splits_loads_no_heavy_modules(name: str) -> None:
    """Each of them is over 100 MiB that a small device would lose."""
    code = (
        "import sys\n"
        "from fedepth.models.split import split_spec\n"
        "from fedepth.task import ModelSpec\n"
        f"split_spec(ModelSpec({name!r}, ('a', 'b'), (3, 32, 32), (0.5,) * 3, (0.5,) * 3), ())\n"
        "heavy = {'torchvision', 'torch._dynamo', 'sympy'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
