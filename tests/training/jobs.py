"""Small models, exported once each, and tasks that train them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedepth.costs import ModelCosts
from fedepth.data.idx import write_idx
from fedepth.data.read import open_images
from fedepth.estimate.tracing import trace_costs
from fedepth.files import file_digest
from fedepth.memory.meter import Meter
from fedepth.models import zoo
from fedepth.models.auxiliary import with_auxiliary
from fedepth.models.digits import DigitsCNN
from fedepth.models.export import Exported, export_model
from fedepth.models.fixed_statistics import with_fixed_statistics
from fedepth.models.preresnet import PreResNet
from fedepth.models.run import Model
from fedepth.models.traced import TracedModel, write_traced
from fedepth.plan import CachePlace, PeakComponents, Plan, Policy, Stage
from fedepth.task import Heads, InputType, ModelSpec, PartInfo, StageResult, Task, TrainingSpec
from fedepth.training.context import TrainingContext
from fedepth.training.session import Assignment
from fedepth.training.stages import train
from fedepth.weights import load_numpy, open_weights, save

Tensors = dict[str, npt.NDArray[Any]]
Part = Callable[[torch.Tensor], torch.Tensor]

NOTHING = PeakComponents(0, 0, 0, 0, 0, 0, 0)
ABC = ("a", "b", "c")
SPEC = ModelSpec("digits-cnn", ABC, (1, 8, 8), (0.5,), (0.5,))
PRERESNET = ModelSpec("preresnet20", ABC, (1, 8, 8), (0.5,), (0.5,))
TRANSFORMER = ModelSpec(f"{__name__}:image_transformer", ABC, (3, 16, 16), (0.5,) * 3, (0.5,) * 3)
TOKENS = ModelSpec(f"{__name__}:TokenTransformer", ABC, (6,), (), (), InputType.TOKENS)
VECTORS = ModelSpec(f"{__name__}:vector_model", ABC, (12,), (0.5,) * 12, (0.5,) * 12)
FROZEN = ModelSpec(f"{__name__}:PartlyFrozen", ABC, (1, 8, 8), (0.5,), (0.5,))
TRAINING = TrainingSpec(8, 2, "sgd", 0.05, 0.9, 1e-3, 0.0, "none", 5)
COSTS = ModelCosts("test", (), 256, 64, 1)
VOCABULARY = 32


def image_transformer() -> nn.Module:
    from torchvision.models import VisionTransformer

    model: nn.Module = VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=3)
    # torchvision's classifier begins as zeros, through which no gradient comes
    nn.init.trunc_normal_(model.get_parameter("heads.head.weight"), std=0.02)
    return model


class TokenTransformer(nn.Module):
    """Six token ids to three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.classifier = nn.Linear(16, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.encoder(self.embedding(ids)).mean(1))
        return logits


class PartlyFrozen(nn.Module):
    """Of four convolutions the author has frozen the second one, and the weights of the third."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleList(nn.Conv2d(width, 4, 3, padding=1) for width in (1, 4, 4, 4))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 64, 3))
        self.units[1].requires_grad_(False)
        self.units[2].get_parameter("weight").requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for unit in self.units:
            x = torch.relu(unit(x))
        logits: torch.Tensor = self.head(x)
        return logits


def vector_model() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(inplace=True), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def fresh(spec: ModelSpec) -> nn.Module:
    """The module with the weights that every task of it begins with."""
    torch.manual_seed(7)
    return zoo.build(spec)


@functools.cache
def exported(spec: ModelSpec) -> Exported:
    return export_model(fresh(spec), spec.name, spec.input_shape, spec.input_type.dtype, len(spec.classes))


@functools.cache
def exported_with(spec: ModelSpec, heads: Heads) -> Exported:
    """The same, with what a job's `heads` adds to it."""
    plain = exported(spec)
    return plain if heads is Heads.SHARED else with_auxiliary(plain, len(spec.classes), seed=3)


@functools.cache
def traced(spec: ModelSpec, heads: Heads = Heads.SHARED) -> TracedModel:
    graph = exported_with(spec, heads).graph
    fixed = with_fixed_statistics(graph)
    costs = trace_costs(graph, spec.name, TRAINING.batch)
    return TracedModel(graph, costs, trace_costs(fixed, spec.name, TRAINING.batch) if fixed is not graph else None)


