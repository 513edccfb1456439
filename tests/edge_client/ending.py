"""A coordinator that ends each upload at once, in a process of its own: only so does the end come in any step of the
client's. Prints its port.

    python -m tests.edge_client.ending MESSAGES OUTCOME

MESSAGES: how many parts it takes before the end; OUTCOME: "refused", or the name of a status."""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationServicer, add_FederationServicer_to_server


class Ending(FederationServicer):
    """Ends an upload as it was told to."""

    async def UploadPart(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.UploadPartRequest], context: Any
    ) -> AsyncIterator[pb.UploadPartReply]:
        for _ in range(int(sys.argv[1])):
            await anext(request_iterator)
            yield pb.UploadPartReply(held_bytes=0)
        if sys.argv[2] == "refused":
            yield pb.UploadPartReply(refused=pb.Refused(reason="late", message="so it is"))
        else:
            await context.abort(grpc.StatusCode[sys.argv[2]], "so it is")


async def _serve() -> None:
    server = grpc.aio.server()
    add_FederationServicer_to_server(Ending(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve())
