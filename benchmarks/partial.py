"""What an update under a tight budget does to a model that is already good.

    python -m benchmarks.partial --json FILE          every model of the zoo, both policies, eight budgets each
    python -m benchmarks.partial --quick --json FILE  digits-cnn and preresnet20, four budgets each

Scikit-learn's digits. A model is trained on half of the training images until it is good. Then one client with the
other half, an IID share, trains one round inside each budget of a ladder, from what the smallest plan needs to what
full training needs, and its update alone makes the average. `drop` is the accuracy before minus the accuracy after.
Memory limits are not set: other benchmarks show that plans stay inside them.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from fedepth.aggregation.aggregate import aggregate
from fedepth.aggregation.rules import WeightedMean
from fedepth.data.idx import write_idx
from fedepth.data.read import Images, open_images
from fedepth.data.transforms import model_inputs
from fedepth.local import train_task
from fedepth.models.load import load_model
from fedepth.models.run import Model
from fedepth.models.traced import write_traced
from fedepth.plan import Plan, Policy
from fedepth.planning.explain import ladder
from fedepth.prepare import PreparedModel, trace_model
from fedepth.sizes import format_size
from fedepth.task import ModelSpec, TrainingSpec
from fedepth.training.optimizers import new_state, optimizer_step
from fedepth.weights import save

LIMIT = 0.02
GOOD = 0.9
_SEED = 1
_EVERYTHING = 1 << 50


@dataclass(frozen=True)
class Subject:
    """A model to try. `rate` trains it from scratch; the client's round has a tenth of it, as late rounds have.

    Transformers do not learn from so few images without a warm-up: `warm_up` epochs in which the rate grows.
    """

    name: str
    input_shape: tuple[int, int, int]
    batch: int
    epochs: int
    optimizer: str
    rate: float
    warm_up: int = 0


SUBJECTS = (
    Subject("digits-cnn", (1, 8, 8), 32, 20, "adamw", 4e-3),
    Subject("preresnet20", (1, 16, 16), 32, 8, "sgd", 0.05),
    Subject("mobilenet-v3-small", (1, 32, 32), 32, 40, "adamw", 1e-3),
    Subject("vit-tiny", (1, 16, 16), 32, 110, "adamw", 1e-3, warm_up=5),
    Subject("resnet18", (1, 32, 32), 32, 6, "sgd", 0.02),
    Subject("vit-b-16", (1, 32, 32), 32, 30, "adamw", 2e-4, warm_up=3),
)
QUICK = ("digits-cnn", "preresnet20")


@dataclass(frozen=True)
class Row:
    """One budget of one model."""

    model: str
    policy: str
    budget_bytes: int
    blocks: str
    before: float
    after: float

    @property
    def drop(self) -> float:
        return self.before - self.after


def measured(subject: Subject, policies: Sequence[Policy], rungs: int, folder: Path, console: Console) -> Iterator[Row]:
    """The rows of one model."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    channels = subject.input_shape[0]
    spec = ModelSpec(subject.name, tuple("0123456789"), subject.input_shape, (0.3,) * channels, (0.35,) * channels)
    training = TrainingSpec(subject.batch, 1, subject.optimizer, subject.rate, 0.9, 5e-4, 0.0, "none", _SEED)
    prepared = trace_model(spec, training, seed=_SEED)
    graph, weights = folder / "graph.json", folder / "weights.safetensors"
    write_traced(graph, prepared.traced)
    everything = open_images("digits", spec, "train")
    mine, client = np.arange(0, len(everything), 2), np.arange(1, len(everything), 2)
    pretrain(prepared, spec, training, everything, mine, subject, weights)
    before = accuracy(prepared, spec, weights)
    console.print(f"{subject.name}: {before:.1%} after {subject.epochs} epochs on {len(mine)} images")
    if before < GOOD:
        raise SystemExit(f"{subject.name} was to be a good model, {GOOD:.0%} at least: nothing can be said of a drop")
    data = share(everything, client, folder / "data")
    late = replace(training, learning_rate=subject.rate / 10)
    for policy in policies:
        for rung in ladder(
            prepared.traced.costs,
            most_bytes=_EVERYTHING,
            training=late,
            sample_count=len(client),
            policy=policy,
            count=rungs,
        ):
            after = accuracy(prepared, spec, one_round(spec, late, rung.plan, graph, weights, data, folder / "run"))
            yield Row(subject.name, policy.value, rung.budget_bytes, rung.plan.blocks, before, after)


