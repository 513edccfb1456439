"""How long a trainer takes from its start to its first step, and what it imports at which cost.

    python -m benchmarks.trainer_start --json FILE

Start, warm-up and rehearsal of a real trainer, several times, for small models of the zoo. The imports are those of the
trainer's module, taken one after the other in a fresh process: seconds and resident memory that each adds.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from benchmarks.bench_task import prepare
from edge_client.config import TrainerConfig
from edge_client.measure.calibration import calibrated
from edge_client.measure.trial import TrialModel, trial_request, try_training, write_noise
from edge_client.trainer.client import TrainerProcess
from edge_client.trainer.protocol import Done, Event, Rehearsing, StageStarted
from fedepth.errors import FedepthError
from fedepth.plan import Policy
from fedepth.planning.planner import make_plan
from fedepth.sizes import format_size
from fedepth.task import ModelSpec, TrainingSpec

MODELS = {"digits-cnn": (1, 32, 32), "preresnet20": (3, 32, 32), "vit-tiny": (3, 32, 32)}
BATCH = 64
# In the order in which the trainer meets them; torchvision only for models that are made of it.
IMPORTS = (
    "msgspec",
    "numpy",
    "torch",
    "PIL.Image",
    "fedepth.task",
    "fedepth.planning.planner",
    "fedepth.data.read",
    "fedepth.weights",
    "fedepth.models.split",
    "fedepth.training.rehearsal",
    "edge_client.trainer.process",
    "torchvision.models",
)
_PROGRAM = """
import importlib, json, sys, time
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
for name in sys.argv[1:]:
    before, started = resident(), time.perf_counter()
    importlib.import_module(name)
    print(json.dumps({"module": name, "seconds": time.perf_counter() - started, "bytes": resident() - before}))
"""

app = typer.Typer(add_completion=False)
console = Console(width=None if sys.stdout.isatty() else 130)


def import_costs() -> list[dict[str, Any]]:
    told = subprocess.run([sys.executable, "-c", _PROGRAM, *IMPORTS], stdout=subprocess.PIPE, check=True)
    return [json.loads(line) for line in told.stdout.splitlines()]


async def start_once(model: TrialModel, config: TrainerConfig, data: Path, folder: Path) -> dict[str, float]:
    """Seconds from the process's start: until it is ready, until it has warmed up, and until it trains."""
    samples = 2 * BATCH
    plan = make_plan(
        model.costs, budget_bytes=1 << 40, training=model.training, sample_count=samples, policy=Policy.AUTO
    )
    marks: dict[str, float] = {}
    started = time.monotonic()

    def hear(event: Event) -> None:
        if isinstance(event, Rehearsing):
            marks["warm"] = time.monotonic() - started
        elif isinstance(event, StageStarted):
            marks.setdefault("first_step", time.monotonic() - started)

    trainer = await TrainerProcess.start(config)
    marks["ready"] = time.monotonic() - started
    try:
        end = await try_training(trainer, trial_request(model, plan, 1 << 40, data, folder, enforce=True), hear)
    finally:
        await trainer.kill()
        shutil.rmtree(folder, ignore_errors=True)
    if not isinstance(end, Done):
        raise FedepthError(f"{model.spec.name} failed: {end.message}")
    return marks


async def measure(folder: Path, times: int) -> list[dict[str, Any]]:
    config = replace(
        TrainerConfig(), allocator=(await calibrated(TrainerConfig(), console.print)).calibration.allocator
    )
    rows = []
    for name, shape in MODELS.items():
        spec = ModelSpec(name, tuple("0123456789"), shape, (0.5,) * shape[0], (0.25,) * shape[0])
        training = TrainingSpec(BATCH, 1, "sgd", 0.01, 0.9, 0.0, 0.0, "none", 1)
        model = await prepare(spec, training, folder / "models")
        data = write_noise(folder / name, spec, 2 * BATCH)
        marks = [await start_once(model, config, data, folder / "run") for _ in range(times)]
        middle = {f"{mark}_seconds": statistics.median(each[mark] for each in marks) for mark in marks[0]}
        rows.append({"model": name, "allocator": config.allocator, **middle})
    return rows


@app.command()
def trainer_start(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the figures go.")] = None,
    times: Annotated[int, typer.Option(help="Starts of every model; the median counts.")] = 3,
    folder: Annotated[Path, typer.Option(help="Where weights and data go.")] = Path("runs/trainer-start"),
) -> None:
    """Measures a trainer's start and lists what it imports."""
    imports = import_costs()
    rows = asyncio.run(measure(folder.resolve(), times))
    table = Table("module", "seconds", "resident", title="imports, each with what it brings along")
    for each in imports:
        table.add_row(each["module"], f"{each['seconds']:.2f}", format_size(each["bytes"]))
    console.print(table)
    table = Table("model", "ready", "warm", "first step", title="seconds from the start of the process")
    for row in rows:
        table.add_row(row["model"], *(f"{row[f'{mark}_seconds']:.2f}" for mark in ("ready", "warm", "first_step")))
    console.print(table)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"imports": imports, "starts": rows}, indent=1) + "\n")


if __name__ == "__main__":
    app()
