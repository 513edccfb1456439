"""Injects seeded faults into real federations, and judges what came of them.

python -m benchmarks.faults --json FILE              all of them; those in FILE already are not run again
python -m benchmarks.faults --json FILE --only SEED  one of them, in a federation of its own
python -m benchmarks.faults --list                   the kinds, with their seeds
"""

from __future__ import annotations

import faulthandler
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.faults.catalogue import planned
from benchmarks.faults.run import run_all
from fedepth.errors import FedepthError


def main(
    json: Annotated[Path | None, typer.Option("--json", help="The results, written as they come.")] = None,
    only: Annotated[list[int] | None, typer.Option(help="Seeds to run, whatever the file holds.")] = None,
    kind: Annotated[str, typer.Option(help="Only kinds whose names contain this.")] = "",
    parallel: Annotated[int, typer.Option(min=1, help="Federations at a time.")] = 2,
    keep: Annotated[Path | None, typer.Option(help="Folder that keeps state and logs of failed federations.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the kinds and their seeds.")] = False,
) -> None:
    """Inject faults into real processes."""
    faulthandler.enable()
    console = Console()
    plan = [each for each in planned() if kind in each.kind.name and (not only or each.seed in only)]
    if list_ or json is None:
        for each in plan:
            console.print(f"{each.seed:4} {each.kind.name}")
        return
    try:
        result = run_all(plan, json, console, parallel=parallel, keep=keep, again=bool(only))
    except FedepthError as error:
        console.print(str(error), markup=False)
        raise typer.Exit(1) from None
    raise typer.Exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    typer.run(main)