def parts_of(module: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """A module's units and its head as its author wrote them."""
    if isinstance(module, DigitsCNN):
        return list(module.units), module.head
    assert isinstance(module, PreResNet)
    return [module.stem, *module.blocks], module.head


class Quiet:
    """Hooks that grant any budget."""

    def __init__(self, budget: int = 1 << 40) -> None:
        self.budget = budget

    def measure(self, stage: int, held_bytes: int) -> int:
        return self.budget

    def stage_started(self, index: int, count: int, stage: Stage) -> None: ...

    def progress(self, index: int, count: int, stage: Stage, epoch: int, loss: float) -> None: ...

    def waiting(self, index: int, stage: Stage, budget_bytes: int) -> None: ...

    def stage_done(self, result: StageResult, part: PartInfo) -> None: ...


def stage(first: int, last: int, micro_batch: int = 8, cache: CachePlace = CachePlace.RAM) -> Stage:
    return Stage(first, last, micro_batch, cache, 4, NOTHING)


def write_data(folder: Path, spec: ModelSpec, count: int) -> None:
    """Images of 8×8, whatever the model's, or items of the model's own shape."""
    rng = np.random.default_rng(0)
    is_image = len(spec.input_shape) == 3
    shape = (8, 8) if is_image else spec.input_shape
    largest = VOCABULARY if spec.input_type is InputType.TOKENS else 256
    items = rng.integers(0, largest, (count, *shape), dtype=np.uint8)
    write_idx(folder / f"train-images-idx{items.ndim}-ubyte", items)
    write_idx(folder / "train-labels-idx1-ubyte", (np.arange(count) % 3).astype(np.uint8))


def write_weights(path: Path, spec: ModelSpec, heads: Heads = Heads.SHARED) -> Path:
    save(path, {name: tensor.numpy() for name, tensor in exported_with(spec, heads).tensors.items()})
    return path


def context(
    folder: Path,
    stages: Sequence[Stage],
    spec: ModelSpec = SPEC,
    training: TrainingSpec = TRAINING,
    count: int = 16,
) -> TrainingContext:
    graph = exported_with(spec, training.heads).graph
    weights = write_weights(folder / "weights.safetensors", spec, training.heads)
    write_data(folder, spec, count)
    for each in ("out", "cache"):
        (folder / each).mkdir(exist_ok=True)
    trained = {unit for stage in stages for unit in range(stage.first, stage.last + 1)}
    units = range(len(graph.units))
    plan = Plan(tuple(stages), tuple(unit for unit in units if unit not in trained), Policy.PAPER, 1 << 40)
    task = Task("t", 1, "job", 1, spec, training, Policy.PAPER, plan, "", 0, "", 0, "")
    if training.fixed_statistics:
        graph = with_fixed_statistics(graph)
    return TrainingContext(
        task=task, plan=plan, model=Model(graph), costs=COSTS, weights=open_weights(weights),
        images=open_images(folder, spec, "train"), output=folder / "out", cache=folder / "cache", device_id="d",
        device=torch.device("cpu"), channels_last=False, enforce=False,
    )  # fmt: skip


def assignment(
    folder: Path,
    stages: Sequence[Stage],
    spec: ModelSpec = SPEC,
    count: int = 16,
    training: TrainingSpec = TRAINING,
) -> Assignment:
    """The same task as a session is given it."""
    task = context(folder, stages, spec, training, count).task
    graph = folder / "graph.json"
    write_traced(graph, traced(spec, training.heads))
    return Assignment(
        task=replace(task, graph_digest=file_digest(graph), graph_bytes=graph.stat().st_size),
        plan=task.plan,
        graph=graph,
        calibration=COSTS.calibration,
        weights=folder / "weights.safetensors",
        data=folder,
        output=folder / "out",
        cache=folder / "cache",
        device_id="device",
        enforce=False,
    )


def trained_tensors(job: TrainingContext, hooks: Quiet | None = None) -> Tensors:
    outcome = train(job, Meter(), hooks or Quiet())
    return {name: tensor for part in outcome.parts for name, tensor in load_numpy(part).items()}


def assert_equal(got: Tensors, expected: Tensors, tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        np.testing.assert_allclose(got[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=name)
