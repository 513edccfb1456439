"""Bad links: does an update get through, and how much is sent twice?

A real coordinator, and the agent's own transport behind a proxy (benchmarks.bad_link) that cuts, throttles, delays,
freezes and half-closes connections; coordinator and device are killed in between. Every scenario is a round of one
device that has nothing yet: it fetches graph and weights, and delivers an update of all of them.

Counted is what the device asks for and sends of files, lost bytes included. What passes through the proxy meanwhile,
with all framing and a TLS handshake for every connection, stands beside it (`link_fraction`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import structlog
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.bad_link import BadLink, Faults, bad_link
from benchmarks.certificates import LabCertificates
from benchmarks.lab import Lab, lab
from coordinator.cli import read_record
from edge_client.call_errors import TemporaryError
from edge_client.outbox import Entry, part_name
from edge_client.transport import Accepted, GrpcTransport, Refused
from fedepth.budget import Budget
from fedepth.errors import ChildError, ProtocolError
from fedepth.files import file_digest, write_atomically
from fedepth.sizes import format_size
from fedepth.task import SETTINGS, DeviceReport, PartInfo, Result, StageResult, Task
from fedepth.timeout import within
from fedepth.weights import load_numpy, save

RETRY_S = 0.2  # an agent's shortest pause
STALL_S = 5.0  # of the device in these scenarios; what is frozen is frozen for longer
LIMIT_S = 300.0  # for one scenario
CLOSE_S = 20.0  # until the last round is closed
SAMPLES = 64
SMALL = "benchmarks.links:small_model"
KB = 1000
_GIB = 1 << 30
JOB = """\
[job]
name = "links"
rounds = {rounds}
devices_per_round = 1
gather_s = 0
lease_s = 60
round_deadline_s = 600
policy = "paper"

[model]
name = "{model}"
classes = 10
input_shape = {shape}
mean = [0.3]
std = [0.35]

[training]
batch = 32

[export]
every = 0
"""

T = TypeVar("T")


@dataclass(frozen=True)
class Scenario:
    """A link, and who is killed while files move over it.

    Attributes:
        killed: "coordinator" or "device", each time another third of the files has moved; "" for nobody.
        model: of a link on which a large one would take hours, a small one.
    """

    name: str
    faults: Faults
    killed: str = ""
    model: str = "digits-cnn"


SCENARIOS = (
    Scenario("a good link", Faults()),
    Scenario("cut every 40 kB", Faults(cut_after=40 * KB)),
    Scenario("cut every 150 kB, 100 ms away", Faults(cut_after=150 * KB, delay_s=0.05)),
    Scenario("cut every 40 kB, 20 kB/s", Faults(cut_after=40 * KB, bytes_per_s=20 * KB)),
    Scenario("600 ms away", Faults(delay_s=0.3)),
    Scenario("frozen for longer than a stall every 100 kB", Faults(freeze_after=100 * KB, freeze_s=STALL_S + 1)),
    Scenario("half-closed every 80 kB", Faults(half_close_after=80 * KB)),
    Scenario("the device is killed", Faults(bytes_per_s=100 * KB), "device"),
    Scenario("the coordinator is killed", Faults(bytes_per_s=100 * KB), "coordinator"),
    Scenario("2 kB/s", Faults(bytes_per_s=2 * KB), model=SMALL),
    Scenario("2 kB/s, cut every 40 kB", Faults(bytes_per_s=2 * KB, cut_after=40 * KB), model=SMALL),
)
QUICK = ("cut every 40 kB", "half-closed every 80 kB", "the device is killed")


@dataclass
class Outcome:
    """What became of one scenario. Sizes in bytes.

    Attributes:
        files_down, files_up: of the files.
        down, up: of files that were asked for and sent, whatever became of them.
        link_down, link_up: that passed through the proxy, with TLS and all framing.
    """

    name: str
    delivered: bool = False
    lost: int = 0
    seconds: float = 0.0
    files_down: int = 0
    files_up: int = 0
    down: int = 0
    up: int = 0
    link_down: int = 0
    link_up: int = 0
    cuts: int = 0
    killed: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def sent_twice_fraction(self) -> float:
        """What was sent beyond the files themselves, at most: what was asked for and not sent any more before a cut
        counts as well, as far as so many bytes have passed the link."""
        files = self.files_down + self.files_up
        return self.passed / files - 1 if files else 0.0

    @property
    def passed(self) -> int:
        """Bytes of files that were sent, at most."""
        return min(self.down, self.link_down) + min(self.up, self.link_up)


def small_model() -> Any:
    """A classifier of the same pictures as the other scenarios' model, with a tenth of its parameters."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


