"""Where a device is in its task, told to the coordinator often enough that the task's lease does not run out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import structlog
from fedepth_wire.times import BEAT_S

from edge_client.transport import Transport
from fedepth.errors import ProtocolError, TransportError
from fedepth.task import Progress
from fedepth.timeout import within

_log = structlog.get_logger()


class Lease:
    """The lease of the task that the device works on, or whose update it sends."""

    def __init__(self, transport: Transport, on_progress: Callable[[Progress | None], None], device_id: str) -> None:
        self._transport = transport
        self._on_progress = on_progress
        self._progress = Progress("", 0, device_id, "")
        self._nudge = asyncio.Event()

    def note(self, progress: Progress) -> None:
        """Takes over where the work is. A new activity or stage is told at once."""
        before = self._progress
        self._progress = progress
        self._on_progress(progress)
        if (before.task_id, before.activity, before.stage, before.stage_count) != (
            progress.task_id,
            progress.activity,
            progress.stage,
            progress.stage_count,
        ):
            self._nudge.set()

    @asynccontextmanager
    async def renewed(self) -> AsyncIterator[asyncio.Task[None]]:
        """Renews the lease within the block. What it gives ends by itself when the task is not wanted any more."""
        beat = asyncio.create_task(self._beat())
        try:
            yield beat
        finally:
            beat.cancel()
            await asyncio.wait({beat})
            self._on_progress(None)

    async def _beat(self) -> None:
        """Tells of every change, and every BEAT_S."""
        moved_before = self._transport.moved_bytes
        while True:
            self._nudge.clear()
            progress = replace(self._progress, bytes_moved=self._transport.moved_bytes - moved_before)
            try:
                if not await self._transport.report_progress(progress):
                    return
            except (TransportError, ProtocolError) as error:
                _log.debug("progress could not be reported", error=str(error))
            try:
                await within(BEAT_S, self._nudge.wait())
            except asyncio.TimeoutError:
                continue
