"""Strangers without a certificate, who cost a coordinator what they can; many in one process.

python -m benchmarks.load.strangers HOST PORT ENROLLMENT_PORT CERTIFICATE COUNT

CERTIFICATE is the file with that of the enrolment server, which anybody sees who connects.

Told on standard input: `figures`, answered with a line of JSON: how many connections of each kind have ended since
then, and how many could not be made.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import ssl
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
from fedepth_wire.tokens import SECRET_BYTES
from fedepth_wire.v1 import trust_pb2 as pb
from fedepth_wire.v1.trust_pb2_grpc import EnrollmentStub

from fedepth.files import raise_open_files

GARBAGE_BYTES = 16 << 10
DRIP_S = 1.0
AWAY_S = 0.5  # after a connection that was refused
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")

_NO_CONNECTION = {errno.ECONNREFUSED, errno.ETIMEDOUT, errno.EMFILE, errno.EADDRNOTAVAIL}

Where = tuple[str, int]


async def silent(where: Where) -> None:
    """Connects, and says nothing until it is thrown out."""
    async with _connected(where) as (reader, _):
        await reader.read(1)


async def half_open(where: Where) -> None:
    """Begins a handshake, and leaves it at that."""
    async with _connected(where) as (reader, writer):
        writer.write(_hello())
        while await reader.read(4096):
            pass


async def dripping(where: Where) -> None:
    """Begins a handshake byte by byte."""
    async with _connected(where) as (_, writer):
        for byte in _hello():
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(DRIP_S)


async def garbage(where: Where) -> None:
    """Sends anything, as fast as it can."""
    async with _connected(where) as (reader, writer):
        writer.write(os.urandom(GARBAGE_BYTES))
        while await reader.read(4096):
            pass


async def handshakes(where: Where) -> None:
    """Does a whole handshake, with no certificate, and asks; as fast as it can."""
    reader, writer = await asyncio.open_connection(*where, ssl=_CONTEXT)
    try:
        writer.write(_PREFACE)
        while await reader.read(4096):
            pass
    finally:
        writer.transport.abort()


def enrolling(certificate: bytes) -> Callable[[Where], Awaitable[None]]:
    """Tries secrets, as fast as it can, over one connection after the other."""

    async def enroll(where: Where) -> None:
        options = [("grpc.ssl_target_name_override", "enrollment.fedepth.internal"), ("grpc.enable_http_proxy", 0)]
        credentials = grpc.ssl_channel_credentials(certificate)
        request = pb.EnrollRequest(secret=os.urandom(SECRET_BYTES), request=b"0", device_id="stranger")
        async with grpc.aio.secure_channel(f"ipv4:{where[0]}:{where[1]}", credentials, options) as channel:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await EnrollmentStub(channel).Enroll(request, timeout=60)

    return enroll


@contextlib.asynccontextmanager
async def _connected(where: Where) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(*where)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def _hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        _CONTEXT.wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


_CONTEXT = _context()


class Strangers:
    """Those of one process: kinds and ports in turn."""

    def __init__(self, host: str, ports: tuple[int, int], certificate: bytes, count: int) -> None:
        coordinator, enrollment = ports
        everywhere = (silent, half_open, dripping, garbage, handshakes)
        kinds = [(kind, kind.__name__, (host, port)) for kind in everywhere for port in (coordinator, enrollment)]
        kinds.append((enrolling(certificate), "enrolling", (host, enrollment)))
        self._ended: Counter[str] = Counter()
        self._all = [asyncio.create_task(self._flood(*kinds[number % len(kinds)])) for number in range(count)]

    async def _flood(self, kind: Callable[[Where], Awaitable[None]], name: str, where: Where) -> None:
        while True:
            try:
                await kind(where)
                self._ended[name] += 1
            except (OSError, ssl.SSLError, asyncio.IncompleteReadError) as error:
                # An answer in TLS or in TCP: thrown out. Otherwise there was no connection.
                refused = isinstance(error, ConnectionRefusedError) or (error.errno or 0) in _NO_CONNECTION
                self._ended["no connection" if refused else name] += 1
                if refused:
                    await asyncio.sleep(AWAY_S)

    def figures(self) -> dict[str, int]:
        """Connections that have ended since this was asked last, by kind."""
        ended, self._ended = self._ended, Counter()
        return dict(ended)


async def _serve(host: str, port: str, enrollment: str, certificate: str, count: str) -> None:
    strangers = Strangers(host, (int(port), int(enrollment)), Path(certificate).read_bytes(), int(count))
    while await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline):
        print(json.dumps(strangers.figures()), flush=True)


if __name__ == "__main__":
    raise_open_files()
    asyncio.run(_serve(*sys.argv[1:]))
