"""The handle on the model worker: the child process that holds torch, started on demand, ended when idle."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import structlog

from fedepth import errors
from fedepth.child import Child, module_argv
from fedepth.errors import ChildError, FedepthError
from fedepth.timeout import within

IDLE_S = 60.0
START_S = 300.0  # until it is ready: it loads torch, perhaps from a slow disk

_log = structlog.get_logger()

# Those that are made from a message alone.
_KINDS: dict[str, type[FedepthError]] = {
    kind.__name__: kind
    for kind in (
        errors.ConfigError,
        errors.DataError,
        errors.ModelError,
        errors.ChildError,
        errors.ProtocolError,
        errors.StateError,
        errors.UnavailableError,
        errors.DiskError,
        errors.ExportError,
    )
}


class Models(Protocol):
    """What the coordinator asks of whoever holds torch."""

    async def request(self, do: str, **fields: Any) -> dict[str, Any]: ...

    async def stop(self) -> None: ...


class ModelWorker:
    """Runs one request at a time in a child process."""

    def __init__(
        self,
        argv: Sequence[str] | None = None,
        idle_s: float = IDLE_S,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        self._argv = argv if argv is not None else module_argv("coordinator.model_worker.process")
        self._idle_s = idle_s
        self._on_progress = on_progress or (lambda text: _log.info("model worker", text=text))
        self._lock = asyncio.Lock()
        self._child: Child | None = None
        self._idle: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.alive

    async def request(self, do: str, **fields: Any) -> dict[str, Any]:
        """Sends one request and returns what the child answers.

        Raises:
            FedepthError: the class that the child names, with its message.
            ChildError: the child ended, broke its protocol, or hangs; it has been ended then.
        """
        async with self._lock:
            self._cancel_idle()
            answered = False
            try:
                child = await self._ready()
                await child.send({"do": do, **fields})
                answer = await self._answer(child, do)
                answered = True
            finally:
                if not answered:  # whatever it says next would answer a question that nobody asks any more
                    await self._end(kill=True)
            self._idle = asyncio.create_task(self._end_when_idle())
        if isinstance(answer.get("error"), dict):
            raise _as_error(answer["error"])
        return dict(answer["ok"])

    async def stop(self) -> None:
        """Ends the child, if there is one."""
        self._cancel_idle()
        async with self._lock:
            await self._end()

    async def _ready(self) -> Child:
        if self._child is not None and self._child.alive:
            return self._child
        self._child = await Child.start("model worker", self._argv, on_line=_pass_on)
        try:
            first = await within(START_S, self._child.receive())
        except asyncio.TimeoutError:
            raise ChildError(f"model worker (pid {self._child.pid}) was not ready after {START_S:g} s") from None
        if not isinstance(first, dict) or first.get("event") != "ready":
            raise ChildError(f"model worker began with {str(first)[:80]!r} instead of ready")
        return self._child

    async def _answer(self, child: Child, do: str) -> dict[str, Any]:
        while True:
            message = await child.receive()
            if not isinstance(message, dict):
                break
            if message.get("event") == "progress":
                self._on_progress(str(message.get("text", "")))
            elif isinstance(message.get("ok"), dict) or isinstance(message.get("error"), dict):
                return message
            else:
                break
        raise ChildError(f"model worker answered {do} with {str(message)[:80]!r}")

    async def _end_when_idle(self) -> None:
        await asyncio.sleep(self._idle_s)
        async with self._lock:
            await self._end()

    def _cancel_idle(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    async def _end(self, kill: bool = False) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        if kill:
            child.kill()
        with contextlib.suppress(ChildError):  # it is to end; how it ends no longer matters
            await child.stop()


def _pass_on(line: str) -> None:
    """What it writes to standard error, such as a warning of a library or a trace."""
    _log.warning("model worker", said=line)


def _as_error(fields: dict[str, Any]) -> FedepthError:
    name, message = str(fields.get("type")), str(fields.get("message"))
    kind = _KINDS.get(name)
    return ChildError(f"model worker: {name}: {message}") if kind is None else kind(message)
