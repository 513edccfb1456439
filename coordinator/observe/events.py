"""What happens in a job, for people who watch: one JSON object per event."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import msgspec
import structlog

from fedepth.errors import TransportError

QUEUE_LIMIT = 1000

_log = structlog.get_logger()


class Events:
    """Sends everything to the log and to every watcher. A watcher that lags too far behind is cut off."""

    def __init__(self) -> None:
        self._watchers: set[asyncio.Queue[str | None]] = set()
        self._lagging: deque[asyncio.Queue[str | None]] = deque()

    def send(self, event: str, **fields: Any) -> None:
        """Adds `time` (seconds since 1970). `fields` are anything that msgspec can encode.

        Does not fail: what it tells has happened already (fedepth.logs drops lines that cannot be written).
        """
        level = _log.debug if event == "progress" else _log.info
        shown = {key: value for key, value in fields.items() if key != "stages"}
        level(event, **shown)
        if not self._watchers:
            return
        line = encode_event(event, fields)
        for queue in list(self._watchers):
            if queue.qsize() >= QUEUE_LIMIT:
                self._watchers.discard(queue)
                self._lagging.append(queue)
            else:
                queue.put_nowait(line)

    async def watch(self, first: Awaitable[str]) -> AsyncIterator[str]:
        """Yields what `first` gives, then every event from now on, until `close`.

        Raises:
            TransportError: the watcher did not keep up.
        """
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        self._watchers.add(queue)  # before `first` is made: nothing that happens meanwhile is lost
        try:
            yield await first
            while (line := await queue.get()) is not None:
                yield line
                if queue in self._lagging and queue.empty():
                    raise TransportError(f"the watcher is more than {QUEUE_LIMIT} events behind; watch again")
        finally:
            self._watchers.discard(queue)
            if queue in self._lagging:
                self._lagging.remove(queue)

    def close(self) -> None:
        """Ends every watcher's stream."""
        for queue in self._watchers:
            queue.put_nowait(None)


def encode_event(event: str, fields: dict[str, Any]) -> str:
    return msgspec.json.encode({"event": event, "time": round(time.time(), 3), **fields}).decode()
