"""Does training stay inside its budget, and how good is the prediction? Random jobs, each in a fresh trainer.

    python -m benchmarks.memory --quick --json FILE    24 trials, and 5 of them again
    python -m benchmarks.memory --json FILE            200 trials, and 40 of them again
    python -m benchmarks.memory --quick --mutual 3     budgets that hold two or three models that distil from each other

Every trial draws model, batch, optimizer, policy, heads, what is distilled, and a budget between what the smallest plan
needs and what full training needs. The trainer enforces the budget (RLIMIT_DATA, its own checks) as on a device; a plan
that goes over is replaced by a smaller one, also as there. Every fifth trial is run once more, without enforcement.
Finished trials are kept in a folder, so that a run that was stopped goes on where it was. `--plot FILE.png` draws
predicted against measured.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import track

from benchmarks import custom_models
from benchmarks.bench_task import prepare, write_digits
from edge_client.config import TrainerConfig
from edge_client.measure.calibration import calibrated
from edge_client.measure.trial import TrialModel, trial_request, try_in_fresh_trainer, write_noise
from edge_client.trainer.protocol import Done, Failed
from fedepth.costs import Calibration
from fedepth.errors import PlanError
from fedepth.estimate.peak import needed_bytes
from fedepth.plan import Plan, Policy, Stage
from fedepth.planning.planner import full_training_peak, make_plan, smallest_peak
from fedepth.planning.smaller import SMALLER_PLANS, smaller_limit
from fedepth.sizes import format_size
from fedepth.task import Distil, Heads, InputType, ModelSpec, Outcome, TrainingSpec

TRIALS, QUICK_TRIALS = 200, 24
UNENFORCED_EVERY = 5
# Name, shape of an input, batches; what a trial costs decides how large they may be.
MODELS: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = (
    ("digits-cnn", (1, 40, 40), (32, 64, 128, 256)),
    ("preresnet20", (3, 32, 32), (16, 32, 64, 128)),
    ("resnet18", (3, 64, 64), (16, 32, 64)),
    ("mobilenet-v3-small", (3, 64, 64), (16, 32, 64)),
    ("vit-tiny", (3, 64, 64), (8, 16, 32)),
    ("timm:edgenext_xx_small", (3, 64, 64), (16, 32)),
    ("timm:mobilenetv4_conv_small", (3, 64, 64), (16, 32, 64)),
    ("timm:levit_128s", (3, 224, 224), (4, 8)),
    ("torchvision:convnext_tiny", (3, 64, 64), (8, 16)),
    ("torchvision:googlenet", (3, 64, 64), (16, 32)),
    ("torchvision:efficientnet_b0", (3, 64, 64), (8, 16, 32)),
    ("torchvision:mobilenet_v2", (3, 64, 64), (16, 32)),
    ("torchvision:regnet_y_400mf", (3, 64, 64), (16, 32)),
    *((f"benchmarks.custom_models:{name}", shape, (16, 32, 64)) for name, (shape, _) in custom_models.WIDE.items()),
)

app = typer.Typer(add_completion=False)
console = Console(width=None if sys.stdout.isatty() else 130)


@dataclass(frozen=True)
class StageFigures:
    """One stage as it was planned, and what it took in its rehearsal and in training, in bytes."""

    planned: Stage
    rehearsed_bytes: int
    measured_bytes: int


@dataclass(frozen=True)
class Trial:
    """One trial and what came of it. Sizes are bytes.

    Attributes:
        tries: plans that were tried; 1 if the first one held.
        outcome: "trained", or why it was not.
        forced: full training at the job's batch did not fit, so that a finer plan was made.
        models: that were trained.
        predicted_bytes: the estimate of the plan that was trained, without its margin.
        measured_bytes: the worst stage of that plan.
        stages: predicted components and measured peaks of every stage.
    """

    model: str
    batch: int
    optimizer: str
    policy: str
    enforced: bool
    budget_bytes: int
    blocks: str
    forced: bool
    tries: int
    outcome: str
    predicted_bytes: int
    measured_bytes: int
    rehearsed_bytes: int
    seconds: float
    stages: tuple[StageFigures, ...]
    heads: str = "shared"
    distil: str = "none"
    models: int = 1


async def run_trials(folder: Path, count: int, seed: int, mutual: int, calibration: Calibration) -> list[Trial]:
    """Runs what is not there yet, and returns all."""
    journal = folder / "trials.jsonl"
    done = journal.read_text().splitlines() if journal.exists() else []
    chance = random.Random(seed)
    drawn = [draw(chance, mutual) for _ in range(count)]
    runs = [(each, enforce) for number, each in enumerate(drawn) for enforce in _enforcements(number)]
    for number, (each, enforce) in enumerate(track(runs, "trials", console=console)):
        if number < len(done):
            continue
        trial = await run_trial(folder, each, enforce, calibration)
        with open(journal, "a", encoding="utf-8") as file:
            file.write(msgspec.json.encode(trial).decode() + "\n")
    return [msgspec.json.decode(line, type=Trial) for line in journal.read_text().splitlines()[: len(runs)]]


def _enforcements(number: int) -> tuple[bool, ...]:
    return (True, False) if number % UNENFORCED_EVERY == 0 else (True,)


@dataclass(frozen=True)
class Drawn:
    """What chance decides. `height` places the budget between the smallest need (0) and that of full training (1); for
    several models, between the needs of two and of all of them."""

    spec: ModelSpec
    training: TrainingSpec
    policy: Policy
    height: float


def draw(chance: random.Random, mutual: int) -> Drawn:
    name, shape, batches = chance.choice(MODELS)
    tokens = custom_models.WIDE.get(name.partition(":")[2], ((), "float"))[1] == "tokens"
    kind = InputType.TOKENS if tokens else InputType.FLOAT
    spec = ModelSpec(name, tuple("0123456789"), shape, (0.3,) * shape[0], (0.35,) * shape[0], kind)
    optimizer = chance.choice(["sgd", "adamw"])
    training = TrainingSpec(chance.choice(batches), 1, optimizer, 1e-3, 0.9, 5e-4, 0.0, "none", 1, mutual=mutual)
    policy, height = chance.choice(list(Policy)), chance.random()
    training = replace(training, heads=chance.choice(list(Heads)), distil=chance.choice(list(Distil)))
    return Drawn(spec, training, policy, height)


async def run_trial(folder: Path, drawn: Drawn, enforce: bool, calibration: Calibration) -> Trial:
    training = drawn.training
    prepared = await prepare(drawn.spec, training, folder / "models")
    costs = replace(prepared.costs, calibration=calibration)
    prepared = replace(prepared, training=training, costs=costs)
    samples = 3 * training.batch
    low = smallest_peak(costs, training, samples, drawn.policy)
    if training.mutual > 1:
        low = needed_bytes(full_training_peak(costs, training, samples, models=2).total)
    full = full_training_peak(costs, training, samples, models=training.mutual).total
    high = max(low, int(full * 1.1) + (2 << 20))
    budget = int(low + (high - low) * drawn.height)
    started = time.monotonic()
    plan, tries, end = await _train(folder, prepared, drawn.policy, budget, samples, enforce)
    stages = end.result.stages if isinstance(end, Done) else ()
    whole = len(plan.stages) == 1 and plan.stages[0].micro_batch >= training.batch and not plan.untrained
    return Trial(
        model=drawn.spec.name,
        batch=training.batch,
        optimizer=training.optimizer,
        policy=drawn.policy.value,
        enforced=enforce,
        budget_bytes=budget,
        blocks=plan.blocks,
        forced=not whole,
        tries=tries,
        outcome="trained" if isinstance(end, Done) else end.message,
        predicted_bytes=plan.predicted_peak_bytes,
        measured_bytes=max((stage.measured_peak_bytes for stage in stages), default=0),
        rehearsed_bytes=max((stage.rehearsed_peak_bytes for stage in stages), default=0),
        seconds=time.monotonic() - started,
        stages=tuple(
            StageFigures(planned, stage.rehearsed_peak_bytes, stage.measured_peak_bytes)
            for planned, stage in zip(plan.stages, stages, strict=False)
        ),
        heads=training.heads.value,
        distil=training.distil.value,
        models=plan.models,
    )


async def _train(
    folder: Path, prepared: TrialModel, policy: Policy, budget: int, samples: int, enforce: bool
) -> tuple[Plan, int, Any]:
    """Trains with smaller and smaller plans, as the agent does, each in a trainer of its own."""
    data = folder / "data"
    shutil.rmtree(data, ignore_errors=True)
    if len(prepared.spec.input_shape) == 3:
        write_digits(data, samples)
    else:
        write_noise(data, prepared.spec, samples)
    limit, tries = budget, 0
    while True:
        plan = make_plan(
            prepared.costs, budget_bytes=limit, training=prepared.training, sample_count=samples, policy=policy
        )
        shutil.rmtree(folder / "run", ignore_errors=True)
        task = trial_request(
            prepared, replace(plan, budget_bytes=budget), budget, data, folder / "run", enforce=enforce
        )
        config = _config(prepared.costs.calibration.allocator)
        end = await try_in_fresh_trainer(task, config)
        tries += 1
        if isinstance(end, Failed) and end.capped:
            end = await try_in_fresh_trainer(replace(task, release_freed=True), config)
            tries += 1
        if isinstance(end, Done):
            return end.result.plan, tries, end
        if end.outcome not in (Outcome.OVER_BUDGET, Outcome.TRAINER_DIED) or tries > SMALLER_PLANS:
            return plan, tries, end
        try:
            least = smallest_peak(prepared.costs, prepared.training, samples, policy)
            limit = min(limit, smaller_limit(plan, end.miss_bytes, least, tries))
            make_plan(
                prepared.costs, budget_bytes=limit, training=prepared.training, sample_count=samples, policy=policy
            )
        except PlanError:
            return plan, tries, end


def _config(allocator: str) -> TrainerConfig:
    return msgspec.structs.replace(TrainerConfig(threads=2), allocator=allocator)


def figures(trials: Sequence[Trial]) -> dict[str, Any]:
    """What the JSON file says."""
    enforced = [trial for trial in trials if trial.enforced]
    free = [trial for trial in trials if not trial.enforced]
    trained = [trial for trial in enforced if trial.outcome == "trained"]
    used = [trial.measured_bytes / trial.budget_bytes for trial in trained if trial.forced]
    return {
        "trials": len(enforced),
        "over_budget": sum(trial.measured_bytes > trial.budget_bytes for trial in enforced),
        "failed": sum(trial.outcome != "trained" for trial in trials),
        "first_try_fraction": sum(trial.tries == 1 for trial in trained) / max(1, len(enforced)),
        "median_utilisation": statistics.median(used) if used else None,
        **_errors(trained),
        "unenforced": {
            "trials": len(free),
            "over_budget": sum(trial.measured_bytes > trial.budget_bytes for trial in free),
            **_errors([trial for trial in free if trial.outcome == "trained"]),
        },
    }


def _errors(trials: Sequence[Trial]) -> dict[str, float | None]:
    errors = sorted(abs(trial.predicted_bytes - trial.measured_bytes) / trial.measured_bytes for trial in trials)
    if not errors:
        return {"median_abs_error": None, "p95_abs_error": None}
    return {
        "median_abs_error": statistics.median(errors),
        "p95_abs_error": errors[math.ceil(0.95 * len(errors)) - 1],
    }


def draw_errors(trials: Sequence[Trial], path: Path) -> None:
    """Every stage's predicted against its measured peak, and how the relative errors are spread."""
    from matplotlib.figure import Figure

    mib = 1 << 20
    figure = Figure(figsize=(11, 5), layout="constrained")
    scatter, spread = figure.subplots(1, 2)
    errors = []
    for name in dict.fromkeys(trial.model for trial in trials):
        # A peak of 0, hidden below pages that others gave up meanwhile, tells nothing.
        stages = [each for trial in trials if trial.model == name for each in trial.stages if each.measured_bytes]
        predicted = [each.planned.predicted_peak_bytes / mib for each in stages]
        measured = [each.measured_bytes / mib for each in stages]
        scatter.loglog(measured, predicted, ".", alpha=0.6, label=name.rpartition(":")[2])
        errors += [100 * (one / other - 1) for one, other in zip(predicted, measured, strict=True)]
    ends = scatter.get_xlim()
    scatter.loglog(ends, ends, color="gray", linewidth=1)
    scatter.set(xlabel="measured peak of a stage, MiB", ylabel="predicted peak, MiB", title="every trained stage")
    scatter.legend(fontsize="x-small", ncols=2)
    spread.hist(errors, bins=40, range=(-30, 30), color="tab:blue")
    spread.set(xlabel="(predicted − measured) / measured, %", ylabel="stages", title="error of the estimate")
    figure.savefig(path, dpi=110)


