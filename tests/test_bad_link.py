"""The proxy of benchmarks.links does what it says, or what it shows is worth nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from benchmarks.bad_link import BadLink, Faults, bad_link


@asynccontextmanager
async def echo() -> AsyncIterator[int]:
    """A server that sends everything back; gives its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


Scene = Callable[[BadLink, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def play(faults: Faults, scene: Scene) -> BadLink:
    async def main() -> BadLink:
        async with echo() as port, bad_link(port, faults) as link:
            reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
            try:
                await asyncio.wait_for(scene(link, reader, writer), 20)
            finally:
                writer.close()
            return link

    return asyncio.run(main())


def test_a_good_link_passes_everything() -> None:
    data = bytes(range(256)) * 4000

    async def scene(link: BadLink, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        assert await reader.readexactly(len(data)) == data

    link = play(Faults(), scene)
    assert (link.up, link.down, link.connections, link.cuts) == (len(data), len(data), 1, 0)


@pytest.mark.parametrize("after", [1000, 50_000])
def test_a_connection_is_cut_after_so_many_bytes(after: int) -> None:
    async def scene(link: BadLink, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(100_000))
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(100_000)

    link = play(Faults(cut_after=after), scene)
    assert link.up + link.down == after and link.cuts == 1


def test_a_half_closed_connection_still_passes_the_other_way() -> None:
    async def scene(link: BadLink, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(30_000))
        got = await reader.read(-1)  # all that the other side could send back, and then its end
        assert 20_000 <= len(got) <= 30_000

    link = play(Faults(half_close_after=20_000), scene)
    assert link.cuts >= 1 and link.down == link.up


def test_a_slow_and_far_link_takes_its_time() -> None:
    async def scene(link: BadLink, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        begun = asyncio.get_running_loop().time()
        writer.write(bytes(10_000))
        await reader.readexactly(10_000)
        assert asyncio.get_running_loop().time() - begun >= 0.4 + 2 * 0.1  # and not twice 0.4: directions overlap

    play(Faults(bytes_per_s=25_000, delay_s=0.1), scene)


def test_a_frozen_link_passes_nothing_and_stays_open() -> None:
    async def scene(link: BadLink, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        begun = asyncio.get_running_loop().time()
        writer.write(b"x")
        await reader.readexactly(1)
        writer.write(b"y")
        assert await reader.readexactly(1) == b"y"
        assert asyncio.get_running_loop().time() - begun >= 0.3

    assert play(Faults(freeze_after=1, freeze_s=0.3), scene).cuts == 1


def test_where_nobody_listens_connections_end() -> None:
    async def main() -> None:
        async with bad_link(1) as link:
            reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(1), 20)
            writer.close()

    asyncio.run(main())
