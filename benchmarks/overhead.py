"""What depth-wise training costs in time, against full training and against the other ways to save memory.

    python -m benchmarks.overhead --json FILE          five epochs and one epoch, in pairs
    python -m benchmarks.overhead --quick --json FILE  fewer images, one pair

PreResNet-20 at 32 px, batch 128, in half of the memory that full training needs. Every way is a process of its own on
the same images from the same weights:

    full              a plain loop with torch.optim.SGD, with every allocator there is; the fastest is the reference
    depthwise         the planner's blocks with cached inputs, in the device's trainer with all its limits; its seconds
                      include building the caches, writing the blocks out, and the rehearsal; caches are of float32,
                      and for one epoch also of float16 and uint8
    checkpointed      full depth in the same trainer, keeping only units' inputs, in micro-batches that fit the budget
    micro_batched     full depth in the same trainer, in micro-batches that fit the budget
    recompute         depth-wise without caches: the frozen prefix runs for every batch of every epoch

Full training and the depth-wise way are run in turn, and ratios are medians over these pairs: a shared machine is
faster at one time than at another. The three others cost the same every epoch and are run for one.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.bench_task import prepare
from edge_client.config import TrainerConfig
from edge_client.measure.trial import TrialModel, trial_request, try_training, write_noise
from edge_client.trainer.client import TrainerProcess
from edge_client.trainer.protocol import Done, Event, Rehearsing, TrainRequest
from fedepth.child import module_argv
from fedepth.errors import FedepthError
from fedepth.estimate.peak import needed_bytes, training_step
from fedepth.memory.environment import available, environment
from fedepth.plan import CachePlace, CacheType, Plan, Policy, Stage
from fedepth.planning.planner import full_training_peak, make_plan
from fedepth.sizes import format_size
from fedepth.task import ModelSpec, TrainingSpec

EPOCHS = 5
BATCH = 128
SPEC = ModelSpec("preresnet20", tuple("0123456789"), (3, 32, 32), (0.5,) * 3, (0.25,) * 3)
TRAINING = TrainingSpec(BATCH, 1, "sgd", 0.01, 0.9, 5e-4, 0.0, "none", 1)
_UNLIMITED = 1 << 40

app = typer.Typer(add_completion=False)
console = Console(width=None if sys.stdout.isatty() else 130)


@dataclass(frozen=True)
class Run:
    """One way, run once."""

    way: str
    epochs: int
    allocator: str
    seconds: float
    peak_bytes: int
    steps: int
    plan: str


class Lab:
    """Runs one way after the other on the same images."""

    def __init__(self, model: TrialModel, images: int, folder: Path) -> None:
        self.model, self.images, self.folder = model, images, folder
        self.data = write_noise(folder / "data", SPEC, images)
        self.runs: list[Run] = []

    def half(self) -> tuple[int, Plan]:
        """Half of the memory that full training is predicted to need, and the blocks that fit into it."""
        costs, training = self.model.costs, self.model.training
        budget = needed_bytes(full_training_peak(costs, training, self.images).total) // 2
        return budget, make_plan(
            costs, budget_bytes=budget, training=training, sample_count=self.images, policy=Policy.PAPER
        )

    def request(self, plan: Plan, budget: int, epochs: int, cache_type: CacheType = CacheType.FLOAT32) -> TrainRequest:
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        training = replace(self.model.training, local_epochs=epochs, cache_type=cache_type)
        model = replace(self.model, training=training)
        return trial_request(
            model,
            replace(plan, budget_bytes=budget),
            budget,
            self.data,
            self.folder / "run",
            enforce=budget < _UNLIMITED,
        )

    def reference(self, way: str, plan: Plan, allocator: str, epochs: int) -> Run:
        """A way of benchmarks.reference_training. `allocator` "default": nothing is set at all."""
        settings = {} if allocator == "default" else environment(allocator)
        told = subprocess.run(
            [*module_argv("benchmarks.reference_training"), way],
            input=msgspec.json.encode(self.request(plan, _UNLIMITED, epochs)),
            stdout=subprocess.PIPE,
            env={**os.environ, **settings},
            check=True,
        )
        figures = json.loads(told.stdout.splitlines()[-1])
        return self._note(
            Run(way, epochs, allocator, figures["seconds"], figures["peak_bytes"], figures["steps"], plan.blocks)
        )

    async def trainer(
        self,
        way: str,
        plan: Plan,
        allocator: str,
        epochs: int,
        budget: int,
        cache_type: CacheType = CacheType.FLOAT32,
    ) -> Run:
        """The device's trainer. Its time begins with the rehearsal, when its warm-up is over."""
        process = await TrainerProcess.start(msgspec.structs.replace(TrainerConfig(), allocator=allocator))
        began: list[float] = []

        def hear(event: Event) -> None:
            if isinstance(event, Rehearsing):
                began.append(time.monotonic())

        try:
            end = await try_training(process, self.request(plan, budget, epochs, cache_type), hear)
            seconds = time.monotonic() - began[0]
        finally:
            await process.kill()
        if not isinstance(end, Done):
            raise FedepthError(f"{way} failed: {end.message}")
        stages = end.result.stages
        peak = max(stage.measured_peak_bytes for stage in stages)
        steps = sum(stage.steps for stage in stages)
        return self._note(Run(way, epochs, allocator, seconds, peak, steps, end.result.plan.blocks))

    def _note(self, run: Run) -> Run:
        self.runs.append(run)
        console.print(
            f"{run.way:<18} {run.allocator:<9} {run.epochs} epochs  {run.seconds:7.1f} s  "
            f"{format_size(run.peak_bytes):>10}  {run.plan}"
        )
        return run


