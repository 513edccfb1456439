"""The trainer as the agent sees it: a child process with a fitting environment and typed events."""

from __future__ import annotations

import asyncio
import importlib.util
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import structlog

from edge_client.config import TrainerConfig
from edge_client.memory.probe import anonymous_bytes
from edge_client.trainer.protocol import Done, Event, Failed, Measure, Ready, TrainRequest
from fedepth.budget import Budget
from fedepth.child import Child, module_argv
from fedepth.errors import ChildError, ConfigError
from fedepth.memory.environment import environment
from fedepth.task import Outcome
from fedepth.timeout import within

TRAINER_ARGV = tuple(module_argv("edge_client.trainer.process"))
START_S = 600.0  # importing torch from an SD card takes a minute
_log = structlog.get_logger()


class TrainerProcess:
    """One running trainer.

    Attributes:
        start_bytes: what it costs before weights and data, as it says itself.
        baseline_bytes: the same with the modules of the model that it had last.
        allocator: its memory allocator's name and version.
    """

    def __init__(self, child: Child, ready: Ready) -> None:
        self._child = child
        self.start_bytes = self.baseline_bytes = ready.start_bytes
        self.allocator = ready.allocator

    @classmethod
    async def start(cls, config: TrainerConfig, argv: Sequence[str] = TRAINER_ARGV) -> TrainerProcess:
        """Starts a trainer and waits until it is warm.

        Raises:
            ChildError: it cannot be started, ended, said something else than `ready`, or was silent for START_S.
        """
        try:
            child = await Child.start("trainer", argv, environment(config.allocator, config.threads), _pass_on)
        except OSError as error:  # too many processes, or no memory for one more
            raise ChildError(f"the trainer cannot be started: {error.strerror or error}") from error
        started = False
        try:
            trainer = cls(child, msgspec.convert(await within(START_S, child.receive()), Ready))
            started = True
            return trainer
        except asyncio.TimeoutError:
            raise ChildError(f"the trainer (pid {child.pid}) was not ready after {START_S:g} s") from None
        except msgspec.ValidationError as error:
            raise ChildError(f"the trainer (pid {child.pid}) did not say that it is ready: {error}") from None
        finally:
            if not started:
                child.kill()
                await child.stop()

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child.alive

    @property
    def held_bytes(self) -> int:
        """What it holds now that would be free without it."""
        return anonymous_bytes(self.pid) if self.alive else 0

    async def train(self, request: TrainRequest) -> AsyncIterator[Event]:
        """Every event of one task; the last one is `Done` or `Failed`. Each `Measure` wants an `answer`.

        A trainer that has met its limit is gone afterwards (see fedepth.training.limits).

        Raises:
            ChildError: the trainer died, broke its protocol, or hangs.
        """
        await self._child.send({"do": "train", **msgspec.to_builtins(request)})
        while True:
            try:
                message = await self._child.receive()
            except ChildError as error:
                if error.returncode is None:
                    # Said before its end is waited for, which may never come of one that hangs in the kernel.
                    _log.warning("the trainer is ended", error=str(error))
                raise
            try:
                event: Event = msgspec.convert(message, Event)
            except msgspec.ValidationError as error:
                raise ChildError(f"the trainer (pid {self.pid}) wrote an event that nobody knows: {error}") from None
            if isinstance(event, Measure):
                self.baseline_bytes = event.baseline_bytes
            if isinstance(event, Failed) and event.outcome is Outcome.OVER_BUDGET:
                await self.kill()
            yield event
            if isinstance(event, (Done, Failed)):
                return

    async def answer(self, budget: Budget) -> None:
        await self._child.send({"budget": budget})

    async def stop(self) -> None:
        await self._child.stop()

    async def kill(self) -> None:
        """At once, whatever it is doing."""
        self._child.kill()
        await self._child.stop()


class TrainerKeeper:
    """Holds at most one trainer, and stops it when it was idle for `linger_s`."""

    def __init__(self, config: TrainerConfig, argv: Sequence[str] = TRAINER_ARGV) -> None:
        self._config = config
        self._argv = argv
        self._trainer: TrainerProcess | None = None
        self._starting: asyncio.Task[TrainerProcess] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stopping: asyncio.Task[None] | None = None

    @property
    def held_bytes(self) -> int:
        """What a running trainer holds; 0 if none runs."""
        return self._trainer.held_bytes if self._trainer else 0

    @property
    def baseline_bytes(self) -> int | None:
        """What a running trainer needs before weights and data; None if none runs."""
        return self._trainer.baseline_bytes if self._trainer and self._trainer.alive else None

    async def take(self) -> TrainerProcess:
        """A warm trainer: the one that lingers, or a new one. Give it back with `rest` or `drop`."""
        await self._settle()
        if self._trainer is None or not self._trainer.alive:
            if self._starting is None:
                self._starting = asyncio.create_task(TrainerProcess.start(self._config, self._argv))
                self._starting.add_done_callback(self._note_start)
            # Not cancelled with us: where rounds are shorter than a start, a device would never have a trainer.
            await asyncio.shield(self._starting)
            await self._settle()
        assert self._trainer is not None
        return self._trainer

    def _note_start(self, starting: asyncio.Task[TrainerProcess]) -> None:
        self._starting = None
        if starting.cancelled() or starting.exception() is not None:
            return  # whoever waits has the error, and the next one tries again
        self._trainer = trainer = starting.result()
        _log.info("trainer started", pid=trainer.pid, start_bytes=trainer.start_bytes, allocator=trainer.allocator)
        self.rest()

    def rest(self) -> None:
        """The trainer is idle from now on."""
        if self._trainer and self._trainer.alive and not self._timer:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._config.linger_s, self._idle_long_enough)

    async def close(self) -> None:
        """Ends the trainer at once, also one that is just starting."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait({self._starting})
        await self.drop()

    async def drop(self) -> None:
        """Ends the trainer at once. One that is just starting has done nothing wrong."""
        await self._settle()
        trainer, self._trainer = self._trainer, None
        if trainer:
            await trainer.kill()

    def _idle_long_enough(self) -> None:
        trainer, self._trainer, self._timer = self._trainer, None, None
        if trainer:
            _log.info("trainer stopped after being idle", pid=trainer.pid, idle_s=self._config.linger_s)
            self._stopping = asyncio.create_task(trainer.stop())

    async def _settle(self) -> None:
        """Two trainers at a time need twice the memory, so one that is stopping must have ended first."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._stopping:
            # Not cancelled with us, who may wait on behalf of a task that is no longer wanted: it has to end.
            await asyncio.wait({self._stopping})
            stopping, self._stopping = self._stopping, None
            stopping.result()


def _pass_on(line: str) -> None:
    """What it writes to standard error, such as a warning of a library or a trace."""
    _log.warning("trainer", said=line)


def torch_version() -> str:
    """The installed torch, without importing it, nor importlib.metadata, which would cost an idle agent 6 MiB.

    Raises:
        ConfigError: there is none.
    """
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("torch is not installed here: pip install 'fedepth[train]'")
    text = (Path(found.submodule_search_locations[0]) / "version.py").read_text(encoding="utf-8")
    version = re.search(r"__version__ = '([^']+)'", text)
    if version is None:
        raise ConfigError(f"{found.submodule_search_locations[0]}/version.py names no version; install torch again")
    return version[1]
