"""Depth-wise fine-tuning of a pretrained Vision Transformer, by tiers of memory.

    python -m benchmarks.fine_tuning --images DIR --json FILE           ViT-Tiny, 100 + 100 classes: many hours
    python -m benchmarks.fine_tuning --images DIR --coarse --json FILE  the same with 2×2 patches of 16 pixels: an hour
    python -m benchmarks.fine_tuning --images DIR --quick --json FILE   and a few classes and rounds: minutes

DIR holds Tiny-ImageNet as DIR/train/WNID and DIR/val/WNID. The model is pretrained on the last classes in the order of
their names, which the task does not use, and then fine-tuned in a federation on the first ones. Clients have one of the
paper's four plans (arXiv 2303.04887): six blocks of two layers, three of four, two of six, full depth; each is the plan
of policy "paper" at the smallest budget with so few blocks. What is done lies in --folder, round by round: started
again, it goes on behind the last finished round.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.console import Console
from rich.table import Table

from fedepth.aggregation.aggregate import aggregate
from fedepth.aggregation.rules import WeightedMean
from fedepth.aggregation.updates import ClientUpdate
from fedepth.costs import Calibration, ModelCosts
from fedepth.data.partition import dirichlet
from fedepth.data.read import open_images
from fedepth.data.transforms import model_inputs
from fedepth.files import write_atomically
from fedepth.job import learning_rate
from fedepth.job_sections import TuningSection
from fedepth.models.load import load_model
from fedepth.models.traced import read_traced, write_traced
from fedepth.plan import Plan, Policy
from fedepth.planning.explain import explain
from fedepth.planning.planner import smallest_peak
from fedepth.prepare import prepare_model
from fedepth.task import ModelSpec, Result, Task, TrainingSpec
from fedepth.training.session import Assignment, Granted, Known, run
from fedepth.weights import save

_SEED = 1
_EVERYTHING = 1 << 50
_BLOCKS = (6, 3, 2, 1)  # of the paper's tiers, from the poorest client to the richest
_MEAN, _STD = (0.48, 0.45, 0.4), (0.27, 0.26, 0.28)


@dataclass(frozen=True)
class Scale:
    """How much is done.

    Attributes:
        classes: for pretraining, and as many others for the task.
        images: of each class; `tests` of each for testing.
        epochs: of pretraining.
        clients: in the federation, of which `drawn` train in a round.
    """

    model: str
    classes: int
    images: int
    tests: int
    epochs: int
    clients: int
    drawn: int
    rounds: int
    batch: int


FULL = Scale("vit-tiny", 100, 500, 50, 40, 20, 4, 40, 64)
_COARSE = "timm:vit_tiny_patch16_224"  # at 32 pixels 2×2 patches, a sixteenth of the work
COARSE = Scale(_COARSE, 100, 500, 50, 12, 20, 4, 16, 64)
QUICK = Scale(_COARSE, 4, 50, 20, 4, 4, 4, 3, 25)

# name: begins with the pretrained weights, all clients at full depth, what is trained
METHODS: dict[str, tuple[bool, bool, TuningSection]] = {
    "from_scratch": (False, False, TuningSection()),
    "full_depth": (True, True, TuningSection(new_classifier=True)),
    "fine_tuning": (True, False, TuningSection(new_classifier=True)),
    "frozen_embeddings": (True, False, TuningSection(embeddings="frozen", new_classifier=True)),
    "last_six_layers": (True, False, TuningSection(last_units=12, new_classifier=True)),
}


def copy_images(files: Sequence[tuple[str, Path]], folder: Path) -> Path:
    """The files, each with its class, as class folders; once."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for name, path in files:
            (partial / name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, partial / name / path.name)
        partial.rename(folder)
    return folder


def files_of(images: Path, split: str, names: Sequence[str], count: int) -> list[tuple[str, Path]]:
    """So many image files of each class, with its name."""
    return [(name, path) for name in names for path in sorted((images / split / name).glob("*.jpg"))[:count]]


def deal(files: Sequence[tuple[str, Path]], names: Sequence[str], scale: Scale, folder: Path) -> list[Path]:
    """The clients' shares, skewed by Dirichlet(0.3)."""
    labels = np.array([names.index(name) for name, _ in files])
    shares = dirichlet(labels, scale.clients, 0.3, _SEED, minimum=scale.batch)
    clients = [folder / f"client-{number:02d}" for number in range(scale.clients)]
    for client, indices in zip(clients, shares, strict=True):
        copy_images([files[index] for index in indices], client / "train")
    return clients