async def compare(lab: Lab, pairs: int) -> dict[str, Any]:
    """Runs everything and returns the figures of the JSON file."""
    budget, plan = lab.half()
    whole = Plan((_whole(lab, BATCH, checkpoint=False),), (), Policy.AUTO, _UNLIMITED)
    full_peak = full_training_peak(lab.model.costs, lab.model.training, lab.images).total
    console.print(f"full training is predicted to need {format_size(full_peak)}, the budget is {format_size(budget)}")
    ours = "tcmalloc" if "tcmalloc" in available() else "glibc"
    firsts = {name: lab.reference("full", whole, name, 1) for name in ("default", *available())}
    fastest = min(firsts, key=lambda name: firsts[name].seconds)
    ratios: dict[int, list[float]] = {EPOCHS: [], 1: []}
    alike: dict[int, list[float]] = {EPOCHS: [], 1: []}
    rounded: dict[CacheType, list[float]] = {CacheType.FLOAT16: [], CacheType.UINT8: []}
    for epochs in ratios:
        for _ in range(pairs):
            full = lab.reference("full", whole, fastest, epochs)
            depthwise = await lab.trainer("depthwise", plan, ours, epochs, budget)
            same = full if ours == fastest else lab.reference("full", whole, ours, epochs)
            ratios[epochs].append(depthwise.seconds / full.seconds)
            alike[epochs].append(depthwise.seconds / same.seconds)
            for kind in rounded if epochs == 1 else ():
                run = await lab.trainer(f"depthwise, {kind.value}", plan, ours, 1, budget, kind)
                rounded[kind].append(run.seconds / full.seconds)
    saving = {
        "checkpointed": _largest(lab, budget, checkpoint=True),
        "micro_batched": _largest(lab, budget, checkpoint=False),
    }
    for way, stage in saving.items():
        await lab.trainer(way, Plan((stage,), (), Policy.AUTO, budget), ours, 1, budget)
    lab.reference("recompute", plan, ours, 1)
    return {
        "model": SPEC.name,
        "batch": BATCH,
        "images": lab.images,
        "budget_bytes": budget,
        "blocks": plan.blocks,
        "reference_allocator": fastest,
        "trainer_allocator": ours,
        "ratio_to_full": statistics.median(ratios[EPOCHS]),
        "ratio_to_full_one_epoch": statistics.median(ratios[1]),
        "ratio_to_full_one_epoch_by_cache": {kind.value: statistics.median(found) for kind, found in rounded.items()},
        "ratio_to_full_same_allocator": statistics.median(alike[EPOCHS]),
        "ratio_to_full_one_epoch_same_allocator": statistics.median(alike[1]),
        "ways": _ways(lab.runs),
        "micro_batches": {way: stage.micro_batch for way, stage in saving.items()},
        "runs": [asdict(run) for run in lab.runs],
    }


