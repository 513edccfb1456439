import weakref
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
import torch
from torch import nn

from fedepth.errors import ModelError
from fedepth.estimate.tracing import trace_costs
from fedepth.layout import ModelLayout
from fedepth.models import zoo
from fedepth.models.split import SplitModel, Unit, assign, release, split, split_spec
from fedepth.task import ModelSpec, TrainingSpec

TRAINING = TrainingSpec(16, 1, "sgd", 0.1, 0.9, 0.0, 0.0, "none", 1)
UNITS = {"digits-cnn": 6, "preresnet20": 10, "resnet18": 9, "mobilenet-v3-small": 13, "vit-tiny": 13}
HEADS = {
    "digits-cnn": ("head.2.weight", "head.2.bias"),
    "resnet18": ("fc.weight", "fc.bias"),
    "vit-tiny": ("encoder.ln.weight", "encoder.ln.bias", "heads.head.weight", "heads.head.bias"),
}


def spec_of(name: str) -> ModelSpec:
    return ModelSpec(name, tuple("abcdefghij"), (3, 32, 32), (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("name", sorted(UNITS))
def test_the_units_in_order_are_the_model(name: str) -> None:
    torch.manual_seed(0)
    split_model = split_spec(spec_of(name), device="cpu")
    split_model.model.eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(split_model(x), split_model.model(x), rtol=1e-5, atol=1e-5)
    assert len(split_model.units) == UNITS[name]


@pytest.mark.parametrize("name", sorted(UNITS))
def test_every_tensor_belongs_to_one_unit_under_its_own_name(name: str) -> None:
    split_model = split_spec(spec_of(name))
    names = [n for unit in (*split_model.units, split_model.head) for n in unit.tensor_names]
    state = split_model.model.state_dict()
    assert sorted(names) == sorted(state)
    layout = split_model.layout()
    assert {t.name: t.shape for t in layout.tensors} == {n: tuple(t.shape) for n, t in state.items()}
    assert layout.size_bytes == sum(t.nbytes for t in state.values())


@pytest.mark.parametrize("name", sorted(HEADS))
def test_heads_hold_what_the_architecture_says(name: str) -> None:
    assert split_spec(spec_of(name)).head.tensor_names == HEADS[name]


def test_the_embeddings_of_a_vit_are_its_first_unit() -> None:
    first = split_spec(spec_of("vit-tiny")).units[0].tensor_names
    assert {"class_token", "conv_proj.weight", "conv_proj.bias", "encoder.pos_embedding"} == set(first)
    assert not any("encoder_layer_1." in name for name in first)


def test_dtypes_are_named_as_in_safetensors() -> None:
    infos = split_spec(spec_of("preresnet20")).layout().by_name
    assert infos["blocks.0.norm1.num_batches_tracked"].dtype == "I64"
    assert infos["blocks.0.norm1.num_batches_tracked"].shape == ()
    assert infos["stem.weight"].dtype == "F32"


def test_a_layout_survives_json() -> None:
    layout = split_spec(spec_of("preresnet20")).layout()
    assert msgspec.json.decode(msgspec.json.encode(layout), type=ModelLayout) == layout
    assert layout.trained_tensors((1,)) == layout.units[1].tensors + layout.head


@pytest.mark.parametrize("name", sorted(UNITS))
def test_shapes_are_those_of_the_forward_pass(name: str) -> None:
    split_model = split_spec(spec_of(name), device="cpu")
    split_model.model.eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for unit, shape, output_shape in zip(
            split_model.units, split_model.input_shapes, split_model.output_shapes, strict=True
        ):
            assert x.shape[1:] == shape
            x = unit(x)
            assert x.shape[1:] == output_shape
    assert split_model.head_shape == x.shape[1:]


def test_finding_the_shapes_changes_neither_weights_nor_modes_nor_meta() -> None:
    split_model = split_spec(spec_of("preresnet20"))
    assert all(tensor.is_meta for tensor in split_model.model.state_dict().values())
    real = split_spec(spec_of("preresnet20"), device="cpu").model
    assert real.training
    assert all(module.training for module in real.modules())
    assert real.get_buffer("blocks.0.norm1.num_batches_tracked").item() == 0


def fill(split_model: SplitModel, state: dict[str, torch.Tensor], units: list[int]) -> None:
    for index in units:
        for name in split_model.units[index].tensor_names:
            assign(split_model, name, state[name], requires_grad=True)


def test_assigned_units_compute_while_the_others_have_no_memory() -> None:
    torch.manual_seed(0)
    whole = split_spec(spec_of("preresnet20"), device="cpu")
    partial = split_spec(spec_of("preresnet20"))
    state = whole.model.state_dict()
    fill(partial, state, [1])
    x = torch.randn(4, 16, 32, 32)
    for unit in (whole.units[1], partial.units[1]):
        unit.train(False)
    torch.testing.assert_close(partial.units[1](x), whole.units[1](x), rtol=0, atol=0)
    held = {name for name, tensor in partial.model.state_dict().items() if not tensor.is_meta}
    assert held == set(partial.units[1].tensor_names)


def test_assign_uses_the_tensor_itself_and_sets_requires_grad() -> None:
    split_model = split_spec(spec_of("digits-cnn"))
    for requires_grad in (True, False):
        bias = torch.ones(10)
        assign(split_model, "head.2.bias", bias, requires_grad)
        parameter = dict(split_model.head.parameters())["head.2.bias"]
        assert parameter.data_ptr() == bias.data_ptr()
        assert parameter.requires_grad is requires_grad


def test_release_gives_the_memory_of_weights_and_gradients_back() -> None:
    split_model = split_spec(spec_of("preresnet20"))
    fill(split_model, split_spec(spec_of("preresnet20"), device="cpu").model.state_dict(), [0])
    unit = split_model.units[0]
    unit(torch.randn(1, 3, 32, 32)).sum().backward()
    parameter = unit.parameters()[0][1]
    assert parameter.grad is not None
    gone = [weakref.ref(parameter), weakref.ref(parameter.grad)]
    del parameter
    release(unit)
    assert [reference() for reference in gone] == [None, None]
    assert all(tensor.is_meta for _, tensor in unit.parameters())


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("head.2.bias", torch.zeros(9), r"\(9,\).*\(10,\).*other classes"),
        ("head.2.bias", torch.zeros(10, dtype=torch.float64), "float64.*float32"),
        ("head.2.scale", torch.zeros(1), "no tensor 'head.2.scale'"),
        ("tail.weight", torch.zeros(1), "no tensor 'tail.weight'"),
    ],
)
def test_assign_refuses_what_does_not_fit(name: str, tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        assign(split_spec(spec_of("digits-cnn")), name, tensor, requires_grad=True)


def test_training_mode_is_set_unit_by_unit() -> None:
    split_model = split_spec(spec_of("preresnet20"), device="cpu")
    unit = split_model.units[1]
    before = [buffer.clone() for _, buffer in unit.buffers()]
    x = torch.randn(4, 16, 32, 32)
    unit.train(False)
    unit(x)
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, unit.buffers(), strict=True))
    assert split_model.units[2].modules[0].training
    unit.train(True)
    unit(x)
    assert not all(torch.equal(a, b) for a, (_, b) in zip(before, unit.buffers(), strict=True))


