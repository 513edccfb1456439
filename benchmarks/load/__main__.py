"""How many devices does one coordinator answer, and what do strangers take from them?

    python -m benchmarks.load --json FILE          2,000 agents; then 200 strangers with them, and 1,000
    python -m benchmarks.load --quick --json FILE  200 agents, 40 and 200 strangers, to see that it runs

The coordinator is a process as a user starts it, with certificates. Agents are light: clients on a TLS connection each,
that poll as agents do, and deliver an update without training when they are drawn. Strangers connect without a
certificate, to both ports, and do what costs most (benchmarks/load/strangers.py). All share the machine with the
coordinator, so that what agents and strangers cost themselves is in all figures.

    agents               connections that the kernel counts at the coordinator's port
    p50_seconds          of questions that need not wait (NextTask), from the call to the answer
    p99_seconds          the same
    tasks_per_second     questions that are answered when as many are asked as are answered, and nobody waits
    rss_bytes_per_agent  what the coordinator's resident memory grew by when all had connected and polled
    round_seconds        of a round of 16 devices that do not train, in the median
    processor_ms_per_task  processor time of the coordinator for one of them
    errors               calls that failed
    other_load           processes that the machine was busy with before: beside them, times say nothing
    round_slowdown       round_seconds with strangers over round_seconds without any: the larger of both floods
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from fedepth_wire.channel import open_channel
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationStub
from rich.console import Console
from rich.table import Table

from benchmarks.lab import Lab, lab, status_bytes
from benchmarks.load.fleet import Figures, Process, ask_all, enroll_many, merged, started
from benchmarks.transport.processes import processor_seconds
from fedepth.files import write_atomically
from fedepth.sizes import format_size

PROCESSES = 2  # of agents
DRAWN = 16
JOB = f"""\
[job]
name = "load"
rounds = 1000000
devices_per_round = {DRAWN}
gather_s = 0
lease_s = 60
round_deadline_s = 60
policy = "paper"

[model]
name = "digits-cnn"
classes = 10
input_shape = [1, 32, 32]
mean = [0.3]
std = [0.35]

