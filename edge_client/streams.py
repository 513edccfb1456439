"""The two streams of files, as the device sees them: each at the pace of its link, and over when nothing moves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import grpc
import grpc.aio
from fedepth_wire.pace import Pace
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationStub

from edge_client.call_errors import CutError, UnreachableError
from fedepth.errors import ProtocolError, TransportError
from fedepth.heap import moving_files
from fedepth.timeout import within

T = TypeVar("T")


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
        stub = self._stub()
        call = stub.FetchFile()  # type: ignore[call-arg]  # grpc-stubs ask for an iterator
        with self._stream(self._down, stub, call) as stream:
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
                if not isinstance(chunk, pb.Chunk):
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
        with self._stream(self._up, stub, call) as stream:
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
    def _stream(self, pace: Pace, stub: FederationStub, call: Any) -> Iterator[_Stream]:
        """A stream, whose pace learns of a cut. It gives way once another channel is in use."""

        def check_in_use() -> None:
            # Not left to the end of its channel, which grpc makes a cancellation of whoever reads.
            if self._stub() is not stub:
                raise CutError(f"{self._address}: going on over a connection with a new certificate")

        stream = _Stream(call, pace, self._in_time, check_in_use)
        pace.start()
        try:
            with moving_files():
                yield stream
        except CutError:
            raise
        except (grpc.aio.AioRpcError, UnreachableError) as status:
            error = self._error(status) if isinstance(status, grpc.aio.AioRpcError) else status
            if not isinstance(error, UnreachableError):
                raise error from None
            moved = pace.moved
            pace.cut()
            if moved:
                raise CutError(str(error)) from None
            raise error from None
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
    """A call with messages in both directions, which ends with the status that the other side has given it.

    Where that status comes in the midst of a write, grpc sets another of its own, INTERNAL, before it or over it
    (grpc/aio/_call.py, _write): a device that is refused for good would take that for a cut, and try again.

    Attributes:
        in_time: waits for a step, which must not take too long.
        check_in_use: raises CutError where it should give way to another.
        first: the code and details that the call had first of all.
        grpcs_own: the ones that a write has set.
    """

    call: Any
    pace: Pace
    in_time: Callable[[Awaitable[Any]], Awaitable[Any]]
    check_in_use: Callable[[], None]
    first: tuple[grpc.StatusCode, str] | None = None
    grpcs_own: tuple[grpc.StatusCode, str] | None = None

    def __post_init__(self) -> None:
        # Not call.read(), which reads nothing more once there is a status: what was answered before would be lost.
        self.messages = aiter(self.call)
        self.call.add_done_callback(self._note_first)

    async def write(self, message: Any) -> bool:
        """Whether the message is on its way. If not, a read has what was answered before the end, then the status."""
        return bool(await self.in_time(self._write(message)))

    async def read(self) -> Any:
        """The next message; None after the last one, if the call ended with OK."""
        self.check_in_use()
        return await self.in_time(self._read())

    async def _write(self, message: Any) -> bool:
        try:
            await self.call.wait_for_connection()  # or its end, with its status
        except grpc.aio.AioRpcError:
            return False
        try:
            await self.call.write(message)
        except asyncio.InvalidStateError:  # it has ended before
            return False
        except grpc.aio.AioRpcError as status:
            self.grpcs_own = status.code(), status.details() or ""
            return False
        return True

    async def _read(self) -> Any:
        try:
            return await anext(self.messages)
        except StopAsyncIteration:
            return None
        except grpc.aio.AioRpcError:
            if self.grpcs_own is None:
                raise
        assert self.first is not None
        code, details = self.first
        while (code, details) == self.grpcs_own:  # no more messages, so the true one is here at any moment
            await asyncio.sleep(0.01)
            code, details = await self.call.code(), await self.call.details()
        if code is grpc.StatusCode.OK:
            return None
        raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details, debug_error_string="")

    def _note_first(self, call: Any) -> None:
        self.first = _at_once(call.code()), _at_once(call.details())


def _at_once(step: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that has nothing to wait for, outside the event loop's turn.

    A callback needs it: by the time of a task of its own, grpc may have set another status.
    """
    try:
        step.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    step.close()
    raise AssertionError("a call that has ended has no status yet")
