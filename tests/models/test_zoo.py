import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import nn

from fedepth.errors import ModelError
from fedepth.models import zoo
from fedepth.models.catalog import ZOO, named_spec
from fedepth.models.export import export_model
from fedepth.models.graph import encode
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


def custom_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


def custom_model_of_spec(spec: ModelSpec) -> nn.Module:
    return nn.Linear(len(spec.classes), spec.input_shape[0])


def broken_model() -> nn.Module:
    raise ZeroDivisionError("division by zero")


def no_model() -> int:
    return 3


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameter_counts_are_those_of_the_architectures(name: str) -> None:
    model = zoo.build(spec_of(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "parameters", "units", "head"),
    [
        # 8192 · 127 + 128 · 127 of words and positions; per layer 3 · (128² + 128), 2 norms, 128 · 127 + 127,
        # 128 · 512 + 512 and 512 · 127 + 127; the head's norm and 128 · 4 + 4
        ("text-transformer", 1_847_932, ["embedding", "layers.0", "layers.1", "layers.2", "layers.3"], (128, 128)),
        ("table-mlp", 55_300, ["layers.0", "layers.1", "layers.2", "layers.3"], (128,)),
        ("table-resnet", 269_700, ["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3"], (128,)),
    ],
)
def test_models_of_rows_are_cut_into_their_layers(
    name: str, parameters: int, units: list[str], head: tuple[int, ...]
) -> None:
    spec = named_spec(name, None, 4)
    exported = export_model(zoo.build(spec), name, spec.input_shape, spec.input_type.dtype, 4)
    assert sum(tensor.numel() for tensor in exported.tensors.values()) == parameters
    assert [unit.name for unit in exported.graph.units] == units
    assert exported.graph.head_shape == head
    assert all(exported.graph.exits)  # of one width: a skip connection is the identity


@pytest.mark.parametrize("name", ["text-transformer", "table-mlp", "table-resnet"])
def test_models_of_rows_take_no_images(name: str) -> None:
    with pytest.raises(ModelError, match=r"takes .*the job has float of \(3, 32, 32\)\. Give the job a \[t"):
        zoo.build(spec_of(name))


@pytest.mark.parametrize("name", sorted(PARAMETERS))
@pytest.mark.parametrize(("channels", "classes"), [(1, 3), (4, 7)])
def test_models_adapt_to_channels_and_classes(name: str, channels: int, classes: int) -> None:
    spec = spec_of(name, channels, classes=classes)
    model = zoo.build(spec).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, channels, 32, 32)).shape == (2, classes)


def test_every_name_of_the_zoo_builds() -> None:
    for name in ZOO:
        images = len(ZOO[name].input_shape) == 3
        assert isinstance(zoo.build(spec_of(name, size=64) if images else named_spec(name, None, 10)), nn.Module)
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


def test_custom_models_get_the_spec_if_they_take_one() -> None:
    assert isinstance(zoo.build(spec_of(f"{__name__}:custom_model")), nn.Sequential)
    built = zoo.build(spec_of(f"{__name__}:custom_model_of_spec", classes=5))
    assert isinstance(built, nn.Linear)
    assert (built.in_features, built.out_features) == (5, 3)


@pytest.mark.parametrize(
    ("name", "size"), [("torchvision:squeezenet1_1", 64), ("torchvision:vit_b_32", 32), ("timm:lcnet_050", 32)]
)
def test_classifiers_of_libraries_adapt_to_the_job(name: str, size: int) -> None:
    model = zoo.build(spec_of(name, channels=1, size=size, classes=3)).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 1, size, size)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet19", "torchvision has no classifier 'resnet19'; it has alexnet"),
        ("timm:resnet19", "timm has no model 'resnet19'"),
    ],
)
def test_what_a_library_does_not_have_is_told(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        zoo.build(spec_of(name))


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
def test_what_is_wrong_with_an_custom_model_is_told(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        zoo.build(spec_of(name))


def test_running_a_graph_loads_no_heavy_modules(tmp_path: Path) -> None:
    """Each of them is over 100 MiB that a small device would lose."""
    spec = spec_of("preresnet20", size=16)
    exported = export_model(zoo.build(spec), "preresnet20", spec.input_shape, "F32", 10)
    (tmp_path / "graph").write_bytes(encode(exported.graph))
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from fedepth.models.graph import decode\n"
        "from fedepth.models.run import DTYPES, Model\n"
        f"model = Model(decode(Path({str(tmp_path / 'graph')!r}).read_bytes()))\n"
        "tensors = model.graph.tensors\n"
        "model.load(lambda n: torch.ones(tensors[n][1], dtype=DTYPES[tensors[n][0]]), trainable=False)\n"
        "model(torch.zeros(2, 3, 16, 16))\n"
        "heavy = {'torchvision', 'torch._dynamo', 'sympy'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_module_of_a_custom_model_is_looked_for_in_the_folder_of_the_job_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, width in (("jobs", 3), ("elsewhere", 5)):
        (tmp_path / place).mkdir()
        code = f"from torch import nn\n\n\ndef build():\n    return nn.Linear(4, {width})\n"
        (tmp_path / place / "model_beside_a_job.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    before = list(sys.path)
    model = zoo.build(spec_of("model_beside_a_job:build"), tmp_path / "jobs")
    assert isinstance(model, nn.Linear)
    assert model.out_features == 3
    assert sys.path == before
    with pytest.raises(ModelError, match=rf"it is looked for in {tmp_path} and where Python looks"):
        zoo.build(spec_of("no_such_module:build"), tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "width", "channels"),
    [
        ("preresnet20", (3, 32, 32), Fraction(1, 6), [3, 6, 11]),
        ("preresnet20", (3, 32, 32), Fraction(2), [32, 64, 128]),
        ("digits-cnn", (1, 8, 8), Fraction(1, 6), [2, 6, 11]),
        ("digits-cnn", (1, 8, 8), Fraction(1, 1000), [1]),
        ("preresnet20", (3, 32, 32), Fraction(1, 1000), [1]),
    ],
)
def test_a_model_of_another_width_has_that_share_of_the_channels(
    name: str, shape: tuple[int, ...], width: Fraction, channels: list[int]
) -> None:
    spec = ModelSpec(name, ("a", "b"), shape, (0.5,) * shape[0], (0.5,) * shape[0])
    model = zoo.build_width(spec, width)
    found = {module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)}
    assert sorted(found) == channels
    assert model(torch.zeros(2, *shape)).shape == (2, 2)


def test_the_width_of_a_model_is_one_and_others_have_none() -> None:
    spec = ModelSpec("preresnet20", ("a", "b"), (3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    shapes = {name: tensor.shape for name, tensor in zoo.build(spec).state_dict().items()}
    assert {name: tensor.shape for name, tensor in zoo.build_width(spec, Fraction(1)).state_dict().items()} == shapes
    other = ModelSpec("resnet18", ("a", "b"), (3, 64, 64), (0.5,) * 3, (0.5,) * 3)
    assert zoo.has_width(spec) and not zoo.has_width(other)
    with pytest.raises(ModelError, match="'resnet18' has no setting for its width; digits-cnn, preresnet20 have"):
        zoo.build_width(other, Fraction(1, 2))