def tiers(costs: ModelCosts, training: TrainingSpec, samples: int) -> dict[int, Plan]:
    """The plan of each tier, by its number of blocks; where a number is not to be had, the next smaller one."""
    least = smallest_peak(costs, training, samples, Policy.PAPER)
    found = explain(costs, budget_bytes=least, training=training, sample_count=samples, policy=Policy.PAPER)
    plans = {len(each.plan.stages): each.plan for each in found.coarser}
    return {blocks: plans[max(number for number in plans if number <= blocks)] for blocks in _BLOCKS}


@dataclass
class Series:
    """Rounds of one method in its folder: a file of weights and a line of figures for each."""

    name: str
    folder: Path
    spec: ModelSpec
    training: TrainingSpec
    rounds: int

    @property
    def graph(self) -> Path:
        return self.folder / "graph.json"

    def weights(self, number: int) -> Path:
        return self.folder / f"round-{number:04d}.safetensors"

    def figures(self) -> list[dict[str, Any]]:
        """Those of the rounds that are finished."""
        path = self.folder / "rounds.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def prepare(self, tuning: TuningSection, weights: Path | None, console: Console) -> None:
        if self.weights(0).exists():
            return
        prepared = prepare_model(self.spec, self.training, seed=_SEED, weights=weights, tuning=tuning)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_traced(self.graph, prepared.traced)
        save(self.weights(0), {name: tensor.detach().numpy() for name, tensor in prepared.tensors.items()})
        for note in prepared.notes:
            console.print(f"{self.name}: {note}", markup=False)

    def run(self, clients: Sequence[tuple[str, Path, Plan]], drawn: int, tests: Path, console: Console) -> None:
        """The rounds that are missing; in each, the next so many of the clients in a drawn order."""
        known = Known()
        for number in range(len(self.figures()) + 1, self.rounds + 1):
            order = np.random.default_rng((_SEED, number)).permutation(len(clients))[:drawn]
            rate = learning_rate(number, self.rounds, self.training.learning_rate, 0.0, "cosine")
            training = replace(self.training, learning_rate=rate, seed=number)
            started, updates, results = time.monotonic(), [], []
            for place in sorted(order):
                name, data, plan = clients[place]
                update, result = self._trained(number, training, name, data, plan, known)
                updates.append(update)
                results.append((name, result))
            aggregate(self.weights(number - 1), updates, self.weights(number), WeightedMean())
            figures = self._figures(number, results, tests, time.monotonic() - started)
            lines = [json.dumps(each) for each in (*self.figures(), figures)]
            write_atomically(self.folder / "rounds.jsonl", ("\n".join(lines) + "\n").encode())
            if number > 1:
                self.weights(number - 1).unlink(missing_ok=True)
            console.print(f"{self.name}, round {number} of {self.rounds}: {figures['accuracy']:.1%}")

    def _trained(
        self, number: int, training: TrainingSpec, name: str, data: Path, plan: Plan, known: Known
    ) -> tuple[ClientUpdate, Result]:
        output = self.folder / f"update-{name}"
        shutil.rmtree(output, ignore_errors=True)
        task = Task(name, 1, self.name, number, self.spec, training, plan.policy, plan, "", 0, "", 0, "")
        asked = Assignment(
            task=task,
            plan=plan,
            graph=self.graph,
            calibration=Calibration(),
            weights=self.weights(number - 1),
            data=data,
            output=output,
            cache=self.folder / "cache",
            device_id=name,
            enforce=False,
        )
        result = run(asked, Granted(1 << 50), torch.device("cpu"), known)
        return ClientUpdate(tuple(sorted(output.glob("part-*.safetensors"))), float(result.sample_count)), result

    def _figures(
        self, number: int, results: Sequence[tuple[str, Result]], tests: Path, seconds: float
    ) -> dict[str, Any]:
        return {
            "round": number,
            "accuracy": accuracy(self.spec, self.graph, self.weights(number), tests),
            "steps": sum(stage.steps for _, result in results for stage in result.stages),
            "samples_seen": sum(stage.samples_seen for _, result in results for stage in result.stages),
            "upload_bytes": sum(part.size_bytes for _, result in results for part in result.parts),
            "measured_peak_bytes": {
                name: max(stage.measured_peak_bytes for stage in result.stages) for name, result in results
            },
            "seconds": round(seconds, 1),
        }


