"""Finished blocks go up while later ones still train: a block is final as soon as its stage has ended.

Nothing depends on it. What could not be sent, or only in part, goes up with the whole update, which resumes there.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import TracebackType

import structlog

from edge_client.outbox import part_name
from edge_client.transport import Part, Transport
from fedepth.errors import DiskError, ProtocolError, TransportError
from fedepth.plan import Plan
from fedepth.task import PartInfo, Task

_log = structlog.get_logger()


class EarlyUpload:
    """Sends parts one after the other, beside whatever runs in its `async with` block; stops with that."""

    def __init__(self, transport: Transport, task: Task, device_id: str, plan: Plan, folder: Path) -> None:
        """`folder`: where the trainer puts the parts."""
        self._transport = transport
        self._task = task
        self._device_id = device_id
        self._plan = plan
        self._folder = folder
        self._finished: asyncio.Queue[PartInfo] = asyncio.Queue()

    def add(self, info: PartInfo) -> None:
        self._finished.put_nowait(info)

    async def __aenter__(self) -> EarlyUpload:
        self._sending = asyncio.create_task(self._send_all())
        self._sending.add_done_callback(_log_mistake)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sending.cancel()
        await asyncio.wait({self._sending})

    async def _send_all(self) -> None:
        while True:
            info = await self._finished.get()
            path = self._folder / part_name(info.part)
            part = Part(self._task.task_id, self._task.attempt, self._device_id, self._plan, info, path)
            try:
                refused = await self._transport.send_part(part)
            except (TransportError, ProtocolError, DiskError) as error:
                _log.info("a finished block waits for the whole update", part=info.part, error=str(error))
                continue
            if refused:
                _log.warning("the coordinator refused a finished block", part=info.part, message=refused.message)
                return
            _log.info("a finished block is with the coordinator", part=info.part)


def _log_mistake(sending: asyncio.Task[None]) -> None:
    """An error that nobody expected must not cost the training: the whole update meets it again, when it is safe."""
    if not sending.cancelled() and (error := sending.exception()):
        _log.error("finished blocks are not sent early any more", exc_info=error)
