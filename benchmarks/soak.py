"""Whether a coordinator stays as it is over thousands of rounds: memory, disk, open files and rows of its record.

    python -m benchmarks.soak --json FILE                  2,000 rounds with 20 simulated devices
    python -m benchmarks.soak --rounds 200 --json FILE     fewer

The coordinator is a process as a user starts it, with retention as its job file says. Devices are clients in this
process: their updates are of the first unit alone, valid and small. Growth is counted from round 100 to the end, by
then everything has been loaded and the first retention has run; in a run of fewer than 200 rounds, from the middle on.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from fedepth_wire.channel import open_channel
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationStub
from rich.console import Console
from rich.table import Table

from benchmarks.faults.workplace import SPEC
from benchmarks.lab import Lab, lab, status_bytes
from benchmarks.simulated_device import Fetched, SimulatedDevice
from fedepth.data.idx import write_idx
from fedepth.data.read import open_images
from fedepth.errors import ChildError
from fedepth.plan import Plan
from fedepth.sizes import format_size
from fedepth.task import Task

ROUNDS = 2000
DEVICES = 20
SETTLED = 100  # the round from which on nothing may grow
POINTS = 40  # of the curve
TEST_IMAGES = 20
STUCK_S = 300.0
JOB = """\
[job]
name = "soak"
rounds = {rounds}
devices_per_round = {devices}
quorum = {devices}
round_deadline_s = 120
gather_s = 1
lease_s = 60
seed = 1

[model]
name = "digits-cnn"
classes = 10
input_shape = [1, 32, 32]
mean = [0.3]
std = [0.35]

[training]
schedule = "constant"

[test]
data = "{test}"
"""
RETENTION = "\n[retention]\nkeep_last = 3\nkeep_best = true\nkeep_every = 0\nhistory = 20\n"


@dataclass(frozen=True)
class Point:
    """The coordinator after a round. Sizes are bytes; `rss_bytes` is the median since the point before; `rows` of all
    tables, by name."""

    round: int
    seconds: float
    rss_bytes: int
    disk_bytes: int
    open_files: int
    rows: dict[str, int]


def main(
    output: Annotated[Path, typer.Option("--json", help="The figures.")],
    rounds: Annotated[int, typer.Option(min=4, help="Rounds of the job.")] = ROUNDS,
    devices: Annotated[int, typer.Option(min=1, help="Simulated devices.")] = DEVICES,
    retention: Annotated[bool, typer.Option(help="Whether the job file has a [retention] section.")] = True,
) -> None:
    """Run a job for a long time and measure what grows."""
    console = Console()
    with tempfile.TemporaryDirectory(prefix="soak-") as name, lab(Path(name)) as running:
        points = asyncio.run(_soak(running, rounds, devices, retention, console))
    result = _figures(points)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    console.print(_table(points))
    for key in ("rss_growth_bytes", "disk_growth_bytes"):
        console.print(f"{key} {result[key]} ({format_size(abs(result[key]))})")
    for key in ("open_files_growth", "rows_growth_per_round"):
        console.print(f"{key} {result[key]}")


async def _soak(running: Lab, rounds: int, devices: int, retention: bool, console: Console) -> list[Point]:
    test = running.folder / "test"
    _write_test(test)
    job = running.folder / "job.toml"
    section = RETENTION if retention else ""
    job.write_text(JOB.format(rounds=rounds, devices=devices, test=test) + section)
    address = running.start_coordinator(job)
    fetched = Fetched()
    async with AsyncExitStack() as channels:
        operator = await channels.enter_async_context(open_channel(address, running.certificates.operator))
        clients = []
        for number in range(devices):
            device_id, identity = running.certificates.device(f"device-{number:02d}")
            channel = await channels.enter_async_context(open_channel(address, identity))
            clients.append(SimulatedDevice(channel, device_id, fetched=fetched))
        working = [asyncio.create_task(_work(client, number)) for number, client in enumerate(clients)]
        watching: asyncio.Task[Any] = asyncio.create_task(_watch(running, FederationStub(operator), rounds, console))
        try:
            await asyncio.wait({watching, *working}, return_when=asyncio.FIRST_EXCEPTION)
            for task in working:
                if task.done() and not watching.done():
                    task.result()
            points: list[Point] = await watching
            return points
        finally:
            for task in (watching, *working):
                task.cancel()
            await asyncio.wait({watching, *working})


async def _work(client: SimulatedDevice, number: int) -> None:
    """Takes part until the job is finished."""
    while True:
        reply = await client.ask()
        if reply.WhichOneof("outcome") == "finished":
            return
        if reply.WhichOneof("outcome") == "rejected":
            raise ChildError(f"{client.device_id} was rejected: {reply.rejected.message}")
        task = await client.task_in(reply)
        if task is not None:
            await _deliver(client, task, number)
        elif reply.WhichOneof("outcome") == "retry":
            await asyncio.sleep(min(1.0, reply.retry.retry_after_ms / 1000))


async def _deliver(client: SimulatedDevice, task: Task, number: int) -> None:
    plan = smallest(task.plan)
    part = await client.update(task, plan, 1e-4, task.round * 1000 + number)
    await client.upload(task, part)
    reply = await client.commit(client.result(task, plan, [part]))
    if reply.WhichOneof("outcome") != "accepted":
        raise ChildError(f"{client.device_id}: the update of round {task.round} was refused: {reply.refused.message}")


def smallest(plan: Plan) -> Plan:
    """A plan that trains the first unit alone, and not the head."""
    first = plan.trained_units[0]
    rest = sorted({*plan.trained_units, *plan.untrained} - {first})
    stage = replace(plan.stages[0], first=first, last=first, frozen_suffix=False)
    return replace(plan, stages=(stage,), untrained=tuple(rest))


async def _watch(running: Lab, operator: Any, rounds: int, console: Console) -> list[Point]:
    """Measures after every few rounds until the last."""
    points: list[Point] = []
    begun = moved = time.monotonic()
    last = 0
    pid = running.processes["coordinator"].pid
    resident: list[int] = []  # since the last point; it rises and falls by some MiB within a round
    wanted = sorted({1, min(SETTLED, rounds // 2), *range(0, rounds + 1, max(1, rounds // POINTS)), rounds} - {0})
    while True:
        status = await operator.JobStatus(pb.JobStatusRequest(), timeout=60)
        finished = status.phase == "finished"
        done = rounds if finished else status.round - 1
        if done != last:
            last, moved = done, time.monotonic()
        elif time.monotonic() - moved > STUCK_S:
            raise ChildError(f"round {done + 1} does not end: {status.phase}; see {running.log('coordinator')}")
        resident.append(status_bytes(pid, "VmRSS"))
        if wanted and done >= wanted[0]:
            wanted = [number for number in wanted if number > done]
            usual = statistics.median_high(resident)
            point = await asyncio.to_thread(_measure, running, done, time.monotonic() - begun, usual)
            points.append(point)
            resident.clear()
            console.print(
                f"round {done:5} of {rounds} after {point.seconds:7.1f} s: {format_size(point.rss_bytes)} resident, "
                f"{format_size(point.disk_bytes)} on disk, {point.open_files} files open, "
                f"{sum(point.rows.values())} rows",
                highlight=False,
            )
        if finished:
            return points
        await asyncio.sleep(0.05)


def _measure(running: Lab, done: int, seconds: float, rss_bytes: int) -> Point:
    pid = running.processes["coordinator"].pid
    state = running.coordinator_state
    return Point(
        done,
        round(seconds, 2),
        rss_bytes,
        disk_bytes(state),
        sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
        rows_of(state / "job.sqlite"),
    )


def disk_bytes(folder: Path) -> int:
    """What the files below a folder take on the disk."""
    total = 0
    for name, _, files in os.walk(folder):  # which passes over folders that vanish
        for file in files:
            try:
                total += (Path(name) / file).lstat().st_blocks * 512
            except FileNotFoundError:
                continue  # a spool has gone
    return total


def rows_of(database: Path) -> dict[str, int]:
    """The number of rows of every table."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as connection:
        names = [row[1] for row in connection.execute("PRAGMA table_list") if row[2] == "table"]
        return {
            name: int(connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0])
            for name in sorted(names)
            if not name.startswith("sqlite_")
        }


