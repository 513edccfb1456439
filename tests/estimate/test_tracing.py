import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedepth.costs import Convolution, ModelCosts, PassCost, Size, UnitCost
from fedepth.estimate.tracing import Convolving, _beside, _convolutions, _running, line, trace_block, trace_costs
from fedepth.models import zoo
from fedepth.models.export import export_model
from fedepth.models.graph import Graph
from fedepth.task import ModelSpec

BATCH = 64
FLOAT = 4
SIDE = 8
VIT, MOBILENET = f"{__name__}:short_vit", f"{__name__}:short_mobilenet"


def short_vit(spec: ModelSpec) -> nn.Module:
    """vit-tiny with two of its twelve layers, which are alike: all of them take five times as long."""
    return zoo._vit(spec, patch=4, width=192, depth=2, heads=3)


def spec_of(name: str, size: int = 32) -> ModelSpec:
    return ModelSpec(name, tuple("abcdefghij"), (3, size, size), (0.5,) * 3, (0.5,) * 3)


@functools.cache
def graph_of(name: str, size: int = 32) -> Graph:
    spec = spec_of(name, size)
    return export_model(zoo.build(spec), name, spec.input_shape, "F32", len(spec.classes)).graph


@functools.cache
def costs_of(name: str, size: int = 32) -> ModelCosts:
    return trace_costs(graph_of(name, size), name, BATCH)


def short_mobilenet() -> nn.Module:
    """A MobileNetV3 with every kind of block that mobilenet-v3-small has, down to one pixel."""
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    kinds = (
        (16, 3, 16, 16, True, "RE", 2),
        (16, 3, 72, 24, False, "RE", 2),
        (24, 5, 96, 40, True, "HS", 2),
        (40, 5, 120, 48, True, "HS", 2),
    )
    return MobileNetV3([InvertedResidualConfig(*kind, 1, 1.0) for kind in kinds], 128, num_classes=10)


def two_units() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def leading_in_place() -> nn.Module:
    return nn.Sequential(
        nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )


def map_bytes(channels: int) -> int:
    return channels * SIDE * SIDE * FLOAT


def test_a_unit_by_hand() -> None:
    costs = costs_of(f"{__name__}:two_units", SIDE)
    first, second = costs.units
    assert (first.name, second.name) == ("0", "2")
    assert first.parameter_bytes == (3 * 4 * 9 + 4) * FLOAT
    assert first.largest_parameter_bytes == 3 * 4 * 9 * FLOAT
    assert first.input_bytes == costs.input_bytes == map_bytes(3)
    assert costs.raw_input_bytes == 3 * SIDE * SIDE
    assert first.output_bytes == second.input_bytes == map_bytes(4)
    # The convolution keeps its input; the ReLU keeps its result, which is the unit's output. In the graph it does not
    # work in place, so that for a moment the convolution's output lives beside it.
    assert first.training.saves_input and first.training.saves_output
    assert first.training.saved == Size(0, map_bytes(4))
    assert first.training.forward.peak == Size(0, map_bytes(4))
    assert first.inference.peak == Size(0, map_bytes(4))
    # The gradient of the output, and beside it the gradient behind the ReLU.
    assert first.training.backward.peak == Size(0, 2 * map_bytes(4))
    # It trains in channels_last. Beside the input there is its output; backwards the gradient in front of the ReLU,
    # which is through and keeps nothing any more, and that of the input, if anybody wants it.
    weights = 3 * 4 * 9 * FLOAT
    one = Convolution(weights, 0, reordered=Size(0, 0), living=Size(0, map_bytes(4)))
    both = replace(one, living=Size(0, map_bytes(4) + map_bytes(3)))
    assert first.training.forward.convolutions == first.inference.convolutions == (one,)
    assert first.training.backward.convolutions == (both,)
    assert first.backward_first.convolutions == (one,)
    assert first.frozen is None  # nothing comes before it, so that no block is trained through it
    assert first.flops == 2 * 3 * 4 * 9 * SIDE * SIDE
    # A convolution keeps nothing but its input; backward holds the gradients of its output and of its input.
    assert second.training.saves_input and not second.training.saves_output
    assert second.training.saved == Size(0, 0)
    # Frozen it costs the same: torch's convolution keeps its input, whichever gradient is wanted.
    assert second.frozen == second.training
    assert second.training.backward.peak == Size(0, map_bytes(8) + map_bytes(4))
    assert second.backward_first.peak == Size(0, map_bytes(8))  # at a block's start nobody wants its input's gradient


