"""Forty strangers of each kind, and forty hostile messages of each kind from a device: others are served meanwhile."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import psutil
import pytest
from fedepth_wire.channel import TLS_SERVER_OPTIONS, open_channel
from fedepth_wire.tls import COORDINATOR_NAME, Identity, channel_credentials, server_credentials
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import add_FederationServicer_to_server

from benchmarks.load import strangers
from benchmarks.simulated_device import SimulatedDevice
from coordinator.security.enrolling import enrollment_credentials, enrollment_server
from coordinator.security.guard import Guard
from coordinator.service import FederationService
from tests.coordinator.security.conftest import DEVICE, OTHER, Made
from tests.coordinator.security.test_guard import ended, started

MANY = 40
MOST_MEMORY_BYTES = 64 << 20
KINDS = [strangers.silent, strangers.half_open, strangers.dripping, strangers.garbage, strangers.handshakes]


@asynccontextmanager
async def serving(made: Made, **options: int) -> AsyncIterator[tuple[int, int]]:
    """The two servers as a coordinator has them; their ports."""
    settings = dict(TLS_SERVER_OPTIONS) | {f"grpc.{name}": value for name, value in options.items()}
    server = grpc.aio.server(
        options=list(settings.items()), interceptors=[Guard(made.certificates.registry, made.time)]
    )
    add_FederationServicer_to_server(FederationService(), server)  # before its job has begun: it says so
    enrollment = enrollment_server(made.certificates)
    credentials = server_credentials(made.certificates.coordinator(), lambda: None)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    enrolling = enrollment.add_secure_port("127.0.0.1:0", enrollment_credentials(made.certificates.enrollment()))
    await server.start()
    await enrollment.start()
    try:
        yield port, enrolling
    finally:
        await server.stop(0)
        await enrollment.stop(0)


async def ask(channel: grpc.aio.Channel, device_id: str) -> str:
    """What an honest device is answered."""
    reply = await SimulatedDevice(channel, device_id).ask(wait_s=0)
    return reply.retry.reason


def connected(port: int) -> int:
    """Connections of clients at a port of this process."""
    return sum(
        each.status == psutil.CONN_ESTABLISHED and each.laddr.port == port
        for each in psutil.Process().net_connections("tcp")
    )


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.02)


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


async def thrown_out(kind: Callable[[strangers.Where], Awaitable[None]], port: int) -> None:
    try:
        await kind(("127.0.0.1", port))
    except (OSError, ssl.SSLError):
        return  # that is one way to be thrown out


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_strangers_are_thrown_out_and_others_served(
    made: Made, kind: Callable[[strangers.Where], Awaitable[None]]
) -> None:
    async def scene() -> None:
        async with (
            serving(made, server_handshake_timeout_ms=2000) as (port, _),
            open_channel(f"127.0.0.1:{port}", made.device()) as channel,
        ):
            assert await ask(channel, DEVICE) == "busy: the job has not begun yet"
            before = resident()
            flood = asyncio.gather(*(thrown_out(kind, port) for _ in range(MANY)))
            while not flood.done():
                assert await ask(channel, DEVICE) == "busy: the job has not begun yet"
                await asyncio.sleep(0.1)  # or the device would be the flood
            await flood
            await until(lambda: connected(port) == 1)
            assert resident() - before < MOST_MEMORY_BYTES

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_secrets_that_are_tried_leave_devices_alone(made: Made) -> None:
    certificate = made.certificates.enrollment().certificate

    async def scene() -> None:
        async with serving(made) as ports, open_channel(f"127.0.0.1:{ports[0]}", made.device()) as channel:
            attempts = [thrown_out(strangers.enrolling(certificate), ports[1]) for _ in range(MANY)]
            flood = asyncio.gather(*attempts)
            while not flood.done():
                assert await ask(channel, DEVICE) == "busy: the job has not begun yet"
                await asyncio.sleep(0.1)
            await flood
            await until(lambda: connected(ports[1]) == 0)

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_where_strangers_take_all_connections_devices_come_back_when_they_are_thrown_out(made: Made) -> None:
    async def scene() -> None:
        async with serving(made, server_handshake_timeout_ms=2000, max_allowed_incoming_connections=8) as ports:
            flood = [asyncio.ensure_future(thrown_out(strangers.silent, ports[0])) for _ in range(MANY)]
            await until(lambda: sum(each.done() for each in flood) == MANY - 8)
            async with open_channel(f"127.0.0.1:{ports[0]}", made.device()) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await ask(channel, DEVICE)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                await asyncio.gather(*flood)
                await asyncio.wait_for(channel.channel_ready(), 30)
                assert await ask(channel, DEVICE) == "busy: the job has not begun yet"

    asyncio.run(asyncio.wait_for(scene(), 60))


# Of the kinds that benchmarks.faults.hostile and test_hostile_messages know: a method, and what a device sends.
HOSTILE: dict[str, tuple[str, Callable[[], Any]]] = {
    "many class counts": (
        "NextTask",
        lambda: pb.NextTaskRequest(device=pb.DeviceReport(device_id=OTHER, class_counts=[1] * 1_000_000)),
    ),
    "a message above the limit": (
        "NextTask",
        lambda: pb.NextTaskRequest(device=pb.DeviceReport(device_id=OTHER, class_counts=[1] * 1_200_000)),
    ),
    "huge texts": (
        "NextTask",
        lambda: pb.NextTaskRequest(device=pb.DeviceReport(device_id=OTHER, name="\x1b[2J[red]" * 80_000)),
    ),
    "odd numbers": (
        "NextTask",
        lambda: pb.NextTaskRequest(device=pb.DeviceReport(device_id=OTHER, sample_count=-(2**63))),
    ),
    "many stages": (
        "CommitUpdate",
        lambda: pb.CommitUpdateRequest(result=pb.Result(device_id=OTHER, plan=pb.Plan(stages=[pb.Stage()] * 10_000))),
    ),
    "another's name": ("ReportProgress", lambda: pb.Progress(device_id=DEVICE, task_id="t" * 100_000)),
    "a long failure": ("ReportFailure", lambda: pb.Failure(device_id=OTHER, message="x" * 900_000)),
    "a part without end": (
        "UploadPart",
        lambda: pb.UploadPartRequest(header=pb.UploadHeader(device_id=OTHER, task_id="x" * 900, size_bytes=2**62)),
    ),
    "a file without end": (
        "DescribeData",
        lambda: pb.UploadPartRequest(header=pb.UploadHeader(device_id=OTHER, digest="0" * 64, size_bytes=2**62)),
    ),
    "ranges without end": (
        "FetchFile",
        lambda: pb.FetchFileRequest(digest="0" * 64, ranges=[pb.Range(begin=0, end=2**62)] * 20_000, piece_bytes=1),
    ),
    "an operator's call": ("JobStatus", pb.JobStatusRequest),
}


def _unlimited(port: int, identity: Identity) -> grpc.aio.Channel:
    """The channel of a device with settings of its own: nothing holds it to ours."""
    options = [("grpc.ssl_target_name_override", COORDINATOR_NAME), ("grpc.max_send_message_length", -1)]
    return grpc.aio.secure_channel(f"127.0.0.1:{port}", channel_credentials(identity), options)


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_messages_of_a_device_leave_others_alone(made: Made, kind: str) -> None:
    method, request = HOSTILE[kind][0], HOSTILE[kind][1]()

    async def hostile(channel: grpc.aio.Channel) -> None:
        code, why = await ended(started(channel, method, request))
        assert code not in (grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL), why

    async def scene() -> None:
        async with (
            serving(made) as (port, _),
            open_channel(f"127.0.0.1:{port}", made.device()) as channel,
            _unlimited(port, made.device("hostile", OTHER)) as theirs,
        ):
            assert await ask(channel, DEVICE) == "busy: the job has not begun yet"
            before = resident()
            flood = asyncio.gather(*(hostile(theirs) for _ in range(MANY)))
            while not flood.done():
                assert await ask(channel, DEVICE) == "busy: the job has not begun yet"
                await asyncio.sleep(0.1)
            await flood
            assert resident() - before < 3 * MOST_MEMORY_BYTES  # what is sent is made in this process as well

    asyncio.run(asyncio.wait_for(scene(), 60))