def pretrain(
    prepared: PreparedModel,
    spec: ModelSpec,
    training: TrainingSpec,
    images: Images,
    indices: npt.NDArray[np.int64],
    subject: Subject,
    output: Path,
) -> None:
    """Trains the whole model with a warm-up and a cosine schedule, and writes its weights."""
    model = Model(prepared.traced.graph)
    tensors = {name: tensor.detach().clone() for name, tensor in prepared.tensors.items()}
    model.load(tensors.__getitem__, trainable=True)
    parameters = [parameter for unit in (*model.units, model.head) for _, parameter in unit.parameters()]
    state = [new_state(parameter.detach(), training) for parameter in parameters]
    update = optimizer_step(training.optimizer)
    rng, steps = np.random.default_rng(_SEED), 0
    torch.manual_seed(_SEED)
    for epoch in range(subject.epochs):
        rate = training.learning_rate * (1 + float(np.cos(np.pi * epoch / subject.epochs))) / 2
        rate *= min(1.0, (epoch + 1) / (subject.warm_up + 1))
        now = replace(training, learning_rate=rate)
        for batch in np.array_split(rng.permutation(indices), -(-len(indices) // training.batch)):
            x = torch.from_numpy(model_inputs(images.read(batch), spec))
            loss = functional.cross_entropy(model(x), torch.from_numpy(images.labels[batch]))
            torch.autograd.backward(loss)
            steps += 1
            with torch.no_grad():
                for parameter, kept in zip(parameters, state, strict=True):
                    if parameter.grad is not None:
                        update(parameter, parameter.grad, kept, steps, now)
                        parameter.grad = None
    save(output, {name: tensor.detach().numpy() for name, tensor in tensors.items()})


def share(images: Images, indices: npt.NDArray[np.int64], folder: Path) -> Path:
    """One client's images as IDX files."""
    folder.mkdir()
    write_idx(folder / "train-images-idx3-ubyte", np.ascontiguousarray(images.read(indices)[:, 0]))
    write_idx(folder / "train-labels-idx1-ubyte", images.labels[indices].astype(np.uint8))
    return folder


def one_round(
    spec: ModelSpec, training: TrainingSpec, plan: Plan, graph: Path, weights: Path, data: Path, folder: Path
) -> Path:
    """The global weights after a round in which one client trained by this plan."""
    shutil.rmtree(folder, ignore_errors=True)
    update = train_task(graph, weights, data, spec, training, plan, folder / "output").update
    output = folder / "after.safetensors"
    aggregate(weights, [update], output, WeightedMean())
    return output


def accuracy(prepared: PreparedModel, spec: ModelSpec, weights: Path) -> float:
    """On the test images."""
    images = open_images("digits", spec, "test")
    model = load_model(prepared.traced.graph, weights)
    correct = 0
    for batch in np.array_split(np.arange(len(images)), -(-len(images) // 64)):
        with torch.inference_mode():
            logits = model(torch.from_numpy(model_inputs(images.read(batch), spec)))
        correct += int((logits.argmax(dim=1).numpy() == images.labels[batch]).sum())
    return correct / len(images)


def main(
    output: Annotated[Path, typer.Option("--json", help="File for all figures.", dir_okay=False)],
    quick: Annotated[bool, typer.Option(help="Two small models, four budgets each.")] = False,
    models: Annotated[str, typer.Option(help="Only these, separated by commas.")] = "",
    folder: Annotated[Path, typer.Option(help="For weights and parts.")] = Path("runs/partial"),
) -> None:
    """One update under every budget of a ladder, alone in the average of a good model."""
    console = Console()
    names = models.split(",") if models else QUICK if quick else tuple(each.name for each in SUBJECTS)
    table = Table(title="one client, one round, alone in the average")
    for column in ("model", "policy", "budget", "plan", "before", "after", "drop"):
        table.add_column(column, justify="left" if column in ("model", "policy", "plan") else "right")
    rows: list[Row] = []
    for subject in (each for each in SUBJECTS if each.name in names):
        for row in measured(subject, list(Policy), 4 if quick else 8, folder, console):
            rows.append(row)
            size = format_size(row.budget_bytes)
            console.print(f"  {row.policy:<5} {size:>10}  {row.blocks:<40} drop {row.drop:+.1%}")
            table.add_row(
                row.model,
                row.policy,
                format_size(row.budget_bytes),
                row.blocks,
                f"{row.before:.1%}",
                f"{row.after:.1%}",
                f"{row.drop:+.1%}",
            )
            figures = {
                "worst_drop": max(each.drop for each in rows),
                "limit": LIMIT,
                "torch": torch.__version__,
                "rows": [{**vars(each), "drop": each.drop} for each in rows],
            }
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(figures, indent=1) + "\n")
    console.print(table)
    worst = max(each.drop for each in rows)
    console.print(f"worst drop {worst:+.1%}, at most {LIMIT:.0%} is the aim")
    sys.exit(0 if worst <= LIMIT else 1)


if __name__ == "__main__":
    typer.run(main)
