"""Models as people write them, as graphs: exact, and refused where a graph cannot hold them."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from benchmarks import custom_models
from fedepth.errors import ModelError
from fedepth.models.export import Exported, export_model
from fedepth.models.graph import (
    Argument,
    DType,
    MemoryFormat,
    Number,
    Operation,
    Program,
    Unit,
    Value,
    decode,
    encode,
)
from fedepth.models.operators import CREATION, OPERATORS
from fedepth.models.run import RunnableUnit
from fedepth.models.verify import one_thread, verify
from fedepth.training.trial_step import try_one_step
from tests.models.module_and_graph import difference_of_steps

KEPT = (
    *("mlp", "batch_norm_cnn", "TextEncoder", "Gpt", "LstmClassifier", "FunctionalDropout", "ModeBranch"),
    *("InPlaceSlices", "StochasticDepth", "InPlaceActivations", "spectral", "Tied", "frozen_backbone"),
    *("PlainTensor", "Counter", "replaced_forward", "Viewing", "SliceStatistics", "AssignedStatistics", "LinearProbe"),
    *("SmallVocabulary", "ModeConstants", "DoubleBuffer", "SpreadMask", "NoAutocast", "NormHeldDown"),
    *("PlainCounter", "TwinStatistics", "BlurredStem"),
)


@dataclass(frozen=True)
class Pair:
    module: nn.Module
    exported: Exported


@functools.cache
def pair(name: str) -> Pair:
    torch.manual_seed(0)
    module = getattr(custom_models, name)()
    shape, kind = custom_models.KEPT.get(name, ((3, 16, 16), "float"))
    dtype = "I64" if kind == "tokens" else "F32"
    return Pair(module, export_model(module, name, shape, dtype, custom_models.CLASSES))


@pytest.mark.parametrize("name", KEPT)
def test_a_graph_is_its_module(name: str) -> None:
    both = pair(name)
    assert decode(encode(both.exported.graph)) == both.exported.graph
    assert verify(both.module, both.exported, name) == 0.0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", KEPT)
def test_it_is_so_with_other_weights_and_batches(name: str, training: bool) -> None:
    """Judged without the code of the proof."""
    both = pair(name)
    for batch in (2, 7):
        assert difference_of_steps(both.module, both.exported, batch, training=training) < 1e-5


COUNTER = itertools.count()


@pytest.mark.parametrize("name", KEPT)
def test_its_units_train_one_by_one_and_checkpointed(name: str) -> None:
    exported = pair(name).exported
    samples = max(3, exported.graph.smallest_micro_batch)
    try_one_step(exported.graph, exported.tensors, exported.examples(samples))


@pytest.mark.parametrize("name", ["SliceStatistics", "AssignedStatistics", "Counter"])
def test_a_buffer_that_training_writes_in_any_way_is_in_the_update(name: str) -> None:
    exported = pair(name).exported
    buffers = {each for each, _ in pair(name).module.named_buffers()}
    pieces = (*exported.graph.units, exported.graph.head)
    assert {each for piece in pieces for each in piece.written} == buffers
    # No other piece has a copy of its own, be it in one mode only.
    assert not buffers & {each for piece in pieces for each in piece.fixed}
    assert buffers <= exported.graph.layout().by_name.keys()


class Chance(nn.Module):
    """Its results differ from run to run by about `size`, as those of some kernels do on several threads."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size
        self.linear = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * (1 + self.size * (next(COUNTER) % 3))  # type: ignore[no-any-return]


class Threads(nn.Module):
    """What it gives depends on torch's number of threads, as the order of a sum does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(x)
        return found if torch.get_num_threads() == 1 else found * (1 + next(COUNTER) % 3)


def test_a_model_is_compared_on_one_thread_and_the_others_come_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        module = Threads()
        with one_thread():
            exported = export_model(module, "threads", (6,), "F32", 10)
        assert verify(module, exported, "threads") == 0.0
        try_one_step(exported.graph, exported.tensors, exported.examples(3))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_auxiliary_output_and_its_dropout_are_left_out() -> None:
    torch.manual_seed(0)
    module = custom_models.AuxiliaryDropout()
    exported = export_model(module, "auxiliary", (3, 16, 16), "F32", custom_models.CLASSES)
    assert verify(module, exported, "auxiliary") == 0.0
    assert [each.p for each in module.modules() if isinstance(each, nn.Dropout)] == [0.5, 0.3]  # as its author wrote it
    assert not any(name.startswith("auxiliary") for name in exported.graph.tensors)
    assert any("first is taken" in note for note in exported.graph.notes)


def test_rounding_that_differs_from_run_to_run_is_no_disagreement() -> None:
    module = Chance(1e-6)
    assert verify(module, export_model(module, "rounding", (6,), "F32", 10), "rounding") < 1e-5
    module = Chance(1e-2)
    with pytest.raises(ModelError, match="is not deterministic"):
        verify(module, export_model(module, "chance", (6,), "F32", 10), "chance")


@pytest.mark.parametrize("name", custom_models.REFUSED)
def test_what_a_graph_cannot_hold_is_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        both = pair(name)
        verify(both.module, both.exported, name)
    message = str(caught.value)
    assert custom_models.REFUSED[name] in message
    assert len(message) < 700 and "def forward" not in message


def test_units_are_cut_where_one_tensor_is_alive() -> None:
    graph = pair("batch_norm_cnn").exported.graph
    assert [unit.name for unit in graph.units] == ["0", "3", "7"]
    assert [unit.input_shape for unit in graph.units] == [(3, 16, 16), (8, 16, 16), (16, 8, 8)]
    assert (graph.head.name, graph.head_shape) == ("12", (16, 8, 8))
    assert graph.units[0].written == ("1.num_batches_tracked", "1.running_mean", "1.running_var")
    assert graph.exits == (True, True, True)


def test_masks_from_sizes_do_not_stop_a_cut_and_masks_from_ids_do() -> None:
    assert len(pair("Gpt").exported.graph.units) == 8
    assert len(pair("PaddedText").exported.graph.units) == 1


def test_layers_that_share_a_weight_are_one_unit() -> None:
    graph = pair("Tied").exported.graph
    assert [unit.name for unit in graph.units] == ["one", "last"]
    assert "two.weight" not in graph.tensors


class Twice(nn.Module):
    """A convolution that is used on both sides of the last pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.classifier = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.block(self.stem(x).relu()).relu(), 2)
        logits: torch.Tensor = self.classifier(self.block(x).relu().mean((2, 3)))
        return logits


