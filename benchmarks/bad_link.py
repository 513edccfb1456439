"""A link that is slow, far away, or cut again and again: a proxy on loopback that forwards bytes and knows no protocol.

It stands between a device and its coordinator, with TLS or without.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

_MOST_READ = 1 << 16
_TICK_S = 0.05  # a throttled link passes so much at once


@dataclass
class Faults:
    """What is wrong with a link. Any of it may be changed while it is in use.

    Attributes:
        bytes_per_s: in each direction, of all connections together; 0 for no limit.
        delay_s: between the two ends, in each direction.
        cut_after: a connection is reset when so many bytes have passed in both directions together; 0 for never.
        half_close_after: the direction in which so many bytes have passed is closed; the other one stays open.
        freeze_after: a connection in which so many bytes have passed forwards nothing for `freeze_s`, and stays open.
    """

    bytes_per_s: float = 0.0
    delay_s: float = 0.0
    cut_after: int = 0
    half_close_after: int = 0
    freeze_after: int = 0
    freeze_s: float = 0.0


@dataclass
class BadLink:
    """A running proxy.

    Attributes:
        port: where it listens, on 127.0.0.1.
        target: the port that it leads to; where nobody listens, connections are refused.
        up: bytes that passed to the target.
        down: bytes that passed from there.
        connections: how many there were.
        cuts: how many it has ended.
    """

    target: int
    faults: Faults = field(default_factory=Faults)
    port: int = 0
    up: int = 0
    down: int = 0
    connections: int = 0
    cuts: int = 0

    def __post_init__(self) -> None:
        self._open: set[asyncio.StreamWriter] = set()
        self._free_at = {"up": 0.0, "down": 0.0}

    def cut(self) -> None:
        """Resets every connection that is open now."""
        for writer in tuple(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            onward = await asyncio.open_connection("127.0.0.1", self.target, limit=_MOST_READ)
        except OSError:
            writer.transport.abort()
            return
        passed = _Passed((writer, onward[1]))
        self._open |= {writer, onward[1]}
        both = {
            asyncio.create_task(self._forward("up", reader, onward[1], passed)),
            asyncio.create_task(self._forward("down", onward[0], writer, passed)),
        }
        try:
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                with contextlib.suppress(OSError, _Cut):  # either side, or this link, has ended it
                    task.result()
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            self._open -= {writer, onward[1]}
            writer.transport.abort()
            onward[1].transport.abort()

    async def _forward(
        self, direction: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passed: _Passed
    ) -> None:
        """Takes bytes in at the link's rate. They come out later."""
        loop, faults = asyncio.get_running_loop(), self.faults
        late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        writing = asyncio.create_task(self._write(direction, late, writer, passed))
        own, data = 0, b"-"
        try:
            while data and not writing.done():
                rate = faults.bytes_per_s
                data = await reader.read(max(1, int(rate * _TICK_S)) if rate else _MOST_READ)
                if data and rate:
                    self._free_at[direction] = max(loop.time(), self._free_at[direction]) + len(data) / rate
                    await asyncio.sleep(self._free_at[direction] - loop.time())
                late.put_nowait((loop.time() + faults.delay_s, data))
                own += len(data)
                if data and 0 < faults.half_close_after <= own:
                    self.cuts += 1
                    data = b""
                    late.put_nowait((loop.time() + faults.delay_s, data))
            await writing
        finally:
            writing.cancel()

    async def _write(
        self, direction: str, late: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, passed: _Passed
    ) -> None:
        loop, faults = asyncio.get_running_loop(), self.faults
        while True:
            at, data = await late.get()
            await asyncio.sleep(at - loop.time())
            if not data:
                writer.write_eof()
                return
            if faults.cut_after:
                data = data[: max(0, faults.cut_after - passed.bytes)]
            passed.bytes += len(data)
            setattr(self, direction, getattr(self, direction) + len(data))
            writer.write(data)
            await writer.drain()
            if 0 < faults.freeze_after <= passed.bytes and not passed.frozen:
                passed.frozen = True
                self.cuts += 1
                passed.until = loop.time() + faults.freeze_s
            await asyncio.sleep(passed.until - loop.time())
            if 0 < faults.cut_after <= passed.bytes:
                self.cuts += 1
                for end in passed.ends:
                    end.transport.abort()
                raise _Cut


class _Cut(Exception):
    """The link ends a connection."""


@dataclass
class _Passed:
    """What has passed in one connection, and its two ends."""

    ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter]
    bytes: int = 0
    frozen: bool = False
    until: float = 0.0


@asynccontextmanager
async def bad_link(target: int, faults: Faults | None = None) -> AsyncIterator[BadLink]:
    """A proxy to this port of 127.0.0.1, for as long as the block lasts."""
    link = BadLink(target, faults or Faults())
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(asyncio.CancelledError):  # in the end; asyncio's server would log it
            await link._serve(reader, writer)
        tasks.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=_MOST_READ)
    link.port = server.sockets[0].getsockname()[1]
    try:
        yield link
    finally:
        server.close()
        link.cut()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
