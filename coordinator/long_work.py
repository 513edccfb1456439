"""What a job waits for that may take long, and for how long by now: nothing that takes minutes goes on in silence."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

from coordinator.observe.events import Events

REMIND_S = 60.0  # how often it is told

T = TypeVar("T")


class LongWork:
    """At most one thing at a time."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._doing: tuple[str, float] | None = None  # and since when

    def describe(self) -> str:
        """What is being done, and for how long by now; empty if nothing is."""
        if self._doing is None:
            return ""
        what, since = self._doing
        passed = time.monotonic() - since
        if passed < 1:
            return what
        return f"{what}, for {passed:.0f} s now" if passed < 120 else f"{what}, for {passed / 60:.0f} min now"

    async def wait_for(self, what: str, work: Awaitable[T]) -> T:
        """Waits for what may take long, and tells from time to time that it still does."""
        self._doing = (what, time.monotonic())
        waited = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({waited}, timeout=REMIND_S))[0]:
                self._events.send("log", message=self.describe())
            return waited.result()
        finally:
            self._doing = None
            if not waited.done():
                waited.cancel()
                await asyncio.wait({waited})