[export]
every = 0
"""


@dataclass(frozen=True)
class Scale:
    """How much of everything.

    Attributes:
        strangers: who flood one time after the other.
        seconds: that each part is measured for.
    """

    agents: int
    strangers: tuple[int, ...]
    seconds: float
    burst_s: float


FULL = Scale(2000, (200, 1000), 40.0, 8.0)
QUICK = Scale(200, (40, 200), 6.0, 2.0)


class Rounds:
    """When rounds of the job have closed, as its coordinator tells."""

    def __init__(self) -> None:
        self.closed: list[float] = []

    async def watch(self, running: Lab) -> None:
        async with open_channel(running.address, running.certificates.operator) as channel:
            async for message in FederationStub(channel).Watch(pb.WatchRequest()):
                event = json.loads(message.json)
                if event["event"] == "round_closed":
                    self.closed.append(event["time"])

    def seconds(self, begun: float) -> list[float]:
        """How long the rounds took that have closed since."""
        ends = [each for each in self.closed if each >= begun]
        return [after - before for before, after in itertools.pairwise(ends)]


async def measure(running: Lab, scale: Scale, console: Console) -> dict[str, Any]:
    """All figures."""
    files = [running.folder / f"devices-{number}.json" for number in range(PROCESSES)]
    begun, other = time.monotonic(), round(os.getloadavg()[0], 1)
    await asyncio.to_thread(enroll_many, running.certificates, scale.agents, files)
    console.print(f"{scale.agents} certificates in {time.monotonic() - begun:.1f} s")
    job = running.folder / "job.toml"
    job.write_text(JOB)
    address = await asyncio.to_thread(running.start_coordinator, job)
    pid = running.processes["coordinator"].pid
    rounds = Rounds()
    async with AsyncExitStack() as stack:
        agents = [
            await stack.enter_async_context(
                started("benchmarks.load.agents", address, str(file), str(number), log=running.log(f"agents-{number}"))
            )
            for number, file in enumerate(files)
        ]
        before = status_bytes(pid, "VmRSS")
        begun = time.monotonic()
        first = merged(await ask_all(agents, "connect"))
        connected_s = time.monotonic() - begun
        console.print(f"{scale.agents} agents connected in {connected_s:.1f} s, {sum(first.errors.values())} errors")
        watching = asyncio.create_task(rounds.watch(running))
        try:
            await ask_all(agents, "poll")
            await asyncio.sleep(scale.seconds / 2)
            figures: dict[str, Any] = {
                "agents": connections(running.address),
                "rss_bytes_per_agent": round((status_bytes(pid, "VmRSS") - before) / scale.agents),
                "connect_seconds": round(connected_s, 1),
                **await _phase(agents, rounds, scale.seconds, pid),
            }
            _show(console, "nobody else", figures)
            errors = Counter(first.errors) + Counter(figures["errors"])
            flooded = []
            for count in scale.strangers:
                async with flood(running, count) as strangers:
                    await asyncio.sleep(scale.seconds / 4)
                    await strangers.ask("figures")
                    found = await _phase(agents, rounds, scale.seconds, pid)
                    found["strangers"] = count
                    found["connections_of_strangers"] = await strangers.ask("figures")
                    found["agents"] = connections(running.address)
                found["round_slowdown"] = round(found["round_seconds"] / figures["round_seconds"], 2)
                _show(console, f"{count} strangers", found)
                flooded.append(found)
            used = processor_seconds([pid])
            burst = merged(await ask_all(agents, f"burst {scale.burst_s}"))
            used = processor_seconds([pid]) - used
        finally:
            watching.cancel()
    errors += Counter(burst.errors)
    return {
        **figures,
        "tasks_per_second": round(burst.answers / scale.burst_s),
        "processor_ms_per_task": round(1000 * used / max(1, burst.answers), 2),
        "errors": sum(errors.values()),
        "round_slowdown": max(each["round_slowdown"] for each in flooded),
        "kinds_of_errors": dict(errors),
        "cores": len(os.sched_getaffinity(0)),
        "other_load": other,
        "flooded": [
            {**each, "errors": sum(each["errors"].values()), "kinds_of_errors": each["errors"]} for each in flooded
        ],
    }


async def _phase(agents: Sequence[Process], rounds: Rounds, seconds: float, pid: int) -> dict[str, Any]:
    """What agents and rounds are like for some time from now on."""
    await ask_all(agents, "figures")
    begun, used = time.time(), processor_seconds([pid])
    await asyncio.sleep(seconds)
    seen = merged(await ask_all(agents, "figures"))
    took = rounds.seconds(begun)
    return {
        **_percentiles(seen),
        "answers": seen.answers,
        "updates": seen.updates,
        "rounds": len(took),
        "round_seconds": round(statistics.median(took), 3) if took else seconds,
        "processor_share": round((processor_seconds([pid]) - used) / seconds, 2),
        "rss_bytes": status_bytes(pid, "VmRSS"),
        "errors": seen.errors,
    }


def _percentiles(seen: Figures) -> dict[str, float]:
    ordered = seen.seconds or [float("nan")]
    return {
        f"p{share}_seconds": round(ordered[min(len(ordered) - 1, len(ordered) * share // 100)], 4) for share in (50, 99)
    }


@asynccontextmanager
async def flood(running: Lab, count: int) -> AsyncIterator[Process]:
    """So many strangers, until the block ends."""
    folder = running.certificates.folder
    certificate = running.folder / "enrollment-certificate.pem"
    text = (folder / "enrollment.pem").read_text()
    certificate.write_text(text[text.index("-----BEGIN CERTIFICATE") :])
    host, _, port = running.address.rpartition(":")
    enrollment = (folder / "enrollment").read_text().strip().rpartition(":")[2]
    argv = (host, port, enrollment, str(certificate), str(count))
    async with started("benchmarks.load.strangers", *argv, log=running.log("strangers")) as process:
        yield process


def connections(address: str) -> int:
    """Established connections at a port of this machine, of clients."""
    wanted = f":{int(address.rpartition(':')[2]):04X}"
    found = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            found += fields[1].endswith(wanted) and fields[3] == "01"
    return found


def _show(console: Console, name: str, found: dict[str, Any]) -> None:
    console.print(
        f"{name}: {found['agents']} connections, p50 {found['p50_seconds']:.3f} s, p99 {found['p99_seconds']:.3f} s, "
        f"{found['answers']} answers, {found['rounds']} rounds of {found['round_seconds']:.2f} s, processors "
        f"{found['processor_share']:.2f}, {format_size(found['rss_bytes'])}, {sum(found['errors'].values())} errors "
        f"{found.get('connections_of_strangers', '')}",
        highlight=False,
    )
    for error, times in Counter(found["errors"]).most_common(3):
        console.print(f"  {times} times {error}", highlight=False, markup=False)


def main(
    output: Annotated[Path, typer.Option("--json", help="File for the figures.", dir_okay=False)],
    quick: Annotated[bool, typer.Option("--quick", help="200 agents, for seconds.")] = False,
) -> None:
    """Measure a coordinator with many agents, and with strangers."""
    console = Console()
    with tempfile.TemporaryDirectory(prefix="load-") as name, lab(Path(name)) as running:
        figures = asyncio.run(measure(running, QUICK if quick else FULL, console))
    write_atomically(output, json.dumps(figures, indent=1).encode() + b"\n")
    table = Table("figure", "value")
    for key in (
        "agents",
        "p50_seconds",
        "p99_seconds",
        "tasks_per_second",
        "rss_bytes_per_agent",
        "errors",
        "round_seconds",
        "round_slowdown",
    ):
        table.add_row(key, str(figures[key]))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
