"""Waiting: for what may never come, and for a coordinator that is away, with growing pauses."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable
from typing import TypeVar

import structlog

from edge_client.config import RetryConfig
from fedepth.errors import FedepthError

T = TypeVar("T")
_log = structlog.get_logger()


async def within(seconds: float, step: Awaitable[T]) -> T:
    """The step's result, if it comes in time.

    asyncio.wait_for would do, but before Python 3.12 it loses a cancellation that arrives together with the
    result: a task that was told to stop then goes on for ever.

    Raises:
        asyncio.TimeoutError: it took longer; the step is cancelled.
    """
    task = asyncio.ensure_future(step)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            raise asyncio.TimeoutError
        return task.result()
    finally:
        task.cancel()


class Clock:
    """Time, as a seam for tests."""

    def now(self) -> float:
        """Seconds that never jump."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Backoff:
    """Counts failed attempts in a row. Says that the coordinator is away, at once and every `remind_s`."""

    def __init__(self, address: str, config: RetryConfig, clock: Clock, seed: str) -> None:
        self._address = address
        self._config = config
        self._clock = clock
        # Seeded by the device, so that a thousand devices do not return in step after an outage.
        self._random = random.Random(seed)
        self._tries = 0
        self._since = 0.0
        self._said = 0.0

    async def pause(self, error: FedepthError) -> None:
        """Pauses after a failed attempt: first_s · 2^tries up to longest_s, times 0.5 to 1.5."""
        now = self._clock.now()
        self._tries += 1
        pause = min(self._config.longest_s, self._config.first_s * 2.0 ** min(self._tries - 1, 30))
        pause *= 0.5 + self._random.random()
        if self._tries == 1:
            self._since = now
            self._say(error, pause)
        end = now + pause
        while (now := self._clock.now()) < end:
            due = self._said + self._config.remind_s
            if now >= due:
                self._say(error, end - now)
                due = now + self._config.remind_s
            await self._clock.sleep(min(end, due) - now)

    def reset(self) -> None:
        """Notes an attempt that worked."""
        if self._tries:
            away = self._clock.now() - self._since
            _log.info("coordinator is back", coordinator=self._address, away_s=round(away, 1), tries=self._tries)
        self._tries = 0

    def _say(self, error: FedepthError, pause: float) -> None:
        now = self._clock.now()
        self._said = now
        _log.warning(
            "coordinator cannot be reached; retrying until it answers",
            coordinator=self._address,
            error=str(error),
            away_s=round(now - self._since, 1),
            tries=self._tries,
            next_try_s=round(pause, 1),
        )