def _whole(lab: Lab, micro_batch: int, *, checkpoint: bool) -> Stage:
    costs, training = lab.model.costs, lab.model.training
    last = len(costs.units) - 1
    peak = training_step(
        costs,
        training,
        0,
        last,
        micro_batch,
        accumulates=micro_batch < BATCH,
        cache_bytes=0,
        checkpoint=checkpoint,
    ).peak
    return Stage(0, last, micro_batch, CachePlace.DISK, micro_batch, peak, checkpoint)


def _largest(lab: Lab, budget: int, *, checkpoint: bool) -> Stage:
    """Full depth with the largest micro-batch that fits."""
    for pieces in range(1, BATCH + 1):
        stage = _whole(lab, -(-BATCH // pieces), checkpoint=checkpoint)
        if needed_bytes(stage.predicted_peak_bytes) <= budget:
            return stage
    raise FedepthError(f"not even one sample at a time fits {format_size(budget)}")


def _ways(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Seconds per epoch and peak of every way; the median over its runs."""
    found = []
    for way, allocator, epochs in dict.fromkeys((run.way, run.allocator, run.epochs) for run in runs):
        alike = [run for run in runs if (run.way, run.allocator, run.epochs) == (way, allocator, epochs)]
        found.append(
            {
                "way": way,
                "allocator": allocator,
                "epochs": epochs,
                "seconds_per_epoch": statistics.median(run.seconds for run in alike) / epochs,
                "peak_bytes": max(run.peak_bytes for run in alike),
            }
        )
    return found


def _table(figures: dict[str, Any]) -> Table:
    table = Table("way", "allocator", "epochs", "s/epoch", "peak", title="what every way costs")
    for way in figures["ways"]:
        table.add_row(
            way["way"],
            way["allocator"],
            str(way["epochs"]),
            f"{way['seconds_per_epoch']:.1f}",
            format_size(way["peak_bytes"]),
        )
    return table


@app.command()
def overhead(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the figures go.")] = None,
    quick: Annotated[bool, typer.Option(help="1,280 images and one pair.")] = False,
    images: Annotated[int, typer.Option(help="Images in an epoch.")] = 10_240,
    pairs: Annotated[int, typer.Option(help="Pairs of full and depth-wise training.")] = 3,
    folder: Annotated[Path, typer.Option(help="Where weights and data go.")] = Path("runs/overhead"),
) -> None:
    """Compares depth-wise training in half of the memory with full training and with other ways to save memory."""
    folder = folder.resolve()
    model = asyncio.run(prepare(SPEC, TRAINING, folder / "models"))
    figures = asyncio.run(compare(Lab(model, 1280 if quick else images, folder), 1 if quick else pairs))
    console.print(_table(figures))
    console.print(
        f"depth-wise to full: {figures['ratio_to_full']:.2f} over {EPOCHS} epochs, "
        f"{figures['ratio_to_full_one_epoch']:.2f} over one ("
        + ", ".join(f"{ratio:.2f} with {kind}" for kind, ratio in figures["ratio_to_full_one_epoch_by_cache"].items())
        + "); with the same allocator "
        f"{figures['ratio_to_full_same_allocator']:.2f} and {figures['ratio_to_full_one_epoch_same_allocator']:.2f}"
    )
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    app()