class Device:
    """The transport of an agent, on a state directory of its own, and what an agent does with it."""

    def __init__(self, link: BadLink, folder: Path, certificates: LabCertificates, name: str) -> None:
        self._link, self._folder = link, folder
        device_id, self._identity = certificates.device(name)
        budget = Budget(8 * _GIB, 8 * _GIB, (), 0, 0, 1.0, 0, _GIB)
        counts = (SAMPLES - 9 * (SAMPLES // 10), *(SAMPLES // 10,) * 9)
        self.report = DeviceReport(device_id, name, budget, SAMPLES, counts, settings=SETTINGS, instance="0" * 16)
        self._spent = 0
        self.transport = self._new_transport()

    def _new_transport(self) -> GrpcTransport:
        return GrpcTransport(f"127.0.0.1:{self._link.port}", self._folder, self._identity, STALL_S)

    @property
    def spent_bytes(self) -> int:
        """Of all its transports."""
        return self._spent + self.transport.spent_bytes

    async def restart(self) -> None:
        self._spent = self.spent_bytes
        await self.transport.close()
        self.transport = self._new_transport()

    async def until_done(self, call: Callable[[GrpcTransport], Awaitable[T]], errors: list[str]) -> T:
        """As an agent: tries again while that may help."""
        while True:
            try:
                return await call(self.transport)
            except (TemporaryError, ProtocolError) as error:
                if str(error) not in errors:
                    errors.append(str(error))
                await asyncio.sleep(RETRY_S)

    async def task(self, errors: list[str]) -> Task:
        while True:
            answer = await self.until_done(lambda transport: transport.next_task(self.report, 5), errors)
            if isinstance(answer, Task):
                return answer
            await asyncio.sleep(getattr(answer, "after_s", RETRY_S))


def update(task: Task, weights: Path, folder: Path, device_id: str) -> Entry:
    """An update of all tensors: the weights and a little noise."""
    random = np.random.default_rng(task.round)
    tensors = load_numpy(weights)
    changed = {
        name: tensor + random.normal(0, 1e-4, tensor.shape).astype(tensor.dtype) if tensor.dtype.kind == "f" else tensor
        for name, tensor in tensors.items()
    }
    path = folder / "update" / part_name(0)
    path.parent.mkdir()
    save(path, changed)
    stages = tuple(
        StageResult(s.first, s.last, s.micro_batch, s.predicted_peak_bytes, 1, 1, 1, _GIB, 2.0, 1.0, 2, SAMPLES, 0.1)
        for s in task.plan.stages
    )
    part = PartInfo(0, path.stat().st_size, file_digest(path))
    units = task.plan.trained_units
    return Entry(
        path.parent,
        Result(
            task.task_id, task.attempt, device_id, task.round, SAMPLES, task.plan, units, stages, (part,), 0.1, "none",
            1, task.weights_digest,
        ),
    )  # fmt: skip


async def play(scenario: Scenario, running: Lab, folder: Path, restart: Callable[[], Awaitable[int]]) -> Outcome:
    """One round over one link."""
    outcome = Outcome(scenario.name)
    begun = time.monotonic()
    target = int(running.address.rpartition(":")[2])
    name = f"device-{folder.name}"
    async with bad_link(target, dataclasses.replace(scenario.faults)) as link:
        device = Device(link, folder, running.certificates, name)
        try:
            await within(LIMIT_S, _round(scenario, device, link, folder, restart, outcome))
        except asyncio.TimeoutError:
            outcome.errors.append(f"not delivered within {LIMIT_S:.0f} s")
        finally:
            await device.transport.close()
        outcome.cuts = link.cuts
    outcome.seconds = time.monotonic() - begun
    return outcome


async def _round(
    scenario: Scenario,
    device: Device,
    link: BadLink,
    folder: Path,
    restart: Callable[[], Awaitable[int]],
    outcome: Outcome,
) -> None:
    task = await device.task(outcome.errors)

    async def fetch(transport: GrpcTransport) -> Path:
        await transport.fetch_graph(task)
        return await transport.fetch_weights(task)

    before, spent = link.down, device.spent_bytes
    outcome.files_down = task.graph_bytes + task.weights_bytes
    weights = await _disturbed(scenario, device, link, restart, fetch, outcome, outcome.files_down)
    outcome.down, outcome.link_down = device.spent_bytes - spent, link.down - before
    entry = await asyncio.to_thread(update, task, weights, folder, device.report.device_id)
    before, spent = link.up, device.spent_bytes
    outcome.files_up = sum(part.size_bytes for part in entry.result.parts)

    async def deliver(transport: GrpcTransport) -> Accepted | Refused:
        return await transport.deliver(entry)

    answer = await _disturbed(scenario, device, link, restart, deliver, outcome, outcome.files_up)
    outcome.up, outcome.link_up = device.spent_bytes - spent, link.up - before
    outcome.delivered = isinstance(answer, Accepted)
    if isinstance(answer, Refused):
        outcome.errors.append(answer.message)


async def _disturbed(
    scenario: Scenario,
    device: Device,
    link: BadLink,
    restart: Callable[[], Awaitable[int]],
    call: Callable[[GrpcTransport], Awaitable[T]],
    outcome: Outcome,
    size: int,
) -> T:
    """A call, during which somebody is killed when a third and two thirds of `size` bytes have passed the link."""
    before = link.down + link.up
    working = asyncio.ensure_future(device.until_done(call, outcome.errors))
    marks = [size // 3, 2 * size // 3] if scenario.killed else []
    try:
        while not working.done():
            if marks and link.down + link.up - before >= marks[0]:
                marks.pop(0)
                outcome.killed += 1
                if scenario.killed == "coordinator":
                    link.target = await restart()
                else:
                    working.cancel()
                    await asyncio.wait({working})
                    await device.restart()
                    working = asyncio.ensure_future(device.until_done(call, outcome.errors))
            await asyncio.wait({working}, timeout=0.02)
        return working.result()
    finally:
        working.cancel()


async def run(running: Lab, job: Path, scenarios: Sequence[Scenario], console: Console) -> list[Outcome]:
    """All of these, one after the other, against one coordinator."""

    def restarted() -> int:
        process = running.processes["coordinator"]
        process.send_signal(signal.SIGKILL)
        process.wait()
        running.start_coordinator(job)
        return int(running.address.rpartition(":")[2])

    outcomes = []
    for number, scenario in enumerate(scenarios):
        folder = running.folder / str(number)
        folder.mkdir()
        outcome = await play(scenario, running, folder, lambda: asyncio.to_thread(restarted))
        outcomes.append(outcome)
        console.print(
            f"{scenario.name}: {'delivered' if outcome.delivered else 'NOT delivered'} in {outcome.seconds:.1f} s, "
            f"{outcome.cuts} cuts, {outcome.sent_twice_fraction:.1%} sent twice"
        )
    return outcomes


def played(folder: Path, names: Sequence[str] = (), console: Console | None = None) -> list[Outcome]:
    """These scenarios, or all of them, with what the coordinator's record has lost of what was acknowledged."""
    outcomes = []
    for number, model in enumerate(dict.fromkeys(each.model for each in SCENARIOS)):
        chosen = [each for each in SCENARIOS if each.model == model and (not names or each.name in names)]
        if chosen:
            outcomes += _played(folder / f"job-{number}", model, chosen, console or Console(quiet=True))
    return outcomes


def _played(folder: Path, model: str, scenarios: Sequence[Scenario], console: Console) -> list[Outcome]:
    folder.mkdir(parents=True)
    job = folder / "job.toml"
    job.write_text(JOB.format(rounds=len(scenarios) + 1, model=model, shape=[1, 32, 32]))
    with lab(folder) as running:
        running.start_coordinator(job)
        outcomes = asyncio.run(run(running, job, scenarios, console))
        end = time.monotonic() + CLOSE_S
        while max(closed := _closed(running), default=0) < len(outcomes) and time.monotonic() < end:
            time.sleep(RETRY_S)
    for number, outcome in enumerate(outcomes, 1):
        outcome.lost = int(outcome.delivered and closed.get(number) != 1)
    return outcomes


def _closed(running: Lab) -> dict[int, int]:
    """The rounds in the coordinator's record, and of how many devices there is an update in each."""
    record: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(read_record(running.coordinator_state)))
    return {each["round"]: each["devices"] for each in record["rounds"]}


def main(
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="Only the scenarios with these names.")] = None,
) -> None:
    console = Console()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
    with tempfile.TemporaryDirectory() as folder:
        outcomes = played(Path(folder), tuple(only or ()), console)
    files = sum(each.files_down + each.files_up for each in outcomes)
    figures = {
        "delivered": sum(each.delivered for each in outcomes),
        "scenarios": len(outcomes),
        "lost": sum(each.lost for each in outcomes),
        "sent_twice_fraction": sum(each.passed for each in outcomes) / files - 1,
        "link_fraction": sum(each.link_down + each.link_up for each in outcomes) / files - 1,
        "worst_sent_twice_fraction": max(each.sent_twice_fraction for each in outcomes),
        "by_scenario": {
            each.name: {**dataclasses.asdict(each), "sent_twice_fraction": each.sent_twice_fraction}
            for each in outcomes
        },
    }
    shown = Table(title="bad links")
    for column in ("scenario", "delivered", "lost", "seconds", "cuts", "killed", "files", "sent twice"):
        shown.add_column(column, justify="left" if column == "scenario" else "right")
    for each in outcomes:
        shown.add_row(
            each.name, str(each.delivered), str(each.lost), f"{each.seconds:.1f}", str(each.cuts), str(each.killed),
            format_size(each.files_down + each.files_up), f"{each.sent_twice_fraction:.1%}",
        )  # fmt: skip
    console.print(shown)
    if json is not None:
        write_atomically(json, msgspec.json.format(msgspec.json.encode(figures)) + b"\n")
    if not all(each.delivered and not each.lost for each in outcomes):
        raise ChildError("an update was not delivered, or lost")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        typer.run(main)
