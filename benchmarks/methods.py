"""What a job's choice of method does, in simulated federations under measured tiers of memory.

    python -m benchmarks.methods --json FILE          Fashion-MNIST, 20 clients, 40 rounds, 2 seeds: half an hour
    python -m benchmarks.methods --quick --json FILE  scikit-learn's digits, 6 clients, 4 rounds, 2 seeds: minutes

Every run is `fedepth simulate`: the session, planner and average of real devices. All methods share data, partition
(Dirichlet 0.3 with equal sizes), seeds, model (PreResNet-20 at 16×16 pixels), number of rounds and local epochs: they
see the same samples. Gradient steps differ and are told. Budgets are measured once, for all methods and seeds.

    fedavg_full      FedAvg, every client trains the whole model at the job's batch: breaks the budgets, upper bound
    fedavg_micro     the same inside the budgets of the tiers "fair", by micro-batches and checkpointing (policy auto)
    fedepth          FeDepth (arXiv 2303.04887): tiers "fair", the job's batch, blocks that lead to the shared head
    m_fedepth        with an auxiliary classifier for every block
    fedepth_distil   with the global model's logits as a teacher
    fedepth_surplus  FeDepth with the tiers "surplus", whose richest quarter has memory for two models
    fedepth_mkd      there with mutual distillation

Fine-tuning has a benchmark of its own (benchmarks.fine_tuning). A run that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from fedepth.data.idx import IdxFile, write_idx
from fedepth.files import write_atomically
from fedepth.simulation.compare import Comparison, compare, read_run
from fedepth.sizes import format_size

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


@dataclass(frozen=True)
class Method:
    """A method: tiers, policy, and lines of the job's section [training]."""

    tiers: str
    policy: str
    training: str = ""


METHODS: Mapping[str, Method] = {
    "fedavg_full": Method("full", "paper"),
    "fedavg_micro": Method("fair", "auto"),
    "fedepth": Method("fair", "paper"),
    "m_fedepth": Method("fair", "paper", 'heads = "auxiliary"'),
    "fedepth_distil": Method("fair", "paper", 'distil = "global"'),
    "fedepth_surplus": Method("surplus", "paper"),
    "fedepth_mkd": Method("surplus", "paper", "mutual = 2"),
}


@dataclass(frozen=True)
class Scale:
    """How much is done. `images`: of the training images; 0 for all of scikit-learn's digits instead."""

    model: str
    input_shape: tuple[int, int, int]
    images: int
    clients: int
    drawn: int
    rounds: int
    epochs: int
    batch: int
    rate: float
    seeds: tuple[int, ...]


FULL = Scale("preresnet20", (1, 16, 16), 6_000, 20, 5, 40, 2, 64, 0.1, (1, 2))
QUICK = Scale("preresnet20", (1, 16, 16), 0, 6, 4, 4, 2, 64, 0.1, (1, 2))

JOB = """\
[job]
name = "{name}"
rounds = {rounds}
devices_per_round = {drawn}
seed = {seed}
policy = "{policy}"

[model]
name = "{model}"
classes = 10
input_shape = {shape}
mean = [0.29]
std = [0.33]

[training]
batch = {batch}
local_epochs = {epochs}
learning_rate = {rate}
learning_rate_end = {rate_end}
weight_decay = 5e-4
{training}

[test]
data = {data}
"""


def fashion(images: int, folder: Path) -> Path:
    """The first so many training images and all test images, as IDX files."""
    if not FASHION.is_dir():
        raise SystemExit(f"{FASHION} is missing: apt install dataset-fashion-mnist")
    folder.mkdir(parents=True, exist_ok=True)
    for split, most in (("train", images), ("t10k", None)):
        for kind in ("images-idx3", "labels-idx1"):
            found = next(FASHION.glob(f"{split}-{kind}-ubyte*"))
            file = IdxFile(found, None, folder)
            count = file.shape[0] if most is None else most
            items = np.frombuffer(file.read_items(range(count)), np.uint8)
            write_idx(folder / f"{split}-{kind}-ubyte", items.reshape(count, *file.shape[1:]))
    return folder


