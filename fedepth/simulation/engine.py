"""Whoever runs workers: processes on this machine here, actors on a cluster in `ray_engine`."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from fedepth.child import Child, module_argv
from fedepth.errors import ChildError
from fedepth.memory.environment import environment
from fedepth.simulation.worker.protocol import NAMES, Open, Request
from fedepth.task import Outcome

WORKER_ARGV = tuple(module_argv("fedepth.simulation.worker.process"))
TRIES = 2  # of a request that a worker died of

Answer = dict[str, Any]


class Engine(Protocol):
    """Answers requests to workers, several at a time.

    Attributes:
        workers: how many.
        busy_seconds: that workers have spent on requests, all together.
        cpu_seconds: processor time of it, by the name of the request.
    """

    workers: int
    busy_seconds: float
    cpu_seconds: Counter[str]

    async def start(self, opened: Open) -> int:
        """Starts the workers and has each of them open the data; the number of test images."""

    async def ask(self, request: Request, *, filler: bool = False, work: float = 0.0) -> Answer:
        """What a worker answers: {"ok": …} or {"error": …}.

        Args:
            filler: may wait until a worker has nothing else to do.
            work: how long it takes, in any unit; the longest go first, so that no worker is left waiting at the end.

        Raises:
            ChildError: workers died of it, one after the other.
        """

    async def close(self) -> None:
        """Ends all workers at once."""


def worker_environment(threads: int) -> dict[str, str]:
    """What a worker is started with: the allocator of a device's trainer, and a fixed number of threads, since sums of
    other pieces are other sums."""
    return environment("auto", threads)


class Queue:
    """Requests that wait for a worker."""

    def __init__(self) -> None:
        self._count = itertools.count()
        self._waiting: asyncio.PriorityQueue[tuple[bool, float, int, Request, asyncio.Future[Answer]]] = (
            asyncio.PriorityQueue()
        )

    async def answer(self, request: Request, filler: bool, work: float) -> Answer:
        """Waits until somebody has answered it."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((filler, -work, next(self._count), request, future))
        return await future

    async def take(self) -> tuple[Request, asyncio.Future[Answer]]:
        """The next request, and where its answer goes. One that nobody waits for any more is left out."""
        while True:
            *_, request, future = await self._waiting.get()
            if not future.done():
                return request, future


class LocalEngine:
    """Persistent child processes of this one."""

    def __init__(self, workers: int, threads: int, on_line: Callable[[str], None]) -> None:
        """`on_line` is told what workers write to standard error."""
        self.workers = workers
        self.busy_seconds = 0.0
        self.cpu_seconds: Counter[str] = Counter()
        self._environment: Mapping[str, str] = worker_environment(threads)
        self._on_line = on_line
        self._queue = Queue()
        self._children: dict[int, Child] = {}
        self._serving: list[asyncio.Task[None]] = []
        self._opened: Open | None = None
        self._tests = 0

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the workers that run now."""
        return tuple(child.pid for child in self._children.values() if child.alive)

    async def start(self, opened: Open) -> int:
        self._opened = opened
        await asyncio.gather(*(self._ready(number) for number in range(self.workers)))
        self._serving = [asyncio.create_task(self._serve(number)) for number in range(self.workers)]
        return self._tests

    async def ask(self, request: Request, *, filler: bool = False, work: float = 0.0) -> Answer:
        return await self._queue.answer(request, filler, work)

    async def close(self) -> None:
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        for child in self._children.values():
            child.kill()
        await asyncio.gather(*(child.stop() for child in self._children.values()))
        self._children.clear()

    async def _serve(self, number: int) -> None:
        while True:
            request, future = await self._queue.take()
            began = time.monotonic()
            try:
                answer = await self._answered(number, request)
            except asyncio.CancelledError:
                future.cancel()
                raise
            except Exception as error:
                if not future.done():
                    future.set_exception(error)
                if not isinstance(error, ChildError):
                    raise
            else:
                self.cpu_seconds[NAMES[type(request)]] += answer.get("cpu_seconds", 0.0)
                if not future.done():
                    future.set_result(answer)
            self.busy_seconds += time.monotonic() - began

    async def _answered(self, number: int, request: Request) -> Answer:
        for attempt in range(1, TRIES + 1):
            try:
                child = await self._ready(number)
                answer = await exchange(child, request)
                if is_spent(answer):
                    child.kill()
                    await child.stop()
                return answer
            except ChildError as error:
                self._on_line(f"{error}; another one takes its place")
                if attempt == TRIES:
                    raise
        raise AssertionError("not reached")

    async def _ready(self, number: int) -> Child:
        """The worker with this number, started and its data opened."""
        child = self._children.get(number)
        if child is not None and child.alive:
            return child
        child = self._children[number] = await start_worker(f"worker {number + 1}", self._environment, self._on_line)
        assert self._opened is not None
        answer = await exchange(child, self._opened)
        if "error" in answer:
            raise ChildError(f"worker {number + 1}: {answer['error']['message']}")
        self._tests = int(answer["ok"]["tests"])
        return child


async def start_worker(name: str, variables: Mapping[str, str], on_line: Callable[[str], None]) -> Child:
    """A worker that is ready.

    Raises:
        ChildError: it ended, or said something else.
    """
    try:
        child = await Child.start(name, WORKER_ARGV, variables, on_line)
    except OSError as error:  # too many processes, or no memory for one more
        raise ChildError(f"{name} cannot be started: {error.strerror or error}") from error
    first = await child.receive()
    if not isinstance(first, dict) or first.get("event") != "ready":
        raise ChildError(f"{name} began with {str(first)[:80]!r} instead of ready")
    return child


def is_spent(answer: Answer) -> bool:
    """Whether the worker that gave this answer has met its limit, and can train no more (fedepth.training.limits)."""
    return "error" in answer and answer["error"].get("outcome") == Outcome.OVER_BUDGET.value


async def exchange(child: Child, request: Request) -> Answer:
    """Asks a worker and waits for its answer.

    Raises:
        ChildError: it ended, or broke the protocol.
    """
    await child.send({"do": NAMES[type(request)], **msgspec.to_builtins(request)})
    answer = await child.receive()
    if not isinstance(answer, dict) or not {"ok", "error"} & answer.keys():
        raise ChildError(f"{child.name} answered {str(answer)[:80]!r}")
    return answer
