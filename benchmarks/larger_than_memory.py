"""A model that is larger than the memory it is trained in: ViT-B/16 at 224 px, all 86 M parameters, a few hundred MiB.

    python -m benchmarks.larger_than_memory --json FILE                       SGD with momentum in 256 MiB
    python -m benchmarks.larger_than_memory --optimizer adamw --json FILE     AdamW in 320 MiB
    python -m benchmarks.larger_than_memory --data DIR --json FILE            images from class folders, not digits

The trainer is the one of a device, with its limits: RLIMIT_DATA above its baseline, a cap on its heap, a rehearsal.
First, full training at micro-batch 1 is tried under the same limit and fails. Then the planner's plan is trained for
one pass over the images. The update's parts are averaged into new global weights by the coordinator's own aggregation,
and the loss over the first 64 of the images is computed before and after by its model worker, which has no limit.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from msgspec.structs import replace
from rich.console import Console

from benchmarks.bench_task import prepare, write_digits
from benchmarks.full_training import full_plan
from coordinator.worker import ModelWorker
from edge_client.calibrate import calibrated
from edge_client.config import TrainerConfig
from edge_client.trainer_process import Done, Failed
from edge_client.trial import TrialModel, trial_request, try_in_fresh_trainer
from edge_client.work import smaller_limit
from fedepth.aggregation.mean import ClientUpdate, average
from fedepth.data.read import open_images
from fedepth.errors import FedepthError
from fedepth.planning.planner import full_training_peak, make_plan, smallest_peak
from fedepth.sizes import format_size
from fedepth.task import CacheType, ModelSpec, Outcome, Plan, Policy, TrainingSpec

MIB = 1 << 20
BUDGETS = {"sgd": 256 * MIB, "adamw": 320 * MIB}
RATES = {"sgd": 1e-3, "adamw": 1e-5}
IMAGES = 256
EVALUATED = 64
BATCH = 32

app = typer.Typer(add_completion=False)
console = Console(width=None if sys.stdout.isatty() else 130)


def spec_for(data: Path | None) -> ModelSpec:
    """ViT-B/16 for the ten digits, or for the classes of a folder."""
    classes = tuple(sorted(path.name for path in (data / "train").iterdir())) if data else tuple("0123456789")
    return ModelSpec("vit-b-16", classes, (3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def copy_folders(data: Path, target: Path, count: int) -> Path:
    """The first `count` images of class folders, as many of each class."""
    folders = sorted((data / "train").iterdir())
    for number in range(count):
        folder, place = folders[number % len(folders)], number // len(folders)
        image = sorted(folder.iterdir())[place]
        for split in ("train", "test") if number < EVALUATED else ("train",):
            copy = target / split / folder.name / image.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, copy)
    return target


def write_both(folder: Path, count: int) -> Path:
    """Digits to train on, and the first of them to take the loss of."""
    write_digits(folder / "first", EVALUATED)
    write_digits(folder, count)
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        shutil.copyfile(folder / "first" / f"train-{kind}", folder / f"t10k-{kind}")
    return folder


async def run(folder: Path, optimizer: str, data: Path | None, budget: int, allocator: str) -> dict[str, Any]:
    """The figures as the JSON file has them."""
    spec = spec_for(data)
    training = TrainingSpec(
        BATCH, 1, optimizer, RATES[optimizer], 0.9, 1e-4, 0.0, "none", 1, cache_type=CacheType.FLOAT16
    )
    images = copy_folders(data, folder / "data", IMAGES) if data else write_both(folder / "data", IMAGES)
    assert len(open_images(images, spec)) == IMAGES
    worker = ModelWorker(on_progress=lambda text: console.print(f"  {text}"))
    try:
        console.print(f"[bold]{spec.name}[/bold] at 224 px, {optimizer}, {IMAGES} images, {format_size(budget)}")
        prepared = await prepare(spec, training, folder / "models")
        config = replace(TrainerConfig(), allocator=allocator)
        calibration = (await calibrated(config, console.print)).calibration
        prepared = dataclasses.replace(prepared, costs=dataclasses.replace(prepared.costs, calibration=calibration))
        allocator = calibration.allocator
        failed = await _fails(folder, prepared, budget, images, allocator)
        started = time.monotonic()
        end = await _train_smaller_and_smaller(folder, prepared, budget, images, allocator)
        seconds = time.monotonic() - started
        result = end.result
        trained = folder / "trained.safetensors"
        parts = tuple(sorted((folder / "run" / "output").glob("part-*.safetensors")))
        average(prepared.weights, [ClientUpdate(parts, IMAGES)], trained)
        losses = [
            (await worker.request("evaluate", model=spec, weights=str(weights), test_data=str(images)))["loss"]
            for weights in (prepared.weights, trained)
        ]
    finally:
        await worker.stop()
    costs = prepared.costs
    return {
        "model": spec.name,
        "optimizer": optimizer,
        "images": IMAGES,
        "parameters": sum(unit.parameter_bytes for unit in (*costs.units, costs.exits[-1])) // 4,
        "budget_bytes": budget,
        "measured_peak_bytes": max(stage.measured_peak_bytes for stage in result.stages),
        "predicted_peak_bytes": result.plan.predicted_peak_bytes,
        "full_training_failed": bool(failed),
        "full_training_message": failed,
        "full_training_predicted_bytes": full_training_peak(costs, _micro(training), IMAGES).total,
        "units_untrained": len(result.plan.untrained),
        "blocks": result.plan.blocks,
        "seconds": seconds,
        "loss_before": losses[0],
        "loss_after": losses[1],
        "allocator": result.allocator,
        "baseline_bytes": result.baseline_bytes,
        "stages": [dataclasses.asdict(stage) for stage in result.stages],
    }


def _micro(training: TrainingSpec) -> TrainingSpec:
    return dataclasses.replace(training, batch=1)


async def _fails(folder: Path, prepared: TrialModel, budget: int, images: Path, allocator: str) -> str:
    """What training all at once with single samples says under the same limit; empty if it trains."""
    needed = full_training_peak(prepared.costs, _micro(prepared.training), IMAGES).total
    console.print(f"full training at micro-batch 1 is predicted to need {format_size(needed)}; trying it:")
    end = await _train(folder, prepared, full_plan(prepared.costs, 1, budget), budget, images, allocator)
    console.print("  it trains" if isinstance(end, Done) else f"  {end.message}")
    return end.message if isinstance(end, Failed) else ""


async def _train_smaller_and_smaller(
    folder: Path, prepared: TrialModel, budget: int, images: Path, allocator: str
) -> Done:
    """As the agent does it: a plan that goes over its budget is followed by a smaller one."""
    limit = budget
    while True:
        plan = make_plan(
            prepared.costs,
            budget_bytes=limit,
            training=prepared.training,
            sample_count=IMAGES,
            policy=Policy.AUTO,
        )
        show(plan)
        end = await _train(folder, prepared, plan, budget, images, allocator)
        if isinstance(end, Done):
            return end
        if end.outcome is not Outcome.OVER_BUDGET:
            raise FedepthError(f"training failed: {end.message}")
        console.print(f"  {end.message}; planning smaller")
        least = smallest_peak(prepared.costs, prepared.training, IMAGES, Policy.AUTO)
        limit = smaller_limit(plan, end.miss_bytes, least)


async def _train(
    folder: Path, prepared: TrialModel, plan: Plan, budget: int, images: Path, allocator: str
) -> Done | Failed:
    shutil.rmtree(folder / "run", ignore_errors=True)
    task = trial_request(prepared, plan, budget, images, folder / "run", enforce=True)
    return await try_in_fresh_trainer(task, replace(TrainerConfig(), allocator=allocator))


def show(plan: Plan) -> None:
    console.print(f"plan: {plan.blocks}")
    for stage in plan.stages:
        console.print(
            f"  units {stage.first}-{stage.last}: micro-batch {stage.micro_batch}, inputs on {stage.cache.value}"
            f"{', checkpointed' if stage.checkpoint else ''}, predicted {format_size(stage.predicted_peak_bytes)}"
        )


@app.command()
def larger_than_memory(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the figures go.")] = None,
    optimizer: Annotated[str, typer.Option(help="sgd (256 MiB) or adamw (320 MiB).")] = "sgd",
    data: Annotated[Path | None, typer.Option(help="Class folders DIR/train/CLASS/*.jpg; digits if left out.")] = None,
    folder: Annotated[Path, typer.Option(help="Where weights and data go.")] = Path("runs/larger"),
    allocator: Annotated[str, typer.Option(help="auto, glibc or tcmalloc.")] = "auto",
) -> None:
    """Trains all of ViT-B/16 inside a budget that is smaller than its weights."""
    shutil.rmtree(folder / "data", ignore_errors=True)
    figures = asyncio.run(run(folder.resolve(), optimizer, data, BUDGETS[optimizer], allocator))
    console.print_json(json.dumps({key: value for key, value in figures.items() if key != "stages"}))
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    app()
