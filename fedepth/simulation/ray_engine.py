"""Workers as actors of a Ray cluster: the extra `ray`. Every node has to see the folders of data and output.

What is asked and answered is what worker processes are asked; only the way there is another.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from typing import Any

import msgspec

from fedepth.errors import ChildError, ConfigError
from fedepth.simulation.engine import TRIES, Answer, Queue, is_spent, worker_environment
from fedepth.simulation.worker.protocol import NAMES, Open, Request


class Actor:
    """What runs on a node."""

    def __init__(self) -> None:
        import torch

        from fedepth.simulation.worker.process import Worker
        from fedepth.training.warmup import start

        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        start(device)
        self._worker = Worker(device)

    def answer(self, line: bytes) -> bytes:
        """As a worker process answers a line."""
        return msgspec.json.encode(self._worker.answer(line))


class RayEngine:
    """Actors on the cluster that RAY_ADDRESS names, or on one that is started here for the time of the run."""

    def __init__(self, workers: int, threads: int) -> None:
        """
        Raises:
            ConfigError: Ray is not installed.
        """
        try:
            import ray
        except ImportError:
            raise ConfigError("--engine ray needs Ray: pip install 'fedepth[ray]'") from None
        self.workers = workers
        self.busy_seconds = 0.0
        self.cpu_seconds: Counter[str] = Counter()
        self._ray: Any = ray
        self._threads = threads
        self._queue = Queue()
        self._actors: dict[int, Any] = {}
        self._serving: list[asyncio.Task[None]] = []
        self._opened: Open | None = None
        self._owns_cluster = False

    async def start(self, opened: Open) -> int:
        self._opened = opened
        if not self._ray.is_initialized():
            # In another thread, where Ray cannot take our handler of signals away.
            await asyncio.to_thread(
                self._ray.init, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR
            )
            self._owns_cluster = True
        answers = await asyncio.gather(*(self._ready(number) for number in range(self.workers)))
        self._serving = [asyncio.create_task(self._serve(number)) for number in range(self.workers)]
        return int(answers[0]["ok"]["tests"])

    async def ask(self, request: Request, *, filler: bool = False, work: float = 0.0) -> Answer:
        return await self._queue.answer(request, filler, work)

    async def close(self) -> None:
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors.clear()
        if self._owns_cluster:
            await asyncio.to_thread(self._ray.shutdown)

    async def _ready(self, number: int) -> Answer:
        # The number of threads and the allocator are settled when a process starts.
        variables = worker_environment(self._threads)
        remote = self._ray.remote(Actor).options(num_cpus=self._threads, runtime_env={"env_vars": variables})
        self._actors[number] = remote.remote()
        assert self._opened is not None
        answer = await self._exchange(number, self._opened)
        if "error" in answer:
            raise ChildError(f"worker {number + 1}: {answer['error']['message']}")
        return answer

    def _end(self, number: int) -> None:
        """The next request to this worker starts another."""
        self._ray.kill(self._actors.pop(number))

    async def _exchange(self, number: int, request: Request) -> Answer:
        line = msgspec.json.encode({"do": NAMES[type(request)], **msgspec.to_builtins(request)})
        try:
            answer: Answer = msgspec.json.decode(await self._actors[number].answer.remote(line))
        except self._ray.exceptions.RayError as error:
            raise ChildError(f"worker {number + 1}: {str(error).splitlines()[0]}") from error
        return answer

    async def _serve(self, number: int) -> None:
        while True:
            request, future = await self._queue.take()
            began = time.monotonic()
            for attempt in range(1, TRIES + 1):
                try:
                    if number not in self._actors:
                        await self._ready(number)
                    answer = await self._exchange(number, request)
                except ChildError as error:
                    if attempt == TRIES and not future.done():
                        future.set_exception(error)
                    self._end(number)
                else:
                    if is_spent(answer):
                        self._end(number)
                    self.cpu_seconds[NAMES[type(request)]] += answer.get("cpu_seconds", 0.0)
                    if not future.done():
                        future.set_result(answer)
                    break
            self.busy_seconds += time.monotonic() - began
