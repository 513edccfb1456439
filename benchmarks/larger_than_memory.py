"""A model that is larger than the memory it is trained in: ViT-B/16 at 224 px, all 86 M parameters, a few hundred MiB.

    python -m benchmarks.larger_than_memory --json FILE                       SGD with momentum in 256 MiB
    python -m benchmarks.larger_than_memory --optimizer adamw --json FILE     AdamW in 320 MiB
    python -m benchmarks.larger_than_memory --data DIR --json FILE            images from class folders, not digits

First, full training at micro-batch 1 is tried in a device's trainer under the limit, and fails. Then a coordinator and
one agent, as real processes, train one round: weights go from the coordinator to the device's disk and from there to
its trainer, the update comes back in parts, and the coordinator averages it into new global weights. It evaluates both
on the first 64 of the images.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from benchmarks.bench_task import prepare, write_digits
from benchmarks.federation import Shard, run_federation
from benchmarks.full_training import full_plan
from coordinator.model_worker.client import ModelWorker
from edge_client.config import TrainerConfig
from edge_client.measure.calibration import calibrated
from edge_client.measure.trial import trial_request, try_in_fresh_trainer
from edge_client.trainer.protocol import Failed
from fedepth.job import load_config, model_spec, training_spec
from fedepth.planning.planner import full_training_peak
from fedepth.sizes import format_size

MIB = 1 << 20
BUDGETS = {"sgd": 256 * MIB, "adamw": 320 * MIB}
RATES = {"sgd": 1e-3, "adamw": 1e-5}
IMAGES = 256
EVALUATED = 64
TIME_LIMIT_S = 5400.0
DEVICE = "small"

JOB = """\
[job]
name = "larger-than-memory"
rounds = 1
devices_per_round = 1
gather_s = 0.1
policy = "auto"
seed = 1

[model]
name = "vit-b-16"
classes = {classes}
input_shape = [3, 224, 224]
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]

[training]
batch = 32
optimizer = "{optimizer}"
learning_rate = {rate}
schedule = "constant"
weight_decay = 0.0001
cache_type = "float16"

[test]
data = "data"
"""

app = typer.Typer(add_completion=False)
console = Console(width=None if sys.stdout.isatty() else 130)


def copy_folders(data: Path, target: Path, count: int) -> list[str]:
    """The first `count` images of class folders, as many of each class; returns the classes."""
    folders = sorted((data / "train").iterdir())
    for number in range(count):
        folder, place = folders[number % len(folders)], number // len(folders)
        image = sorted(folder.iterdir())[place]
        for split in ("train", "test") if number < EVALUATED else ("train",):
            copy = target / split / folder.name / image.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, copy)
    return [folder.name for folder in folders]


def write_both(folder: Path, count: int) -> list[str]:
    """Digits to train on, and the first of them to take the loss of; returns the classes."""
    write_digits(folder / "first", EVALUATED)
    write_digits(folder, count)
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        shutil.copyfile(folder / "first" / f"train-{kind}", folder / f"t10k-{kind}")
    return list("0123456789")


def run(folder: Path, optimizer: str, data: Path | None) -> dict[str, Any]:
    """The figures as the JSON file has them."""
    budget = BUDGETS[optimizer]
    shutil.rmtree(folder, ignore_errors=True)
    images = folder / "data"
    images.mkdir(parents=True)
    classes = copy_folders(data, images, IMAGES) if data else write_both(images, IMAGES)
    job = folder / "job.toml"
    job.write_text(JOB.format(classes=json.dumps(classes), optimizer=optimizer, rate=RATES[optimizer]))
    console.print(f"[bold]ViT-B/16[/bold] at 224 px, {optimizer}, {IMAGES} images, {format_size(budget)}")
    needed, failure = asyncio.run(try_in_full(folder, job, budget, images))
    federation = asyncio.run(
        run_federation(
            folder / "federation",
            job,
            [Shard(DEVICE, DEVICE, images, IMAGES)],
            {DEVICE: budget},
            console,
            agent_options=("--exit-when-done",),
            time_limit_s=TIME_LIMIT_S,
        )
    )
    (update,) = federation.updates
    (device,) = federation.devices
    state = folder / "federation" / "coordinator"
    (initial,) = (state / "weights").glob("round-0000-*.safetensors")
    return {
        "optimizer": optimizer,
        "images": IMAGES,
        "budget_bytes": budget,
        "measured_peak_bytes": device.measured_peak_bytes,
        "predicted_peak_bytes": device.predicted_peak_bytes,
        "full_training_failed": bool(failure),
        "full_training_message": failure,
        "full_training_predicted_bytes": needed,
        "blocks": device.blocks,
        "seconds": update["seconds"],
        "loss_before": asyncio.run(loss_of(job, state / "model" / "graph.json", initial)),
        "loss_after": federation.losses[-1],
        "update_bytes": update["bytes"],
        "coordinator_peak_rss_bytes": federation.peak_rss_bytes["coordinator"],
        "agent_peak_rss_bytes": federation.peak_rss_bytes[DEVICE],
        "stages": update["stages"],
    }


async def try_in_full(folder: Path, job: Path, budget: int, images: Path) -> tuple[int, str]:
    """What training all at once with single samples is predicted to need, and what it says under the limit.

    The message is empty if it trains.
    """
    config = load_config(job)
    spec, training = model_spec(config), training_spec(config, 1)
    prepared = await prepare(spec, training, folder / "full")
    calibration = (await calibrated(TrainerConfig(), console.print)).calibration
    costs = replace(prepared.costs, calibration=calibration)
    needed = full_training_peak(costs, replace(training, batch=1), IMAGES).total
    console.print(f"full training at micro-batch 1 is predicted to need {format_size(needed)}; trying it:")
    request = trial_request(
        prepared, full_plan(costs, 1, budget), budget, images, folder / "full" / "run", enforce=True
    )
    trainer = msgspec.structs.replace(TrainerConfig(), allocator=calibration.allocator)
    end = await try_in_fresh_trainer(replace(request, release_freed=True), trainer)  # the least that it can do with
    failure = end.message if isinstance(end, Failed) else ""
    console.print(f"  {failure or 'it trains'}", markup=False)
    return needed, failure


async def loss_of(job: Path, graph: Path, weights: Path) -> float:
    """Over the job's test images, as its coordinator computes it after every round."""
    config = load_config(job)
    worker = ModelWorker()
    try:
        answer = await worker.request(
            "evaluate",
            model=model_spec(config),
            graph=str(graph),
            weights=str(weights),
            test_data=config.test_data,
        )
    finally:
        await worker.stop()
    return float(answer["loss"])


@app.command()
def larger_than_memory(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the figures go.")] = None,
    optimizer: Annotated[str, typer.Option(help="sgd (256 MiB) or adamw (320 MiB).")] = "sgd",
    data: Annotated[Path | None, typer.Option(help="Class folders DIR/train/CLASS/*.jpg; digits if left out.")] = None,
    folder: Annotated[Path, typer.Option(help="Where weights, data and logs go.")] = Path("runs/larger"),
) -> None:
    """Trains all of ViT-B/16 inside a budget that is smaller than its weights."""
    figures = run(folder.resolve(), optimizer, data)
    console.print_json(json.dumps({key: value for key, value in figures.items() if key != "stages"}))
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    app()