class NonPersistent(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10))
        self.register_buffer("grid", torch.zeros(3), persistent=False)


class Tied(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 10))
        first, second = self[0], self[1]
        assert isinstance(first, nn.Conv2d)
        assert isinstance(second, nn.Conv2d)
        second.weight = first.weight


class Orphan(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (NonPersistent, "non-persistent buffers.*grid"),
        (Tied, "0.weight = 1.weight"),
        (Orphan, r"scale \(none\)"),
    ],
)
def test_tensors_that_cannot_travel_by_unit_are_named(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        split(build(), "mine", (3, 8, 8))


def test_an_input_shape_that_the_units_cannot_take_is_told() -> None:
    with pytest.raises(ModelError, match=r"conv1 cannot take.*input_shape"):
        split(zoo.build(spec_of("resnet18")), "resnet18", (1, 32, 32))


def test_a_meta_model_without_pattern_needs_a_factory() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

    with torch.device("meta"):
        model = build()
    with pytest.raises(ModelError, match="no factory"):
        split(model, "mine", (3, 8, 8))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    split_model = split(model, "mine", (3, 8, 8), factory=build)
    assert [unit.paths for unit in split_model.units] == [("0",)] and split_model.head.paths == ("1", "2", "3")
    assert all(parameter.is_meta for parameter in split_model.model.parameters())
    torch.manual_seed(5)
    split(model, "mine", (3, 8, 8), factory=build)
    assert torch.equal(torch.rand(1), expected)


def only_on_meta() -> nn.Module:
    if torch.empty(0).device.type != "meta":
        raise MemoryError("all of the model was asked for")
    return small_model()


def small_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )


