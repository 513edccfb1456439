"""How a stream ends that the coordinator ends while the device is writing: as the coordinator has said, every time."""

import asyncio
import io
import subprocess
import sys
from collections import Counter

import grpc.aio
import pytest
from fedepth_wire.tls import INSECURE
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationStub

from edge_client.call_errors import ServerError, as_error
from edge_client.streams import Streams
from fedepth.errors import TransportError

UPLOADS = 150
PART_BYTES = 1 << 20


async def _ends(address: str) -> Counter[str]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = FederationStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
        streams = Streams(lambda: stub, address, lambda status: as_error(address, status, INSECURE), 20.0)
        header = pb.UploadHeader(size_bytes=PART_BYTES)
        ends: Counter[str] = Counter()
        for _ in range(UPLOADS):
            try:
                reply = await streams.send(header, lambda: io.BytesIO(bytes(PART_BYTES)))
                ends[f"{reply.WhichOneof('outcome')}: {reply.refused.message}"] += 1
            except TransportError as error:
                ends[f"{type(error).__name__}: {error}"] += 1
        return ends


@pytest.mark.parametrize("messages", [0, 1])
@pytest.mark.parametrize(
    ("outcome", "end"),
    [
        ("refused", "refused: so it is"),
        ("INVALID_ARGUMENT", f"{TransportError.__name__}: {{address}}: so it is"),
        ("INTERNAL", f"{ServerError.__name__}: {{address}}: so it is"),
    ],
)
def test_an_upload_that_ends_in_a_write_ends_as_the_coordinator_said(messages: int, outcome: str, end: str) -> None:
    command = [sys.executable, "-m", "tests.edge_client.ending", str(messages), outcome]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            address = f"127.0.0.1:{int(server.stdout.readline())}"
            assert asyncio.run(_ends(address)) == {end.format(address=address): UPLOADS}
        finally:
            server.terminate()
