"""Waiting for something, but not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


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
