"""Devices that poll as agents do and take part when they are drawn: many in a process, each on its own connection.

python -m benchmarks.load.agents HOST:PORT FILE SEED

Told on standard input: `connect`, `poll`, `figures`, `burst SECONDS`; each is answered with a line of JSON.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import grpc
from fedepth_wire.channel import CLIENT_OPTIONS, target
from fedepth_wire.times import POLL_S
from fedepth_wire.tls import COORDINATOR_NAME, Identity, channel_credentials
from fedepth_wire.v1 import federation_pb2 as pb

from benchmarks.load.fleet import Figures
from benchmarks.simulated_device import Fetched, SimulatedDevice
from fedepth.address import parse_address
from fedepth.files import raise_open_files

CONNECTING = 16  # at once
BURST_ASKING = 16  # at once in a process
NOISE = 1e-4
PAUSE_S = 1.0  # after an error; after each further one twice as long, as agents do
LONGEST_PAUSE_S = 64.0


class Device:
    """One agent."""

    def __init__(self, address: str, row: dict[str, str], authority: bytes, fetched: Fetched, seed: int) -> None:
        identity = Identity(row["key"].encode(), row["certificate"].encode(), authority)
        options: list[tuple[str, Any]] = [
            *CLIENT_OPTIONS,
            ("grpc.ssl_target_name_override", COORDINATOR_NAME),
            ("grpc.use_local_subchannel_pool", 1),  # a connection of its own
        ]
        channel = grpc.aio.secure_channel(target(parse_address(address)), channel_credentials(identity), options)
        self.client = SimulatedDevice(channel, row["id"], fetched=fetched)
        self.report = self.client.report()
        self.random = random.Random(seed)


class Agents:
    """The devices of this process."""

    def __init__(self, address: str, file: Path, seed: int) -> None:
        kept = json.loads(file.read_text())
        shared = Fetched()
        authority = kept["authority"].encode()
        self._devices = [
            # Graph and model are the same in all rounds; the weights are fetched by everybody who takes part.
            Device(address, row, authority, Fetched(shared.models, shared.graphs), seed + number)
            for number, row in enumerate(kept["devices"])
        ]
        self._figures = Figures()
        self._counts = {"answers": 0, "updates": 0}
        self._polling: list[asyncio.Task[None]] = []

    async def connect(self) -> None:
        """Every device asks for the first time."""
        turn = asyncio.Semaphore(CONNECTING)

        async def first(device: Device) -> None:
            async with turn:
                await self._ask(device, 0)

        await asyncio.gather(*map(first, self._devices))

    def poll(self) -> None:
        """Lets all devices poll from now on."""
        self._polling = [asyncio.create_task(self._work(device)) for device in self._devices]

    def figures(self) -> dict[str, Any]:
        """What was seen since this was asked last."""
        found, self._figures = self._figures, Figures()
        counts, self._counts = self._counts, {"answers": 0, "updates": 0}
        return {**dataclasses.asdict(found), **counts}

    async def burst(self, seconds: float) -> None:
        """Nobody waits for work, and as many questions are asked as are answered."""
        for each in self._polling:
            each.cancel()
        await asyncio.wait(self._polling)
        self.figures()
        end = time.monotonic() + seconds
        turns = iter(self._devices * 1000)

        async def asking() -> None:
            while time.monotonic() < end:
                await self._ask(next(turns), 0)

        await asyncio.gather(*(asking() for _ in range(BURST_ASKING)))

    async def _work(self, device: Device) -> None:
        await asyncio.sleep(device.random.random() * POLL_S)
        pause = PAUSE_S
        while True:
            for wait_s in (0.0, POLL_S):
                reply = await self._ask(device, wait_s)
                if reply is None:
                    await asyncio.sleep(pause * (0.5 + device.random.random()))
                    pause = min(2 * pause, LONGEST_PAUSE_S)
                    continue
                pause = PAUSE_S
                outcome = reply.WhichOneof("outcome")
                if outcome == "task":
                    await self._take_part(device, reply)
                elif outcome == "retry":
                    await asyncio.sleep(reply.retry.retry_after_ms / 1000)
                else:
                    self._note(f"answered {outcome}: {reply.rejected.message}")
                    await asyncio.sleep(PAUSE_S)

    async def _ask(self, device: Device, wait_s: float) -> pb.NextTaskReply | None:
        begun = time.monotonic()
        try:
            reply = await device.client.ask(device.report, wait_s)
        except grpc.aio.AioRpcError as error:
            self._note(f"NextTask: {error.code().name}: {error.details()}")
            return None
        if not wait_s:
            self._figures.seconds.append(time.monotonic() - begun)
        self._counts["answers"] += 1
        return reply

    async def _take_part(self, device: Device, reply: pb.NextTaskReply) -> None:
        client = device.client
        try:
            task = await client.task_in(reply)
            assert task is not None
            part = await client.update(task, task.plan, NOISE, device.random.randrange(1 << 30))
            uploaded = await client.upload(task, part)
            committed = await client.commit(client.result(task, task.plan, [part]))
        except grpc.aio.AioRpcError as error:
            self._note(f"an update: {error.code().name}: {error.details()}")
            return
        finally:
            client.fetched.weights.clear()
        if committed.WhichOneof("outcome") == "accepted":
            self._counts["updates"] += 1
        elif committed.refused.reason != "late":
            self._note(f"an update was refused: {uploaded.refused.message} {committed.refused.message}")

    def _note(self, error: str) -> None:
        self._figures.errors[error] = self._figures.errors.get(error, 0) + 1


async def _serve(address: str, file: Path, seed: int) -> None:
    agents = Agents(address, file, seed)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        words = line.split()
        if words[0] == "connect":
            await agents.connect()
        elif words[0] == "poll":
            agents.poll()
        elif words[0] == "burst":
            await agents.burst(float(words[1]))
        print(json.dumps(agents.figures() if words[0] in ("figures", "burst", "connect") else {}), flush=True)


if __name__ == "__main__":
    raise_open_files()
    asyncio.run(_serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
