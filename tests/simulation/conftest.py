"""Whole simulations in this process: the workers' own code, without processes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from fedepth.preparation import Preparation
from fedepth.simulation import setup, simulate
from fedepth.simulation.engine import Answer, Queue
from fedepth.simulation.partitions import Partition, Share, save_partition
from fedepth.simulation.record import RoundLine
from fedepth.simulation.setup import Options
from fedepth.simulation.worker import process
from fedepth.simulation.worker.process import Worker
from fedepth.simulation.worker.protocol import NAMES, Open, Request, Train

JOB = """\
[job]
name = "small"
rounds = 2
devices_per_round = 3
seed = 3
{job}

[model]
name = "digits-cnn"
classes = 10
input_shape = [1, 8, 8]
mean = [0.3]
std = [0.35]

[training]
batch = 16
local_epochs = 1
learning_rate = 0.05
{training}

[test]
data = "digits"

{sections}
"""

_prepared: dict[str, tuple[bytes, bytes, Any]] = {}


def asked(worker: Worker, request: Request) -> Answer:
    """One request, through JSON on both ways."""
    line = msgspec.json.encode({"do": NAMES[type(request)], **msgspec.to_builtins(request)})
    return dict(msgspec.json.decode(msgspec.json.encode(worker.answer(line))))


class InProcess:
    """An engine whose workers take turns in this process.

    Attributes:
        requests: all that was asked.
        before: called before each request; what it raises, the request ends with.
    """

    def __init__(self, workers: int, before: Callable[[Request], None] = lambda request: None) -> None:
        self.workers = workers
        self.busy_seconds = 0.0
        self.cpu_seconds: Counter[str] = Counter()
        self.requests: list[Request] = []
        self.before = before
        self._queue = Queue()
        self._serving: list[asyncio.Task[None]] = []
        self._workers: list[Worker] = []

    async def start(self, opened: Open) -> int:
        self._workers = [Worker(torch.device("cpu")) for _ in range(self.workers)]
        answers = [asked(worker, opened) for worker in self._workers]
        setup.result_of(answers[0])
        self._serving = [asyncio.create_task(self._serve(worker)) for worker in self._workers]
        return int(answers[0]["ok"]["tests"])

    async def ask(self, request: Request, *, filler: bool = False, work: float = 0.0) -> Answer:
        return await self._queue.answer(request, filler, work)

    async def close(self) -> None:
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, worker: Worker) -> None:
        while True:
            request, future = await self._queue.take()
            self.requests.append(request)
            try:
                self.before(request)
                answer = asked(worker, request)
            except Exception as error:  # noqa: BLE001 - whoever waits is told
                future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(answer)
            await asyncio.sleep(0)

    @property
    def trained(self) -> list[str]:
        """The clients that were trained, in this order."""
        return [request.device_id for request in self.requests if isinstance(request, Train)]


class Lab:
    """Runs simulations of the digits in a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.engine = InProcess(1)
        self._patch = monkeypatch

    def job(self, job: str = "", training: str = "", sections: str = "", **replaced: str) -> Path:
        path = self.folder / "job.toml"
        text = JOB.format(job=job, training=training, sections=sections)
        for old, new in replaced.items():
            text = "\n".join(f"{old} = {new}" if line.startswith(f"{old} = ") else line for line in text.splitlines())
        path.write_text(text)
        return path

    def run(
        self, job: Path, output: str = "run", *, engine: InProcess | None = None, **options: Any
    ) -> list[RoundLine]:
        """The lines of a simulation with 6 clients of 24 images each, unless options say otherwise."""
        self.engine = engine or InProcess(1)
        self._patch.setattr(simulate, "new_engine", lambda *_: self.engine)
        fields: dict[str, Any] = {"data": "digits", **options}
        if not options.keys() & {"clients", "partition"}:
            fields["partition"] = f"file:{self._few_images()}"
        return simulate.simulate(Options(job=job, output=self.folder / output, **fields), quiet=True)

    def _few_images(self) -> Path:
        path = self.folder / "few.json"
        shares = tuple(Share(f"client-{k:03d}", tuple(range(24 * k, 24 * k + 24))) for k in range(6))
        save_partition(path, Partition("few", 0, 1438, shares))
        return path

    def digests(self, output: str = "run") -> list[str]:
        lines = msgspec.json.decode(
            b"[" + b",".join((self.folder / output / "rounds.jsonl").read_bytes().splitlines()) + b"]"
        )
        return [line["weights_digest"] for line in lines]


@asynccontextmanager
async def preparing_here(say: Any) -> AsyncIterator[Any]:
    worker = Worker(torch.device("cpu"))

    async def ask(request: Request) -> dict[str, Any]:
        # Exporting a model takes seconds, and nothing here is about that: once for each model.
        if isinstance(request, Preparation):
            made_of = (request.model, request.training.batch, request.training.heads, request.tuning, request.seed)
            key = repr((*made_of, request.fixed_statistics))
            if key not in _prepared:
                answer = setup.result_of(asked(worker, request))
                _prepared[key] = Path(request.graph).read_bytes(), Path(request.output).read_bytes(), answer
            graph, weights, answer = _prepared[key]
            Path(request.graph).write_bytes(graph)
            Path(request.output).write_bytes(weights)
            return dict(answer)
        return setup.result_of(asked(worker, request))

    yield ask


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.setattr(setup, "preparing", preparing_here)
    monkeypatch.setattr(process.gc, "freeze", lambda: None)
    monkeypatch.setattr(process.gc, "collect", lambda: 0)  # slow in a process that has exported models
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Lab(tmp_path, monkeypatch)
    torch.set_num_threads(threads)
