"""What a trainer's settings are worth: how long its threads spin, what a stage may keep of freed memory, and in what
pieces caches are written.

    python -m benchmarks.trainer_settings --json FILE
    python -m benchmarks.trainer_settings --quick --json FILE

Threads: one epoch of full training of PreResNet-20, alone on the machine and in two processes at once, with as many
rounds of waiting before a thread goes to sleep. To wake it takes longer than many an operation; to let it spin takes a
core from whoever else has work. "default" is what OpenMP does when nothing is set.

Keeping: the depth-wise way of benchmarks.overhead, one epoch, with several allowances beside what its stages need. What
is given back has to be had again, page by page.

Pieces: a new file of 600 MiB is written in pieces of several sizes, each time after the machine was left alone for some
seconds, so that a virtual machine has had the time to give free memory back to its host.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.bench_task import prepare
from benchmarks.overhead import SPEC, TRAINING, Lab
from fedepth.child import module_argv
from fedepth.estimate.peak import KEPT_BYTES, KEPT_SHARE
from fedepth.memory.environment import environment
from fedepth.plan import Policy
from fedepth.planning.planner import make_plan
from fedepth.sizes import format_size

SPINS = ("default", "0", "500", "1000", "2000", "4000", "10000")
BATCHES = (128, 32)
ALLOWANCES = ((0.02, 1 << 20), (0.06, 1 << 20), (KEPT_SHARE, KEPT_BYTES), (0.2, 1 << 20), (0.5, 20 << 20))
PIECES = (4 << 10, 64 << 10, 256 << 10, 1 << 20, 8 << 20)
FILE_BYTES = 600 << 20
REST_S = 6.0

app = typer.Typer(add_completion=False)
console = Console(width=None if sys.stdout.isatty() else 130)


def epoch_seconds(request: bytes, spins: str, together: int) -> float:
    """Full training in `together` processes at once; the slowest of them."""
    settings = {**os.environ, **environment("auto")}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        settings.pop(name)
    if spins != "default":
        settings["GOMP_SPINCOUNT"] = spins
    processes = [
        subprocess.Popen(
            [*module_argv("benchmarks.reference_training"), "full"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=settings,
        )
        for _ in range(together)
    ]
    for process in processes:
        assert process.stdin
        process.stdin.write(request)
        process.stdin.close()
    told = [process.stdout.read() for process in processes if process.stdout]
    for process in processes:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)
    return max(float(json.loads(text.splitlines()[-1])["seconds"]) for text in told)


def keeping_figures(request: bytes, share: float, allowed_bytes: int) -> dict[str, Any]:
    """Seconds, page faults and peak of a depth-wise task that may keep so much."""
    told = subprocess.run(
        [*module_argv("benchmarks.keeping"), str(share), str(allowed_bytes)],
        input=request,
        stdout=subprocess.PIPE,
        env={**os.environ, **environment("auto")},
        check=True,
    )
    found: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return found


def write_seconds(folder: Path, piece_bytes: int) -> float:
    data = memoryview(os.urandom(piece_bytes))
    time.sleep(REST_S)
    with tempfile.TemporaryFile(buffering=0, dir=folder) as file:
        started = time.monotonic()
        for _ in range(FILE_BYTES // piece_bytes):
            file.write(data)
        return time.monotonic() - started


def waiting(folder: Path, images: int, repeats: int) -> list[dict[str, Any]]:
    """Median seconds of an epoch for every batch and every number of rounds."""
    rows = []
    for batch in BATCHES:
        training = replace(TRAINING, batch=batch)
        model = asyncio.run(prepare(SPEC, training, folder / "models"))
        plan = make_plan(model.costs, budget_bytes=1 << 40, training=training, sample_count=images, policy=Policy.AUTO)
        request = msgspec.json.encode(Lab(model, images, folder).request(plan, 1 << 40, 1))
        seconds: dict[tuple[str, int], list[float]] = {}
        # In turn, so that a machine that slows down slows all of them down.
        rounds = [(spins, together) for _ in range(repeats) for spins in SPINS for together in (1, 2)]
        for spins, together in track(rounds, f"batch {batch}", console=console):
            seconds.setdefault((spins, together), []).append(epoch_seconds(request, spins, together))
        rows += [
            {
                "batch": batch,
                "spins": spins,
                "alone_seconds": statistics.median(seconds[spins, 1]),
                "two_at_once_seconds": statistics.median(seconds[spins, 2]),
            }
            for spins in SPINS
        ]
    return rows


def keeping(folder: Path, images: int, repeats: int) -> list[dict[str, Any]]:
    """Medians for every allowance."""
    model = asyncio.run(prepare(SPEC, TRAINING, folder / "models"))
    lab = Lab(model, images, folder)
    budget, plan = lab.half()
    runs: dict[tuple[float, int], list[dict[str, Any]]] = {}
    rounds = [allowance for _ in range(repeats) for allowance in ALLOWANCES]
    for allowance in track(rounds, "keeping", console=console):
        # Twice as much as the plan is made for, so that no allowance is cut by the budget.
        request = msgspec.json.encode(lab.request(plan, 2 * budget, 1))
        runs.setdefault(allowance, []).append(keeping_figures(request, *allowance))
    return [
        {
            "share": share,
            "bytes": allowed,
            **{name: statistics.median(run[name] for run in found) for name in found[0]},
        }
        for (share, allowed), found in runs.items()
    ]


def writing(folder: Path, repeats: int) -> list[dict[str, Any]]:
    rounds = [piece for _ in range(repeats) for piece in PIECES]
    seconds: dict[int, list[float]] = {}
    for piece in track(rounds, "writing", console=console):
        seconds.setdefault(piece, []).append(write_seconds(folder, piece))
    return [{"piece_bytes": piece, "seconds": statistics.median(seconds[piece])} for piece in PIECES]


@app.command()
def trainer_settings(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the figures go.")] = None,
    quick: Annotated[bool, typer.Option(help="Fewer images, once.")] = False,
    folder: Annotated[Path, typer.Option(help="Where weights, data and files go.")] = Path("runs/trainer-settings"),
) -> None:
    """Measures how long threads should spin, what a stage may keep, and in what pieces caches are written fastest."""
    folder = folder.resolve()
    images, repeats = (512, 1) if quick else (2560, 3)
    threads = waiting(folder, images, repeats)
    kept = keeping(folder, 2 * images, repeats)
    pieces = writing(folder, repeats)
    table = Table("batch", "spins", "alone, s", "two at once, s", title=f"an epoch of {images} images")
    for row in threads:
        table.add_row(
            str(row["batch"]), row["spins"], f"{row['alone_seconds']:.2f}", f"{row['two_at_once_seconds']:.2f}"
        )
    console.print(table)
    table = Table("may keep", "page faults", "seconds", "peak", title=f"three blocks, an epoch of {2 * images} images")
    for row in kept:
        table.add_row(
            f"{row['share']:.0%} and {format_size(row['bytes'])}",
            f"{row['page_faults']:,.0f}",
            f"{row['seconds']:.2f}",
            format_size(int(row["peak_bytes"])),
        )
    console.print(table)
    table = Table("piece", "seconds", title=f"a new file of {format_size(FILE_BYTES)}")
    for row in pieces:
        table.add_row(format_size(row["piece_bytes"]), f"{row['seconds']:.2f}")
    console.print(table)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(
            json.dumps({"images": images, "threads": threads, "keeping": kept, "pieces": pieces}, indent=1) + "\n"
        )


if __name__ == "__main__":
    app()