def accuracy(spec: ModelSpec, graph: Path, weights: Path, tests: Path) -> float:
    """On the test images."""
    images = open_images(tests, spec, "test")
    model = load_model(read_traced(graph).graph, weights)
    correct = 0
    for batch in np.array_split(np.arange(len(images)), -(-len(images) // 128)):
        with torch.inference_mode():
            logits = model(torch.from_numpy(model_inputs(images.read(batch), spec)))
        found: npt.NDArray[np.int64] = logits.argmax(dim=1).numpy()
        correct += int((found == images.labels[batch]).sum())
    return correct / len(images)


def pretrained(images: Path, names: Sequence[str], scale: Scale, folder: Path, console: Console) -> Series:
    """One client with all images of the classes that the task does not use, at full depth, one epoch a round."""
    spec = ModelSpec(scale.model, tuple(names), (3, 32, 32), _MEAN, _STD)
    training = TrainingSpec(scale.batch, 1, "adamw", 5e-4, 0.9, 0.05, 0.0, "crop-flip", _SEED)
    series = Series("pretraining", folder, spec, training, scale.epochs)
    data = folder / "data"
    copy_images(files_of(images, "train", names, scale.images), data / "train")
    copy_images(files_of(images, "val", names, scale.tests), data / "test")
    series.prepare(TuningSection(), None, console)
    plan = tiers(read_traced(series.graph).costs, training, scale.images * len(names))[1]
    series.run([("pretraining", data, plan)], 1, data, console)
    return series


def main(
    images: Annotated[Path, typer.Option(help="Tiny-ImageNet: train/WNID and val/WNID.", file_okay=False, exists=True)],
    output: Annotated[Path, typer.Option("--json", help="File for all figures.", dir_okay=False)],
    coarse: Annotated[bool, typer.Option(help="A smaller grid of patches, fewer epochs and rounds.")] = False,
    quick: Annotated[bool, typer.Option(help="The same, with a few classes and rounds.")] = False,
    methods: Annotated[str, typer.Option(help="Only these, separated by commas.")] = ",".join(METHODS),
    folder: Annotated[Path | None, typer.Option(help="For weights and figures of every round.")] = None,
) -> None:
    """Pretraining on one half of the classes, federated fine-tuning on the other."""
    console = Console()
    size, scale = ("_quick", QUICK) if quick else ("_coarse", COARSE) if coarse else ("", FULL)
    work = folder or Path("runs") / f"fine_tuning{size}"
    names = sorted(path.name for path in (images / "train").iterdir() if path.is_dir())
    before = pretrained(images, names[-scale.classes :], scale, work / "pretraining", console)
    mine = names[: scale.classes]
    spec = replace(before.spec, classes=tuple(mine))
    shares = deal(files_of(images, "train", mine, scale.images), mine, scale, work / "clients")
    tests = copy_images(files_of(images, "val", mine, scale.tests), work / "data" / "test").parent
    training = TrainingSpec(scale.batch, 1, "sgd", 0.01, 0.9, 5e-4, 0.0, "crop-flip", _SEED)
    found: dict[str, Any] = {}
    for name in methods.split(","):
        begins, whole, tuning = METHODS[name]
        series = Series(name, work / name, spec, training, scale.rounds)
        series.prepare(tuning, before.weights(scale.epochs) if begins else None, console)
        plans = tiers(read_traced(series.graph).costs, training, scale.images * len(mine) // scale.clients)
        by_client = [plans[1 if whole else _BLOCKS[number % len(_BLOCKS)]] for number in range(scale.clients)]
        clients = [(share.name, share, plan) for share, plan in zip(shares, by_client, strict=True)]
        series.run(clients, scale.drawn, tests, console)
        rounds = series.figures()
        found[name] = {
            "accuracy": rounds[-1]["accuracy"],
            "plans": {str(blocks): plan.blocks for blocks, plan in plans.items()},
            "predicted_peak_bytes": {str(blocks): plan.predicted_peak_bytes for blocks, plan in plans.items()},
            **{key: sum(each[key] for each in rounds) for key in ("steps", "samples_seen", "upload_bytes", "seconds")},
            "rounds": rounds,
        }
        figures = {
            "scale": vars(scale),
            "torch": torch.__version__,
            "pretraining": before.figures()[-1],
            "methods": found,
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(figures, indent=1) + "\n")
    table = Table(title=f"{scale.model}, {scale.classes} classes, {scale.rounds} rounds")
    for column in ("method", "accuracy", "steps", "MB uploaded", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, each in found.items():
        uploaded = f"{each['upload_bytes'] / 1e6:.0f}"
        table.add_row(name, f"{each['accuracy']:.1%}", str(each["steps"]), uploaded, f"{each['seconds']:.0f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
