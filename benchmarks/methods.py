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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.runs import Scale, fashion, figures, job_text, simulate, table
from fedepth.files import write_atomically
from fedepth.simulation.compare import compare, read_run


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


FULL = Scale("preresnet20", (1, 16, 16), 6_000, 20, 5, 40, 2, 64, 0.1, (1, 2))
QUICK = Scale("preresnet20", (1, 16, 16), 0, 6, 4, 4, 2, 64, 0.1, (1, 2))


PARTITION = "dirichlet:0.3"


def play(name: str, method: Method, scale: Scale, seed: int, data: str, folder: Path, partition: str) -> Path:
    """One run, or what is missing of it. Returns its folder."""
    text = job_text(
        scale, name=name, seed=seed, data=data, policy=method.policy, rate_end=scale.rate / 20,
        training=f"weight_decay = 5e-4\n{method.training}",
    )  # fmt: skip
    # Measured once: equal budgets for all methods and seeds.
    tiers = folder / f"tiers-{method.tiers}.json"
    memory = ("--budgets", str(tiers)) if tiers.exists() else ("--tiers", method.tiers)
    output = simulate(
        folder / f"{name}-{seed}.toml", text, data, folder / f"{name}-{seed}",
        "--clients", str(scale.clients), "--partition", partition, *memory,
    )  # fmt: skip
    if method.tiers != "full" and not tiers.exists():
        write_atomically(tiers, (output / "tiers.json").read_bytes())
    return output


def main(
    output: Annotated[Path, typer.Option("--json", help="File for all figures.", dir_okay=False)],
    quick: Annotated[bool, typer.Option(help="Digits, a few clients and rounds.")] = False,
    methods: Annotated[str, typer.Option(help="Only these, separated by commas.")] = "",
    images: Annotated[int, typer.Option(min=0, help="Training images instead of the usual number.")] = 0,
    batch: Annotated[int, typer.Option(min=0, help="Instead of the usual batch.")] = 0,
    epochs: Annotated[int, typer.Option(min=0, help="Local epochs instead of the usual number.")] = 0,
    rate: Annotated[float, typer.Option(min=0, help="Learning rate instead of the usual one.")] = 0.0,
    partition: Annotated[str, typer.Option(help="As of fedepth simulate.")] = PARTITION,
    seeds: Annotated[str, typer.Option(help="Instead of the usual seeds, separated by commas.")] = "",
    folder: Annotated[Path, typer.Option(help="For data and runs.")] = Path("runs/methods"),
) -> None:
    """Simulated federations by every method, under tiers of memory that are measured."""
    console = Console()
    scale = QUICK if quick else FULL
    scale = replace(scale, images=images or scale.images, batch=batch or scale.batch)
    scale = replace(scale, epochs=epochs or scale.epochs, rate=rate or scale.rate)
    scale = replace(scale, seeds=tuple(map(int, seeds.split(","))) if seeds else scale.seeds)
    full = f"full-{scale.images}-{scale.batch}-{scale.epochs}-{scale.rate:g}-{partition}"
    folder = (folder / ("quick" if quick else full)).resolve()
    unknown = sorted(set(methods.split(",")) - {"", *METHODS})
    if unknown:
        raise SystemExit(f"--methods {', '.join(unknown)}: there are {', '.join(METHODS)}")
    chosen = [name for name in METHODS if not methods or name in methods.split(",")]
    data = str(fashion(scale.images, folder / "data")) if scale.images else "digits"
    runs: dict[str, list[Path]] = {name: [] for name in chosen}
    for seed in scale.seeds:  # so that all methods have a first seed soon
        for name in chosen:
            console.print(f"{name}, seed {seed}")
            runs[name].append(play(name, METHODS[name], scale, seed, data, folder, partition))
            found = compare([read_run(run) for each in runs.values() for run in each])
            written = {
                "quick": quick,
                "scale": asdict(scale),
                "partition": partition,
                "methods": {each.name: figures(each) for each in found},
            }
            write_atomically(output, json.dumps(written, indent=1).encode() + b"\n")
    console.print(table(found))


if __name__ == "__main__":
    typer.run(main)
