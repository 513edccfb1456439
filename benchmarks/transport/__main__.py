"""What does a round cost beyond training? 44.7 MB of weights down and up for every client, and the average of them.

    python -m benchmarks.transport --json FILE                  ours against a bare loop over gRPC
    python -m benchmarks.transport --rivals flower --json FILE  and against Flower, in a virtual environment of its own

ResNet-18, whose training is replaced by one multiplication on both sides. Ours is the real coordinator with real
agents: everything durable, digests checked, updates admitted. The bare loop does nothing of that, and Flower is run
without encryption and without a database. All in turn on one machine, over loopback, so that ratios can be trusted and
seconds cannot.

    flower_seconds_ratio     seconds of one of Flower's rounds over ours: the smallest over the numbers of clients
    flower_cpu_ratio         the same of processor seconds, of all processes
    floor_seconds_ratio      seconds of one of our rounds over one of the bare loop: the largest
    server_bytes_per_client  what the coordinator's peak grows by with each further client
    idle_agent_rss_bytes     of an agent that waits for work
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.lab import lab
from benchmarks.transport import flower, ours
from benchmarks.transport.rounds import largest, observe
from fedepth.child import module_argv
from fedepth.errors import ChildError
from fedepth.files import write_atomically
from fedepth.sizes import format_size

CLIENTS = (2, 4, 8)
ROUNDS = 9
SKIP = 2  # rounds in which processes start and caches fill
MODEL_BYTES = 44_700_000


def bare_loop(folder: Path, clients: int, rounds: int, skip: int, model_bytes: int) -> dict[str, Any]:
    """Rounds of the bare loop."""
    folder.mkdir(parents=True)
    port, ends = folder / "port", folder / "ends"
    ends.touch()
    module = module_argv("benchmarks.transport.bare")
    size = str(model_bytes // 4 * 4)
    # The last round would end with its processes.
    all_rounds = str(rounds + 1)
    with lab(folder) as running:
        running.start("server", [*module, "server", str(port), str(clients), all_rounds, size, str(ends)])
        names = [f"client-{number}" for number in range(clients)]
        for name in names:
            running.start(name, [*module, "client", str(port), all_rounds])
        pids = {name: process.pid for name, process in running.processes.items()}

        def finished() -> int:
            done = len(ends.read_text().splitlines())
            for name, process in running.processes.items():
                if done < rounds and process.poll() is not None:
                    raise ChildError(f"{name} ended with status {process.returncode}; see {running.log(name)}")
            return min(done, rounds)

        seen = observe(rounds, finished, pids)
        return {
            **seen.figures(skip),
            "server_peak_bytes": largest(seen.peaks, ["server"]),
            "device_peak_bytes": largest(seen.peaks, names),
        }


def summary(found: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """The figures that stand for all, from those of every system by number of clients."""
    mine, floor, rival = found["fedepth"], found["bare_loop"], found.get("flower", {})
    few, many = min(mine, key=int), max(mine, key=int)
    made: dict[str, Any] = {
        "floor_seconds_ratio": round(max(mine[each]["seconds"] / floor[each]["seconds"] for each in mine), 2),
        "idle_agent_rss_bytes": max(figures["agent_idle_bytes"] for figures in mine.values()),
    }
    if few != many:
        growth = mine[many]["server_peak_bytes"] - mine[few]["server_peak_bytes"]
        made["server_bytes_per_client"] = round(growth / (int(many) - int(few)))
    if rival:
        for key, figure in (("flower_seconds_ratio", "seconds"), ("flower_cpu_ratio", "processor_seconds")):
            made[key] = round(min(rival[each][figure] / mine[each][figure] for each in mine), 2)
    return made


def main(
    output: Annotated[Path, typer.Option("--json", help="File for all figures.", dir_okay=False)],
    rivals: Annotated[str, typer.Option(help='"flower", or nothing.')] = "",
    clients: Annotated[str, typer.Option(help="Numbers of clients, separated by commas.")] = "2,4,8",
    rounds: Annotated[int, typer.Option(min=SKIP + 2, help="Rounds of each.")] = ROUNDS,
    folder: Annotated[Path, typer.Option(help="For states, logs, and Flower.")] = Path("runs/transport"),
) -> None:
    """Measure rounds without training."""
    console = Console()
    if rivals not in ("", "flower"):
        raise SystemExit(f"--rivals {rivals}: there is flower")
    place = folder.resolve()
    programs = flower.installed(place / "flower") if rivals else None
    found: dict[str, dict[str, dict[str, Any]]] = {"fedepth": {}, "bare_loop": {}, **({"flower": {}} if rivals else {})}
    model_bytes = MODEL_BYTES
    for count in map(int, clients.split(",")):
        for system in found:
            console.print(f"{system}, {count} clients")
            work = place / f"{system}-{count}"
            shutil.rmtree(work, ignore_errors=True)
            if system == "fedepth":
                figures = ours.run(work, count, rounds, SKIP)
                model_bytes = figures["model_bytes"]
            elif system == "bare_loop":
                figures = bare_loop(work, count, rounds, SKIP, model_bytes)
            else:
                assert programs is not None
                figures = flower.run(work, count, rounds, SKIP, programs=programs, model_bytes=model_bytes)
            found[system][str(count)] = figures
    written = {
        **summary(found),
        "cores": len(os.sched_getaffinity(0)),
        "flower": flower.version(programs) if programs else "",
        "systems": found,
    }
    write_atomically(output, json.dumps(written, indent=1).encode() + b"\n")
    table = Table("system", "clients", "seconds", "processor s", "server's peak", "device's peak")
    for system, by_clients in found.items():
        for number, figures in by_clients.items():
            peaks = (format_size(figures[key]) for key in ("server_peak_bytes", "device_peak_bytes"))
            seconds = (f"{figures[key]:.2f}" for key in ("seconds", "processor_seconds"))
            table.add_row(system, number, *seconds, *peaks)
    console.print(table)
    console.print(summary(found))


if __name__ == "__main__":
    typer.run(main)
