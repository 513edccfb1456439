"""An agent on a bench: a fake coordinator, a real child process that speaks the trainer's protocol, and no waiting."""

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
from structlog.testing import capture_logs

from edge_client.agent import Agent, Surroundings
from edge_client.backoff import Clock
from edge_client.call_errors import UnreachableError
from edge_client.config import Config, load
from edge_client.memory.probe import Memory
from edge_client.outbox import Entry
from edge_client.transport import Accepted, Answer, Finished, Part, Refused
from fedepth.budget import MemoryLimit
from fedepth.plan import Plan
from fedepth.task import DeviceReport, Failure, Progress, Result, Task
from tests.edge_client.conftest import GRAPH, checked_here, rows_checked_here

MIB = 1 << 20
START = 10 * MIB  # what the fake trainer says of itself
FAKE_TRAINER = Path(__file__).with_name("fake_trainer.py")
AWAY = UnreachableError("host:1: UNAVAILABLE")
OK = {"do": "ok"}
MakeTask = Callable[..., Task]
PlanFor = Callable[[int], Plan]


class FakeClock(Clock):
    """Time passes only in pauses."""

    def __init__(self) -> None:
        self.time = 0.0
        self.pauses: list[float] = []

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.pauses.append(seconds)
        await asyncio.sleep(0)


@dataclass
class FakeTransport:
    """Gives scripted answers, and then says that the job is over. Exceptions among them are raised."""

    weights: Path
    answers: list[Answer | Exception]
    deliveries: list[Accepted | Refused | Exception] = field(default_factory=list)
    fetches: list[Exception] = field(default_factory=list)
    parts: list[Exception] = field(default_factory=list)
    unwanted_in_training: str = ""
    address: str = "host:1"
    moved_bytes: int = 0
    calls: list[str] = field(default_factory=list)
    reports: list[DeviceReport] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    delivered: list[Result] = field(default_factory=list)
    closed: bool = False

    async def next_task(self, report: DeviceReport, wait_s: float) -> Answer:
        self.calls.append("next_task")
        self.reports.append(report)
        answer = self.answers.pop(0) if self.answers else Finished("job", 4)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def fetch_graph(self, task: Task) -> Path:
        path = self.weights.with_name("graph.json")
        path.write_bytes(GRAPH)
        return path

    async def fetch_weights(self, task: Task) -> Path:
        if self.fetches:
            raise self.fetches.pop(0)
        return self.weights

    async def send_part(self, part: Part) -> Refused | None:
        self.calls.append("send_part")
        assert part.path.read_bytes() == b"trained"
        assert (part.task_id, part.attempt, part.device_id, part.info.part) == ("t1", 1, "device", 0)
        if self.parts:
            raise self.parts.pop(0)
        return None

    async def deliver(self, entry: Entry) -> Accepted | Refused:
        self.calls.append("deliver")
        answer = self.deliveries.pop(0) if self.deliveries else Accepted(entry.result.round)
        if isinstance(answer, Exception):
            raise answer
        while self.progress[-1:] == [] or self.progress[-1].activity != "uploading":
            await asyncio.sleep(0)  # the lease is renewed during an upload
        self.delivered.append(entry.result)
        return answer

    async def report_failure(self, failure: Failure) -> bool:
        self.failures.append(failure)
        return True

    async def report_progress(self, progress: Progress) -> bool:
        self.progress.append(progress)
        return progress.task_id != self.unwanted_in_training or progress.stage_count == 0

    async def close(self) -> None:
        self.closed = True


@dataclass
class Insisting(FakeTransport):
    """Offers one task, a new attempt each time, until an update of it has arrived."""

    task: Task | None = None
    attempt: int = 0

    async def next_task(self, report: DeviceReport, wait_s: float) -> Answer:
        if not self.delivered and self.task is not None:
            self.attempt += 1
            self.answers = [replace(self.task, attempt=self.attempt)]
        return await super().next_task(report, wait_s)


@dataclass
class Bench:
    """An agent's surroundings in one folder, and what happened in them."""

    root: Path
    data: Path
    available: int = 400 * MIB
    clock: FakeClock = field(default_factory=FakeClock)
    logs: list[Any] = field(default_factory=list)

    @property
    def state(self) -> Path:
        return self.root / "state"

    def config(self, **overrides: Any) -> Config:
        settings = {
            "coordinator": "host:1",
            "data": str(self.data),
            "state": str(self.state),
            "memory.reserve": 0,
            "memory.fraction": 1.0,
        }
        return load(None, settings | {name.replace("__", "."): value for name, value in overrides.items()})

    def memory(self) -> Memory:
        # Available is all of the limit, so that what the fake trainer holds cannot add to it.
        return Memory(1000 * MIB, (MemoryLimit("test", self.available, self.available),))

    def agent(self, transport: FakeTransport, scenes: list[Any], *, stay: bool = False, **overrides: Any) -> Agent:
        (self.root / "scenes.json").write_text(json.dumps(scenes))
        argv = [sys.executable, str(FAKE_TRAINER), str(self.root / "scenes.json"), str(self.root / "journal")]
        around = Surroundings(
            trainer_argv=argv,
            check_files=checked_here,
            check_rows=rows_checked_here,
            measure=self.memory,
            clock=self.clock,
        )
        config = self.config(**overrides)
        return Agent(config, "device", transport, exit_when_done=not stay, surroundings=around)

    def run(self, transport: FakeTransport, *scenes: Any, **overrides: Any) -> None:
        with capture_logs() as logs:
            asyncio.run(asyncio.wait_for(self.agent(transport, list(scenes), **overrides).run(), 60))
        self.logs.extend(logs)

    @property
    def requests(self) -> list[Any]:
        path = self.root / "journal"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def plans(self) -> list[Plan]:
        return [msgspec.convert(request["plan"], Plan) for request in self.requests]

    def said(self, event: str) -> list[Any]:
        return [line for line in self.logs if line["event"] == event]