def play(name: str, method: Method, scale: Scale, seed: int, data: str, folder: Path) -> Path:
    """One run, or what is missing of it. Returns its folder."""
    output = folder / f"{name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    job = folder / f"{name}-{seed}.toml"
    job.write_text(
        JOB.format(
            name=name, rounds=scale.rounds, drawn=scale.drawn, seed=seed, policy=method.policy, model=scale.model,
            shape=list(scale.input_shape), batch=scale.batch, epochs=scale.epochs, rate=scale.rate,
            rate_end=scale.rate / 20, training=method.training, data=json.dumps(data),
        )
    )  # fmt: skip
    command = [
        sys.executable, "-m", "fedepth.cli", "simulate", str(job), "--data", data, "--clients", str(scale.clients),
        "--partition", "dirichlet:0.3", "--output", str(output),
    ]  # fmt: skip
    # Measured once: equal budgets for all methods and seeds.
    tiers = folder / f"tiers-{method.tiers}.json"
    command += ["--budgets", str(tiers)] if tiers.exists() else ["--tiers", method.tiers]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if method.tiers != "full" and not tiers.exists():
        write_atomically(tiers, (output / "tiers.json").read_bytes())
    return output


def figures(found: Comparison) -> dict[str, Any]:
    """A method's figures, with the names that the documentation uses."""
    accuracy = found.final
    return {
        "accuracy_mean": None if accuracy is None else accuracy.mean,
        "accuracy_std": None if accuracy is None else accuracy.std,
        "seeds": len(found.seeds),
        "rounds": found.rounds,
        "measured_peak_bytes_by_tier": found.peaks,
        "gradient_steps": found.steps,
        "samples": found.samples_seen,
        "seconds": found.seconds,
        "bytes_down": found.bytes_down,
        "bytes_up": found.bytes_up,
    }


def table(found: Sequence[Comparison]) -> Table:
    """For people."""
    shown = Table(title="accuracy after the last round, mean and standard deviation over seeds")
    for column in ("method", "accuracy", "steps", "samples", "seconds", "up", "peak by tier"):
        shown.add_column(column, justify="left" if column in ("method", "peak by tier") else "right")
    for each in found:
        accuracy = "" if each.final is None else f"{each.final.mean:.1%} ± {each.final.std:.1%}"
        peaks = ", ".join(f"{tier}: {format_size(peak)}" for tier, peak in each.peaks.items())
        numbers = (f"{each.steps:.0f}", f"{each.samples_seen:.0f}", f"{each.seconds:.0f}")
        shown.add_row(each.name, accuracy, *numbers, format_size(round(each.bytes_up)), peaks)
    return shown


def main(
    output: Annotated[Path, typer.Option("--json", help="File for all figures.", dir_okay=False)],
    quick: Annotated[bool, typer.Option(help="Digits, a few clients and rounds.")] = False,
    methods: Annotated[str, typer.Option(help="Only these, separated by commas.")] = "",
    folder: Annotated[Path, typer.Option(help="For data and runs.")] = Path("runs/methods"),
) -> None:
    """Simulated federations by every method, under tiers of memory that are measured."""
    console = Console()
    scale = QUICK if quick else FULL
    folder = (folder / ("quick" if quick else "full")).resolve()
    unknown = sorted(set(methods.split(",")) - {"", *METHODS})
    if unknown:
        raise SystemExit(f"--methods {', '.join(unknown)}: there are {', '.join(METHODS)}")
    chosen = [name for name in METHODS if not methods or name in methods.split(",")]
    data = str(fashion(scale.images, folder / "data")) if scale.images else "digits"
    runs: dict[str, list[Path]] = {name: [] for name in chosen}
    for seed in scale.seeds:  # so that all methods have a first seed soon
        for name in chosen:
            console.print(f"{name}, seed {seed}")
            runs[name].append(play(name, METHODS[name], scale, seed, data, folder))
            found = compare([read_run(run) for each in runs.values() for run in each])
            written = {
                "quick": quick,
                "scale": asdict(scale),
                "methods": {each.name: figures(each) for each in found},
            }
            write_atomically(output, json.dumps(written, indent=1).encode() + b"\n")
    console.print(table(found))


if __name__ == "__main__":
    typer.run(main)