def _figures(points: Sequence[Point]) -> dict[str, Any]:
    last = points[-1]
    settled = next(point for point in points if point.round >= min(SETTLED, last.round // 2))
    grown = max(1, last.round - settled.round)
    rows = {name: round((count - settled.rows.get(name, 0)) / grown, 4) for name, count in last.rows.items()}
    return {
        "rounds": last.round,
        "counted_from_round": settled.round,
        "rss_growth_bytes": last.rss_bytes - settled.rss_bytes,
        "disk_growth_bytes": last.disk_bytes - settled.disk_bytes,
        "open_files_growth": last.open_files - settled.open_files,
        "rows_growth_per_round": round(sum(rows.values()), 4),
        "rows_growth_by_table": rows,
        "seconds_per_round": {
            "until_then": round(settled.seconds / settled.round, 3),
            "from_then_on": round((last.seconds - settled.seconds) / grown, 3),
        },
        "curve": [asdict(point) for point in points],
    }


def _table(points: Sequence[Point]) -> Table:
    table = Table("round", "seconds a round", "resident", "on disk", "open files", "rows")
    for before, point in zip((None, *points[:-1]), points, strict=True):
        seconds = point.seconds - (before.seconds if before else 0)
        number = point.round - (before.round if before else 0)
        table.add_row(
            str(point.round),
            f"{seconds / max(1, number):.2f}",
            format_size(point.rss_bytes),
            format_size(point.disk_bytes),
            str(point.open_files),
            str(sum(point.rows.values())),
        )
    return table


def _write_test(folder: Path) -> None:
    folder.mkdir()
    digits = open_images("digits", SPEC, "test")
    chosen = np.arange(TEST_IMAGES)
    write_idx(folder / "t10k-images-idx3-ubyte", np.ascontiguousarray(digits.read(chosen)[:, 0]))
    write_idx(folder / "t10k-labels-idx1-ubyte", digits.labels[chosen].astype("uint8"))


if __name__ == "__main__":
    typer.run(main)
