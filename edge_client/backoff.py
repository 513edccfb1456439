"""Waiting for a coordinator that is away or busy, or for a disk; and saying what is waited for, not too often."""

from __future__ import annotations

import asyncio
import random
import re
import time

import structlog

from edge_client.call_errors import BusyError, UnreachableError, UntrustedError
from edge_client.config import RetryConfig
from fedepth.errors import DiskError, FedepthError

DISK_PAUSE_S = 30.0
UNTRUSTED_PAUSE_S = 60.0  # at the longest: whoever has just given this device a certificate waits for it to come back
_NUMBER = re.compile(r"\d+(\.\d+)?")
_log = structlog.get_logger()


class Clock:
    """Time, as a seam for tests."""

    def now(self) -> float:
        """Seconds that never jump."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Reminder:
    """Whether something that stays as it is should be said again: when it changes, and every `remind_s`.

    A text in which only the numbers have changed, such as "12 MB free", is the same text.
    """

    def __init__(self, clock: Clock, remind_s: float) -> None:
        self._clock = clock
        self._remind_s = remind_s
        self._text: str | None = None
        self._said = 0.0

    def due(self, text: str) -> bool:
        """Notes that it is as `text` says now; whether to say so."""
        text, now = _NUMBER.sub("#", text), self._clock.now()
        if text == self._text and now < self._said + self._remind_s:
            return False
        self._text, self._said = text, now
        return True

    def over(self) -> bool:
        """Notes that there is nothing to say any more; whether there was."""
        was, self._text = self._text is not None, None
        return was


class Backoff:
    """Counts failed attempts in a row. Says that the coordinator is away or busy, at once and every `remind_s`."""

    def __init__(self, address: str, config: RetryConfig, clock: Clock, seed: str) -> None:
        self._address = address
        self._config = config
        self._clock = clock
        # Seeded by the device, so that a thousand devices do not return in step after an outage.
        self._random = random.Random(seed)
        self._tries = 0
        self._since = 0.0
        self._reminder = Reminder(clock, config.remind_s)

    async def pause(self, error: FedepthError) -> None:
        """Pauses after a failed attempt: first_s · 2^tries up to longest_s, times 0.5 to 1.5.

        Where the coordinator has said when to come back, as long as that and up to half as long again.
        """
        now = self._clock.now()
        self._tries += 1
        if isinstance(error, BusyError) and error.after_s is not None:
            pause = error.after_s * (1.0 + 0.5 * self._random.random())
        else:
            longest = self._config.longest_s
            if isinstance(error, UntrustedError):
                longest = min(longest, UNTRUSTED_PAUSE_S)
            pause = min(longest, self._config.first_s * 2.0 ** min(self._tries - 1, 30))
            pause *= 0.5 + self._random.random()
        if self._tries == 1:
            self._since = now
        end = now + pause
        while True:
            self._say(error, end - now)
            await self._clock.sleep(min(end - now, self._config.remind_s))
            if (now := self._clock.now()) >= end:
                return

    def reset(self) -> None:
        """Notes an attempt that worked."""
        if self._tries:
            away = self._clock.now() - self._since
            _log.info("coordinator is back", coordinator=self._address, away_s=round(away, 1), tries=self._tries)
        self._tries = 0
        self._reminder.over()

    def _say(self, error: FedepthError, pause: float) -> None:
        event = _what_is_wrong(error)
        if not self._reminder.due(event):
            return
        _log.warning(
            event,
            coordinator=self._address,
            error=str(error),
            away_s=round(self._clock.now() - self._since, 1),
            tries=self._tries,
            next_try_s=round(pause, 1),
        )


class DiskWait:
    """Pauses while a disk is full, read-only or failing. Says so, at once and every `remind_s`, and when it is over."""

    def __init__(self, clock: Clock, remind_s: float) -> None:
        self._clock = clock
        self._reminder = Reminder(clock, remind_s)

    async def pause(self, event: str, error: DiskError) -> None:
        if self._reminder.due(f"{event}: {error}"):
            _log.error(event, error=str(error), next_look_s=DISK_PAUSE_S)
        await self._clock.sleep(DISK_PAUSE_S)

    def reset(self) -> None:
        """Notes that the disk can be used."""
        if self._reminder.over():
            _log.info("the disk can be used again")


def _what_is_wrong(error: FedepthError) -> str:
    if isinstance(error, BusyError):
        return "coordinator is busy; retrying until it is not"
    if isinstance(error, UntrustedError):
        return "coordinator and this device do not accept each other's certificates; retrying until they do"
    if isinstance(error, UnreachableError):
        return "coordinator cannot be reached; retrying until it answers"
    return "coordinator answers with an error; retrying until it does not"
