"""The commands `fedepth simulate` and `fedepth compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedepth.commands import JsonOption
from fedepth.errors import ConfigError
from fedepth.printable import printable
from fedepth.terminal import console, print_json


def simulate_command(
    job: Annotated[Path, typer.Argument(help="A job file, as a coordinator serves it.")],
    data: Annotated[str, typer.Option(help='Folder with the training data of all clients, or "digits".')],
    output: Annotated[Path, typer.Option(help="Folder for everything that comes of it; to go on, give it again.")],
    clients: Annotated[int | None, typer.Option(min=1, help="How many; not where the partition says so.")] = None,
    partition: Annotated[
        str,
        typer.Option(
            help="iid, dirichlet:ALPHA (equal sizes), dirichlet-unbalanced:ALPHA, shards:EACH, folder:LEVEL (of "
            "image files: CLASS/OWNER/… is 1), csv:FILE (client, and file or index), or file:FILE (a partition.json)."
        ),
    ] = "iid",
    tiers: Annotated[
        str, typer.Option(help="Memory of the clients: fair, lack or surplus (measured), or full for no limit.")
    ] = "full",
    budgets: Annotated[
        Path | None, typer.Option(help="Memory of real devices instead: output of fedepth-client probe --json.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="JSON lines: speeds, links, absences, dropouts.")] = None,
    plans: Annotated[Path | None, typer.Option(help="JSON: plans by client that are trained as they are.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the job's.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Clients that train at once; 0: one for each core.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Of each worker; another number gives other last digits.")] = 1,
    enforce: Annotated[bool, typer.Option(help="Hold every client to its budget, as a device does.")] = False,
    engine: Annotated[str, typer.Option(help="local, or ray for a Ray cluster that sees the same folders.")] = "local",
    name: Annotated[str, typer.Option(help="By which runs are compared; by default the job's.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Run a job with many simulated clients: the training, planning and averaging that real devices do.

    Results are the same, bit for bit, for any number of workers, and after an interruption: the same command goes on
    where it stopped. rounds.jsonl in the output folder has one line for every round.
    """
    if budgets is not None and tiers != "full":
        raise ConfigError("--budgets and --tiers both say how much memory clients have; give one of them")
    try:
        from fedepth.simulation.setup import Options
        from fedepth.simulation.simulate import simulate
    except ImportError as error:
        raise ConfigError(f"{error}. A simulation needs torch: pip install 'fedepth[train]'") from error
    options = Options(
        job=job, data=data, output=output, clients=clients, partition=partition, tiers=tiers, budgets=budgets,
        trace=trace, plans=plans, seed=seed, workers=workers, threads=threads, enforce=enforce, name=name,
        engine=engine,
    )  # fmt: skip
    lines = simulate(options)
    if as_json:
        print_json(lines)
        return
    out = console()
    last = lines[-1]
    best = max((line.accuracy for line in lines if line.published and line.accuracy is not None), default=None)
    if last.accuracy is not None and best is not None:
        out.print(f"accuracy {last.accuracy:.2%} after round {last.round}, at best {best:.2%}")
    weights = output / "weights" / f"round-{last.weights_round:04d}.safetensors"
    out.print(f"weights: {printable(str(weights))}", markup=False, soft_wrap=True)