def test_a_weight_on_both_sides_of_a_pooling_stays_in_one_unit() -> None:
    torch.manual_seed(0)
    module = Twice()
    exported = export_model(module, "twice", (1, 8, 8), "F32", 10)
    assert [set(unit.parameters) for unit in exported.graph.units] == [
        {"stem.weight", "stem.bias"},
        {"block.weight", "block.bias"},
    ]
    verify(module, exported, "twice")


def test_frozen_parameters_are_not_part_of_an_update() -> None:
    both = pair("frozen_backbone")
    frozen = {each for each, parameter in both.module.named_parameters() if not parameter.requires_grad}
    assert frozen and frozen <= both.exported.graph.tensors.keys()
    assert not frozen & both.exported.graph.layout().by_name.keys()


def test_a_blocks_end_has_met_the_input() -> None:
    """Behind a Vision Transformer's embedding the class token has met no patch."""
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    module = VisionTransformer(32, 8, 2, 3, 48, 96, num_classes=10)
    graph = export_model(module, "vit", (3, 32, 32), "F32", 10).graph
    assert graph.exits == (False, True, True, True, True)


def test_a_head_is_small_where_a_later_cut_exists() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    graph = export_model(module, "wide", (3, 16, 16), "F32", 10).graph
    assert graph.head.parameters == ("5.bias", "5.weight") or graph.head.parameters == ("5.weight", "5.bias")
    assert [unit.name for unit in graph.units] == ["0", "3"]


def test_to_export_a_model_leaves_its_tensors_as_they_were() -> None:
    module = custom_models.PlainCounter()
    exported = export_model(module, "counter", (3, 16, 16), "F32", custom_models.CLASSES)
    assert float(module.step) == 0.0
    assert [float(tensor) for tensor in exported.tensors.values() if tensor.dim() == 0] == [0.0]


def test_tensors_that_are_equal_at_first_stay_two() -> None:
    graph = pair("TwinStatistics").exported.graph
    assert sum(name not in dict(pair("TwinStatistics").module.named_parameters()) for name in graph.tensors) == 2


def test_two_parameters_in_one_storage_are_refused() -> None:
    """A step of one changes the other, and neither outputs nor gradients show it."""
    module = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 10))
    module[2].weight = nn.Parameter(module[0].weight.data)
    with pytest.raises(ModelError, match=r"0\.weight and 2\.weight of the model shared share memory"):
        export_model(module, "shared", (6,), "F32", 10)


@pytest.mark.parametrize(
    "argument", [DType("F7"), MemoryFormat("diagonal"), Number("many")], ids=["type", "memory format", "number"]
)
def test_an_argument_that_does_not_exist_is_refused(argument: Argument) -> None:
    program = Program((Operation("to.dtype", (Value(0), argument), (1,)),), 1)
    unit = Unit("odd", (), (), (), (3,), program, program)
    with pytest.raises(ModelError, match="unit odd has an argument that does not exist"):
        RunnableUnit(unit)


def test_every_listed_operator_exists_and_is_told_where_to_make_tensors() -> None:
    for name in OPERATORS:
        packet, _, overload = name.partition(".")
        schema = getattr(getattr(torch.ops.aten, packet), overload or "default")._schema
        takes_device = any(argument.name == "device" for argument in schema.arguments)
        makes = not any("Tensor" in str(argument.type) for argument in schema.arguments)
        assert (packet in CREATION or name in CREATION) == (takes_device and makes), name


def test_an_operator_that_is_not_listed_is_refused() -> None:
    program = Program((Operation("from_file", ("/etc/passwd",), (1,)),), 1)
    with pytest.raises(ModelError, match="'from_file', which is not run here"):
        RunnableUnit(Unit("odd", (), (), (), (3,), program, program))