def patches_then_convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 2, stride=2),  # patches: no model in channels_last
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    )


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1, groups=3),
        nn.Conv2d(3, 3, 5, padding=2, groups=3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 10),
    )


class BehindANorm(nn.Module):
    """A wide depth-wise convolution that gets maps in channels_last, in a model that does not train in it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 2, stride=2)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 4)
        self.wide = nn.Conv2d(4, 4, 5, padding=2, groups=4)
        self.head = nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.norm(self.patches(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.head(self.wide(x).mean((2, 3)))  # type: ignore[no-any-return]


def test_a_convolution_runs_in_the_layout_that_its_input_has() -> None:
    costs = costs_of(f"{__name__}:BehindANorm", SIDE)
    wide = costs.units[-1]
    inside, first = wide.training.backward.convolutions, wide.backward_first.convolutions
    assert [each.depthwise_bytes for each in inside] == [4 * 25 * FLOAT]
    assert [each.reordered for each in inside] == [Size(0, 0)]
    # At a block's start the input comes from a cache, in the memory format of the model.
    assert [each.depthwise_bytes for each in first] == [0]


class TwoAlike(nn.Module):
    """Two units of one program: the second gets maps in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 2, stride=2)
        self.one = nn.Conv2d(4, 4, 5, padding=2, groups=4)
        self.mix = nn.Linear(4, 4)
        self.other = nn.Conv2d(4, 4, 5, padding=2, groups=4)
        self.head = nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.one(self.patches(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(self.other(x).mean((2, 3)))  # type: ignore[no-any-return]


def test_units_of_one_program_are_of_two_kinds_if_their_inputs_lie_otherwise() -> None:
    units = {unit.name: unit for unit in costs_of(f"{__name__}:TwoAlike", SIDE).units}
    assert len(units) == 4
    padded = [units[name].training.backward.convolutions[0].depthwise_bytes for name in ("one", "other")]
    assert padded == [0, 4 * 25 * FLOAT]


def test_an_lstm_keeps_its_gates_and_one_state_of_every_step() -> None:
    steps, samples, width = 7, 5, 24
    lstm = nn.LSTM(8, width)
    states = torch.zeros(1, samples, width), torch.zeros(1, samples, width)
    weights = lstm._flat_weights
    for training in (True, False):
        arguments = (
            torch.zeros(steps, samples, 8),
            *weights,
            *states,
            False,
            [],
            2,
            width,
            1,
            True,
            False,
            False,
            training,
        )
        result = torch.ops.aten.mkldnn_rnn_layer(*arguments)
        kept, scratch = _beside(torch.ops.aten.mkldnn_rnn_layer.default, arguments, result)
        assert kept == (5 * width * steps * samples * FLOAT if training else 0)
        assert scratch == 4 * width * (steps * samples + 8 + width + 2) * FLOAT  # two biases


@pytest.mark.parametrize(
    ("window", "stride", "side", "padded"),
    [
        *((3, 1, 3, False), (3, 1, 2, True), (3, 1, 1, True)),
        *((3, 2, 4, False), (3, 2, 3, True), (3, 2, 2, True)),
        *((5, 1, 14, True), (5, 2, 3, True), (7, 1, 8, True)),
    ],
)
def test_the_gradient_of_depthwise_weights_is_padded_for_wide_windows_and_for_small_maps(
    window: int, stride: int, side: int, padded: bool
) -> None:
    x = torch.zeros(2, 8, side, side).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(8, 1, window, window)
    parameters = [stride] * 2, [window // 2] * 2, [1, 1], False, [0, 0], 8
    y = torch.ops.aten.convolution(x, weight, None, *parameters)
    for wanted in ([True, True, False], [True, False, False]):
        arguments = (y, x, weight, [0], *parameters, wanted)
        found = _running(torch.ops.aten.convolution_backward.default, arguments, None)
        assert found.pads_gradient == (padded and wanted[1])
    forward = _running(torch.ops.aten.convolution.default, (x, weight, None, *parameters), y)
    assert not forward.pads_gradient


def passes(unit: UnitCost) -> tuple[PassCost, ...]:
    return unit.training.forward, unit.training.backward, unit.inference


def test_what_kernels_copy_is_counted_by_hand() -> None:
    units = costs_of(f"{__name__}:patches_then_convolution", SIDE).units
    ((patches,), (narrow,)) = (each.training.forward.convolutions for each in units)
    assert [each.weight_bytes + each.depthwise_bytes for each in (patches, narrow)] == [0, 0]
    half = map_bytes(4) // 4  # the maps behind the patches have half the side
    assert patches.reordered == Size(4 * 3 * 4 * FLOAT, map_bytes(3) + half)
    assert narrow.reordered == Size(4 * 9 * FLOAT, 2 * half)
    units = costs_of(f"{__name__}:depthwise", SIDE).units
    # Only the gradient of the weights is padded.
    for narrow_pass, wide_pass, padded in zip(*(passes(each) for each in units), (False, True, False), strict=True):
        ((narrow,), (wide,)) = narrow_pass.convolutions, wide_pass.convolutions
        assert [each.weight_bytes for each in (narrow, wide)] == [3 * 9 * FLOAT, 3 * 25 * FLOAT]
        assert [each.depthwise_bytes for each in (narrow, wide)] == [0, 3 * 25 * FLOAT if padded else 0]
        assert narrow.reordered == wide.reordered == Size(0, 0)


def test_a_convolution_that_another_outweighs_is_left_out() -> None:
    def traced(samples: int, *sizes: tuple[int, int]) -> tuple[Convolving, ...]:
        return tuple(Convolving(living * samples, weights, 0, True, False) for living, weights in sizes)

    small, large = (traced(batch, (100, 8), (50, 9), (40, 8), (100, 8)) for batch in (2, 16))
    # Of four the first lives with most, the second copies most; the others do neither.
    found = _convolutions((2, 16), (small, large))
    assert [(each.weight_bytes, each.living) for each in found] == [(8, Size(0, 100)), (9, Size(0, 50))]


def test_buffers_and_parameters_are_counted_apart() -> None:
    stem, block = costs_of("preresnet20").units[:2]
    assert stem.buffer_bytes == 0
    assert block.parameter_bytes == (2 * 16 * 16 * 9 + 4 * 16) * FLOAT
    assert block.buffer_bytes == 2 * (2 * 16 * FLOAT + 8)


def test_a_frozen_unit_keeps_nothing_for_gradients_of_its_weights() -> None:
    linear = costs_of("digits-cnn").head
    assert linear.frozen is None  # an exit is trained with every block
    unit = costs_of(VIT).units[1]
    assert unit.frozen is not None
    assert unit.frozen.saved.per_sample < unit.training.saved.per_sample


def test_every_exit_holds_the_same_head_behind_its_own_skip() -> None:
    costs = costs_of("digits-cnn")
    exits = [unit.exit for unit in costs.units if unit.exit]
    assert len(exits) == len(costs.units)
    assert {exit_.parameter_bytes for exit_ in exits} == {(64 * 16 * 10 + 10) * FLOAT}
    for unit, exit_ in zip(costs.units, exits, strict=True):
        assert exit_.input_bytes == unit.output_bytes
        assert exit_.output_bytes == 0
    # Padding channels makes a new feature map, which the last unit's exit need not.
    assert exits[0].inference.peak.per_sample > exits[-1].inference.peak.per_sample
    assert costs.head.flops == 2 * 64 * 16 * 10


def composed_saved(costs: ModelCosts, samples: int) -> int:
    """What lives after the forward pass of all units and the last exit, put together from their costs."""
    steps = (*costs.units, costs.head)
    saved = sum(step.training.saved.at(samples) for step in steps)
    between = sum(
        unit.output_bytes * samples
        for unit, follower in zip(costs.units, steps[1:], strict=True)
        if follower.training.saves_input and not unit.training.saves_output
    )
    return saved + between


def composed_peak(costs: ModelCosts, samples: int) -> int:
    """The worst moment of forward and backward, put together from the costs of units."""
    steps = (*costs.units, costs.head)
    held, peak, after = 0, 0, []
    for index, step in enumerate(steps):
        output = 0 if step.training.saves_output else step.output_bytes * samples
        peak = max(peak, held + step.training.saved.at(samples) + output + step.training.forward.peak.at(samples))
        kept = index + 1 < len(steps) and steps[index + 1].training.saves_input
        held += step.training.saved.at(samples)
        after.append(held)  # what the follower kept of the output is free again when backward comes here
        held += output if kept else 0
    backward = max(h + step.training.backward.peak.at(samples) for h, step in zip(after, steps, strict=True))
    return max(peak, backward)


@pytest.mark.parametrize("name", ["digits-cnn", "preresnet20", "resnet18", VIT])
@pytest.mark.parametrize("samples", [3, 32, 64])
def test_units_compose_to_the_whole_model(name: str, samples: int) -> None:
    costs = costs_of(name)
    whole = trace_block(graph_of(name), 0, len(costs.units) - 1, samples)
    assert composed_saved(costs, samples) == pytest.approx(whole.saved, rel=0.01)
    peak = whole.saved + max(whole.forward, whole.backward)
    assert composed_peak(costs, samples) == pytest.approx(peak, rel=0.02)


def test_a_block_in_the_middle_composes_too() -> None:
    costs = costs_of("preresnet20")
    middle = ModelCosts("middle", costs.units[4:7], 0, 0, 1)
    whole = trace_block(graph_of("preresnet20"), 4, 6, 32)
    peak = whole.saved + max(whole.forward, whole.backward)
    assert composed_peak(middle, 32) == pytest.approx(peak, rel=0.02)


def test_lines_are_never_below_a_trace_up_to_the_jobs_batch() -> None:
    costs = costs_of(MOBILENET)
    for samples in (33, 64):
        whole = trace_block(graph_of(MOBILENET), 0, len(costs.units) - 1, samples)
        assert composed_saved(costs, samples) >= whole.saved


@pytest.mark.parametrize(
    ("name", "smallest"),
    [("digits-cnn", 1), ("preresnet20", 1), ("resnet18", 2), (MOBILENET, 2), (VIT, 1)],
)
def test_the_smallest_micro_batch_is_what_batch_norm_can_take(name: str, smallest: int) -> None:
    spec = spec_of(name)
    assert costs_of(name).smallest_micro_batch == smallest
    model = zoo.build(spec).train()
    if smallest == 1:
        model(torch.zeros(1, *spec.input_shape))
    else:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(torch.zeros(1, *spec.input_shape))


def test_a_unit_that_changes_its_input_can_be_traced() -> None:
    costs = costs_of(f"{__name__}:leading_in_place", SIDE)
    assert [unit.name for unit in costs.units] == ["1"]


def embedding_then_tokens() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 4, stride=4),
        nn.Flatten(2),
        nn.Linear(4, 6),
        nn.ReLU(),
        nn.LayerNorm(6),
        nn.Linear(6, 6),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    )


def test_a_unit_without_a_skip_connection_has_no_exit() -> None:
    costs = costs_of(f"{__name__}:embedding_then_tokens", SIDE)
    assert costs.units[0].exit is None  # maps cannot become tokens
    assert all(unit.exit is not None for unit in costs.units[1:])


def frozen_first() -> nn.Module:
    model = two_units()
    for parameter in list(model.parameters())[:2]:
        parameter.requires_grad_(False)
    return model


def test_frozen_parameters_are_loaded_and_cost_nothing_else() -> None:
    first, second = costs_of(f"{__name__}:frozen_first", SIDE).units
    weights = (3 * 4 * 9 + 4) * FLOAT
    assert (first.parameter_bytes, first.largest_parameter_bytes, first.fixed_bytes) == (0, 0, weights)
    assert first.loaded_bytes == weights
    assert (second.fixed_bytes, second.parameter_bytes) == (0, (4 * 8 * 9 + 8) * FLOAT)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((8, 24), Size(0, 2)),
        ((10, 26), Size(2, 2)),
        ((10, 27), Size(0, 3)),
        ((8, 8), Size(8, 0)),
        ((9, 7), Size(9, 0)),
        ((0, 1), Size(0, 1)),
        ((0, 0), Size(0, 0)),
    ],
)
def test_lines_are_integers_at_or_above_both_points(sizes: tuple[int, int], expected: Size) -> None:
    batches = (4, 12)
    size = line(batches, sizes)
    assert all(size.at(batch) >= measured for batch, measured in zip(batches, sizes, strict=True))
    assert size.fixed >= 0
    assert size == expected


def test_every_parameter_of_a_model_is_counted_once() -> None:
    costs = costs_of(VIT)
    parameters = sum(each.numel() for each in zoo.build(spec_of(VIT)).parameters())
    assert sum(unit.parameter_bytes for unit in costs.units) + costs.head.parameter_bytes == parameters * FLOAT