def test_with_its_costs_a_model_of_ones_own_is_split_without_being_built() -> None:
    spec = spec_of(f"{__name__}:small_model")
    costs = trace_costs(spec, TRAINING)
    assert [unit.steps for unit in costs.units] == [("0",), ("1",)]
    assert [unit.exit and unit.exit.steps for unit in costs.units] == [("2", "3", "4")] * 2
    split_model = split_spec(replace(spec, name=f"{__name__}:only_on_meta"), costs=costs)
    assert split_model.layout() == split_spec(spec).layout()
    assert all(parameter.is_meta for parameter in split_model.model.parameters())


@pytest.mark.parametrize(
    ("units", "head", "message"),
    [
        ((("0",), ("conv9",)), ("2", "3", "4"), "it has no conv9.*same version"),
        ((("0",), ("1", "@other")), ("2", "3", "4"), "it has no @other"),
        ((("0",), ()), ("2", "3", "4"), "not every unit has a step"),
        ((("0",), ("1",)), (), "not every unit has a step"),
        ((("0",),), ("2", "3", "4"), r"1.weight \(none\)"),
        ((("0",), ("1", "0")), ("2", "3", "4"), r"0.weight \(0, 1\)"),
    ],
)
def test_costs_of_another_model_are_told(
    units: tuple[tuple[str, ...], ...], head: tuple[str, ...], message: str
) -> None:
    spec = spec_of(f"{__name__}:small_model")
    costs = trace_costs(spec, TRAINING)
    unit, exit_ = costs.units[0], replace(costs.head, steps=head)
    other = replace(costs, units=tuple(replace(unit, steps=steps, exit=exit_) for steps in units))
    with pytest.raises(ModelError, match=message):
        split_spec(spec, costs=other)
    with pytest.raises(ModelError, match="not every unit has a step"):
        split_spec(spec, costs=replace(costs, units=(replace(unit, exit=None),)))


def test_shapes_come_from_the_costs_and_no_unit_is_run_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("resnet18")
    costs = trace_costs(spec, TRAINING)
    expected = split_spec(spec)

    def run(*_: object) -> None:
        raise AssertionError("a unit was run")

    monkeypatch.setattr(Unit, "__call__", run)
    split_model = split_spec(spec, costs=costs)
    assert split_model.input_shapes == expected.input_shapes
    assert split_model.output_shapes == expected.output_shapes
    assert split_model.head_shape == expected.head_shape == (512, 1, 1)


def test_costs_of_other_shapes_are_told() -> None:
    spec = spec_of("preresnet20")
    costs = trace_costs(spec, TRAINING)
    with pytest.raises(ModelError, match=r"takes images of \(3, 64, 64\), and its costs were traced for \(3, 32, 32\)"):
        split_spec(replace(spec, input_shape=(3, 64, 64)), costs=costs)
    third = replace(costs.units[2], input_shape=(16, 32, 33))
    with pytest.raises(ModelError, match=r"do not fit the shapes of the inputs of blocks\.1"):
        split_spec(spec, costs=replace(costs, units=(*costs.units[:2], third, *costs.units[3:])))