@app.command()
def memory(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the figures go.")] = None,
    quick: Annotated[bool, typer.Option(help=f"{QUICK_TRIALS} trials instead of {TRIALS}.")] = False,
    trials_wanted: Annotated[int, typer.Option("--trials", help="How many.")] = TRIALS,
    folder: Annotated[Path, typer.Option(help="Where trials are kept; the next run goes on there.")] = Path(
        "runs/memory"
    ),
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 1,
    mutual: Annotated[int, typer.Option(help="Models at most; above 1, every budget holds two.")] = 1,
    allocator: Annotated[str, typer.Option(help="auto, glibc or tcmalloc.")] = "auto",
    plot: Annotated[Path | None, typer.Option(help="PNG of predicted against measured peaks.")] = None,
) -> None:
    """Trains random jobs inside random budgets and compares prediction, rehearsal and measurement."""
    calibration = asyncio.run(calibrated(_config(allocator), console.print)).calibration
    folder = folder.resolve() / (f"{calibration.allocator}-{seed}" + (f"-{mutual}" if mutual > 1 else ""))
    folder.mkdir(parents=True, exist_ok=True)
    trials = asyncio.run(run_trials(folder, QUICK_TRIALS if quick else trials_wanted, seed, mutual, calibration))
    for trial in trials:
        if trial.outcome != "trained" or trial.tries > 1 or trial.measured_bytes > trial.budget_bytes:
            console.print(
                f"{trial.model} batch {trial.batch} {trial.optimizer} {trial.policy} {trial.heads} heads, distil "
                f"{trial.distil}: budget {format_size(trial.budget_bytes)}, "
                f"measured {format_size(trial.measured_bytes)}, "
                f"{trial.tries} tries, {trial.outcome[:100]}",
                markup=False,
            )
    found = {**figures(trials), "calibration": asdict(calibration), "seed": seed}
    console.print_json(json.dumps(found))
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({**found, "all": [asdict(trial) for trial in trials]}, indent=1) + "\n")
    if plot:
        plot.parent.mkdir(parents=True, exist_ok=True)
        draw_errors(trials, plot)


if __name__ == "__main__":
    app()
