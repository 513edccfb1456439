"""The two streams of files, as the device sees them: each at the pace of its link, and over when nothing moves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import grpc
import grpc.aio
from fedepth_wire.pace import Pace
from fedepth_wire.times import within
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationStub

from edge_client.call_errors import CutError, UnreachableError
from fedepth.errors import ProtocolError, TransportError
from fedepth.heap import moving_files


class Streams:
    """Sends and fetches files. What one stream learns about the link, the next one knows.

    Attributes:
        moved_bytes: bytes of files that were sent and received since the start.
        spent_bytes: bytes of files that were sent and asked for, also those that were lost with a cut.
    """

    def __init__(
        self,
        stub: Callable[[], FederationStub],
        address: str,
        error: Callable[[grpc.aio.AioRpcError], TransportError],
        stall_s: float,
    ) -> None:
        """`stub`: of the channel that is in use by now; `error`: what the end of a call means; `stall_s`: a stream on
        which nothing moves for so long is over."""
        self.moved_bytes = self.spent_bytes = 0
        self._stub = stub
        self._address = address
        self._error = error
        self._stall_s = stall_s
        self._down, self._up = Pace(), Pace()

    async def fetch(
        self, digest: str, ranges: Sequence[tuple[int, int]], take: Callable[[int, bytes], None], verify: bool = False
    ) -> None:
        """Fetches ranges of a file, in this order.

        Args:
            take: is called with the offset of every chunk and its data, in a thread.
            verify: the coordinator should look at its file first.

        Raises:
            TransportError: the stream ended early; CutError, if something came before that.
            ProtocolError, OSError: what `take` raises.
        """
        wanted = [pb.Range(begin=begin, end=end) for begin, end in ranges]
        request = pb.FetchFileRequest(digest=digest, ranges=wanted, verify=verify)
        total = sum(end - begin for begin, end in ranges)
        credit = 0
        call = self._stub().FetchFile()  # type: ignore[call-arg]  # grpc-stubs ask for an iterator
        with self._stream(self._down, call) as stream:
            pace = stream.pace
            while pace.moved < total:
                more = min(total, pace.moved + pace.window) - credit
                if more >= min(pace.piece, total - credit) > 0:
                    pace.sent(more)
                    credit += more
                    self.spent_bytes += more
                    request.credit_bytes, request.piece_bytes = credit, pace.piece
                    await stream.write(request)
                    request = pb.FetchFileRequest()
                chunk = await stream.read()
                if not isinstance(chunk, pb.Chunk):  # grpc.aio.EOF
                    raise ProtocolError(f"{self._address} ended a stream after {pace.moved} of {total} bytes")
                offset, data = chunk.offset, chunk.data  # a copy, so once
                size = len(data)
                if pace.moved + size > credit:
                    raise ProtocolError(f"{self._address} sent {pace.moved + size} bytes, asked for were {credit}")
                await asyncio.to_thread(take, offset, data)
                pace.arrived(size)
                self.moved_bytes += size

    async def send(
        self, header: pb.UploadHeader, opened: Callable[[], BinaryIO], describes: bool = False
    ) -> pb.UploadPartReply:
        """Sends what the coordinator does not hold yet of a part. The answer says `sealed` or `refused`.

        Args:
            opened: opens what is sent; in a thread.
            describes: it is no part, but what the device says of its data.

        Raises:
            TransportError: the stream ended early; CutError, if it had taken something by then.
            ProtocolError: what it answers cannot be, or the part has changed.
            OSError: the part cannot be read.
        """
        stub = self._stub()
        method = stub.DescribeData if describes else stub.UploadPart
        call = method()  # type: ignore[call-arg]  # grpc-stubs ask for an iterator
        with self._stream(self._up, call) as stream:
            pace = stream.pace
            await stream.write(pb.UploadPartRequest(header=header))
            reply = await self._answer(stream)
            if reply.WhichOneof("outcome") != "held_bytes":
                return reply
            total, held = header.size_bytes, max(0, reply.held_bytes)
            sent = held
            with await asyncio.to_thread(opened) as file:
                file.seek(held)
                while reply.WhichOneof("outcome") == "held_bytes":
                    if not held <= reply.held_bytes <= sent <= total:
                        raise ProtocolError(
                            f"{self._address} claims to hold {reply.held_bytes} of {total} bytes, sent were {sent}"
                        )
                    pace.arrived(reply.held_bytes - held)
                    held = reply.held_bytes
                    while sent < total and (size := pace.next_piece):
                        data = await asyncio.to_thread(file.read, size)
                        if not data or sent + len(data) > total:
                            raise ProtocolError(f"a file that is sent has changed: it had {total} bytes")
                        pace.sent(len(data))
                        request = pb.UploadPartRequest()  # filled in place: a chunk of its own would be copied into it
                        request.chunk.offset, request.chunk.data = sent, data
                        if not await stream.write(request):
                            break
                        sent += len(data)
                        self.moved_bytes += len(data)
                        self.spent_bytes += len(data)
                    reply = await self._answer(stream)
            return reply

    @contextlib.contextmanager
    def _stream(self, pace: Pace, call: Any) -> Iterator[_Stream]:
        """A stream, whose pace learns of a cut."""
        stream = _Stream(call, pace, self._in_time)
        pace.start()
        try:
            with moving_files():
                yield stream
        except (grpc.aio.AioRpcError, UnreachableError) as status:
            error = self._error(status) if isinstance(status, grpc.aio.AioRpcError) else status
            internal = isinstance(status, grpc.aio.AioRpcError) and status.code() is grpc.StatusCode.INTERNAL
            if not isinstance(error, UnreachableError) and not (internal and stream.ended_in_a_write):
                raise error from None
            moved = pace.moved
            pace.cut()
            if moved:
                raise CutError(str(error)) from None
            # As it is: whoever waits for another certificate does not wait as long as for a coordinator that is away.
            raise (error if isinstance(error, UnreachableError) else UnreachableError(str(error))) from None
        finally:
            call.cancel()

    async def _answer(self, stream: _Stream) -> pb.UploadPartReply:
        reply = await stream.read()
        if not isinstance(reply, pb.UploadPartReply) or reply.WhichOneof("outcome") is None:
            raise ProtocolError(f"{self._address} answered UploadPart with no outcome; is it a newer version?")
        return reply

    async def _in_time(self, step: Awaitable[Any]) -> Any:
        try:
            return await within(self._stall_s, step)
        except asyncio.TimeoutError:
            raise UnreachableError(f"{self._address}: nothing moved for {self._stall_s:g} s") from None


@dataclass
class _Stream:
    """A call with messages in both directions.

    Attributes:
        in_time: waits for a step, which must not take too long.
        ended_in_a_write: the other side had ended it by then. grpc puts INTERNAL over its true status in such a write
            (grpc/aio/_call.py, _write), so that says no more than that the stream was cut.
    """

    call: Any
    pace: Pace
    in_time: Callable[[Awaitable[Any]], Awaitable[Any]]
    ended_in_a_write: bool = False

    async def write(self, message: Any) -> bool:
        """Whether it is on its way. If not, a read has the status, which a write fails without."""
        try:
            await self.in_time(self.call.write(message))
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
            self.ended_in_a_write = True
            return False
        return True

    async def read(self) -> Any:
        return await self.in_time(self.call.read())
