"""The floor: a loop over gRPC that sends a model down and up in chunks of 1 MiB, with a sha256 over each way, and adds
the updates while they arrive. No encryption, no record, nothing survives a crash.

    python -m benchmarks.transport.bare server PORT_FILE CLIENTS ROUNDS BYTES ROUNDS_FILE
    python -m benchmarks.transport.bare client PORT_FILE ROUNDS
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np

CHUNK_BYTES = 1 << 20
_OPTIONS = [("grpc.max_receive_message_length", 4 << 20), ("grpc.max_send_message_length", 4 << 20)]
_SERVICE = "bare.Loop"


class Loop:
    """The server's state: the model, and what has been added up of the round."""

    def __init__(self, clients: int, rounds: int, size: int, rounds_file: Path) -> None:
        self._clients = clients
        self._rounds = rounds
        self._model = np.zeros(size // 4, np.float32)
        self._sum = np.zeros_like(self._model)
        self._came = 0
        self._round = 1
        self._next = asyncio.Event()
        self._rounds_file = rounds_file
        self.over = asyncio.Event()

    async def down(self, _: bytes, context: Any) -> AsyncIterator[bytes]:
        data = memoryview(self._model).cast("B")
        digest = hashlib.sha256()
        for begin in range(0, len(data), CHUNK_BYTES):
            piece = bytes(data[begin : begin + CHUNK_BYTES])
            digest.update(piece)
            yield piece
        yield digest.digest()

    async def up(self, pieces: AsyncIterator[bytes], context: Any) -> bytes:
        digest = hashlib.sha256()
        total = memoryview(self._sum).cast("B").cast("f")
        begin = 0
        async for piece in pieces:
            if begin == len(total):
                assert piece == digest.digest(), "an update came damaged"
                break
            digest.update(piece)
            values = np.frombuffer(piece, np.float32)
            self._sum[begin : begin + len(values)] += values
            begin += len(values)
        self._came += 1
        if self._came == self._clients:
            self._end_round()
            return b""
        await self._next.wait()
        return b""

    def _end_round(self) -> None:
        np.divide(self._sum, self._clients, out=self._model)
        self._sum[:] = 0
        self._came = 0
        with self._rounds_file.open("a") as file:
            file.write(f"{self._round}\n")
        if self._round == self._rounds:
            self.over.set()
        self._round += 1
        self._next.set()
        self._next = asyncio.Event()


async def serve(port_file: Path, clients: int, rounds: int, size: int, rounds_file: Path) -> None:
    loop = Loop(clients, rounds, size, rounds_file)
    server = grpc.aio.server(options=_OPTIONS)
    handlers = {
        "Down": grpc.unary_stream_rpc_method_handler(loop.down),
        "Up": grpc.stream_unary_rpc_method_handler(loop.up),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    port_file.write_text(f"{port}\n")
    await loop.over.wait()
    await server.stop(5)


async def take_part(port_file: Path, rounds: int) -> None:
    while not (port_file.exists() and port_file.read_text().endswith("\n")):
        await asyncio.sleep(0.05)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port_file.read_text().strip()}", options=_OPTIONS) as channel:
        down, up = (
            channel.unary_stream(f"/{_SERVICE}/Down", None, None),
            channel.stream_unary(f"/{_SERVICE}/Up", None, None),
        )
        for _ in range(rounds):
            pieces = [piece async for piece in down(b"")]
            digest = hashlib.sha256()
            for piece in pieces[:-1]:
                digest.update(piece)
            assert digest.digest() == pieces[-1], "the model came damaged"
            model = np.frombuffer(b"".join(pieces[:-1]), np.float32) + np.float32(1e-3)
            await up(_sent(model))


async def _sent(model: np.ndarray[Any, np.dtype[np.float32]]) -> AsyncIterator[bytes]:
    data = memoryview(model).cast("B")
    digest = hashlib.sha256()
    for begin in range(0, len(data), CHUNK_BYTES):
        piece = bytes(data[begin : begin + CHUNK_BYTES])
        digest.update(piece)
        yield piece
    yield digest.digest()


if __name__ == "__main__":
    if sys.argv[1] == "server":
        asyncio.run(serve(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), Path(sys.argv[6])))
    else:
        asyncio.run(take_part(Path(sys.argv[2]), int(sys.argv[3])))
