"""The transport over mutual TLS: certificates that change under it, and ends that do not fit together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from fedepth_wire.tls import INSECURE, Identity, Insecure, caller_of, server_credentials
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationServicer, add_FederationServicer_to_server

from benchmarks.certificates import LabCertificates
from coordinator.security.certificates import Certificates
from edge_client.call_errors import CutError, UntrustedError
from edge_client.streams import Streams
from edge_client.transport import GrpcTransport
from fedepth.files import open_regular
from fedepth.task import Failure, Outcome, Progress


class Named(FederationServicer):
    """Notes with which certificate each call was made; an upload waits for leave to end."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.begun, self.leave = asyncio.Event(), asyncio.Event()

    def _note(self, context: Any) -> None:
        caller = caller_of(context.auth_context())
        assert caller is not None
        self.names.append(caller.name)

    async def ReportFailure(self, request: pb.Failure, context: Any) -> pb.Ack:
        self._note(context)
        self.begun.set()
        await self.leave.wait()
        return pb.Ack(wanted=True)

    async def ReportProgress(self, request: pb.Progress, context: Any) -> pb.Ack:
        self._note(context)
        return pb.Ack(wanted=True)


@pytest.fixture
def lab(tmp_path: Path) -> LabCertificates:
    return LabCertificates(tmp_path / "certificates")


def over_tls(lab: LabCertificates, server: FederationServicer, scene: Callable[[str], Awaitable[None]]) -> None:
    async def play() -> None:
        lab.serve_options()
        running = grpc.aio.server()
        add_FederationServicer_to_server(server, running)
        credentials = server_credentials(Certificates(lab.folder).coordinator(), lambda: None)
        port = running.add_secure_port("127.0.0.1:0", credentials)
        await running.start()
        try:
            await scene(f"127.0.0.1:{port}")
        finally:
            await running.stop(None)

    asyncio.run(asyncio.wait_for(play(), 60))


FAILURE = Failure("t", 1, "d", Outcome.ERROR, "no")


def test_a_new_certificate_does_not_end_what_is_under_way(tmp_path: Path, lab: LabCertificates) -> None:
    server = Named()

    async def scene(address: str) -> None:
        transport = GrpcTransport(address, tmp_path, lab.device("before")[1])
        under_way = asyncio.ensure_future(transport.report_failure(FAILURE))
        await server.begun.wait()
        await transport.use(lab.device("after")[1])
        assert await transport.report_progress(Progress("t", 1, "d", "training"))
        assert not under_way.done()
        server.leave.set()
        assert await under_way
        assert server.names == ["before", "after"]
        await transport.close()

    over_tls(lab, server, scene)


class Slow(FederationServicer):
    """Takes and sends files byte by byte, each when the test says so; what it holds stays."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.held = 0
        self.moved = asyncio.Event()
        self.next = asyncio.Event()

    async def UploadPart(self, requests: Any, context: Any) -> None:
        caller = caller_of(context.auth_context())
        assert caller is not None
        self.names.append(caller.name)
        size = (await context.read()).header.size_bytes
        await context.write(pb.UploadPartReply(held_bytes=self.held))
        while self.held < size:
            request = await context.read()
            if request is grpc.aio.EOF:
                return
            self.held += len(request.chunk.data)
            self.moved.set()
            await self.next.wait()
            if self.held < size:
                await context.write(pb.UploadPartReply(held_bytes=self.held))
        await context.write(pb.UploadPartReply(sealed=pb.Sealed(size_bytes=size)))


def test_an_upload_under_way_goes_on_with_the_new_certificate(
    tmp_path: Path, lab: LabCertificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow link it may take longer than its channel is left open, and would end as a cancellation of the agent."""
    monkeypatch.setattr("edge_client.transport.LONGEST_CALL_S", 0.1)
    server = Slow()
    (tmp_path / "part").write_bytes(bytes(100_000))

    async def scene(address: str) -> None:
        client = GrpcTransport(address, tmp_path, lab.device("before")[1])
        header = pb.UploadHeader(task_id="t", attempt=1, device_id="d", size_bytes=100_000, digest="0" * 64)
        sending = asyncio.ensure_future(client._sent(header, lambda: open_regular(tmp_path / "part")))
        await server.moved.wait()
        await client.use(lab.device("after")[1])
        server.next.set()
        assert (await sending).sealed.size_bytes == 100_000
        assert server.names == ["before", "after"]
        await client.close()

    over_tls(lab, server, scene)


class Revoked(FederationServicer):
    """What a coordinator answers to a device whose certificate was revoked; once something has moved, if it should."""

    moves = False

    async def UploadPart(self, requests: Any, context: Any) -> None:
        await context.read()
        if self.moves:
            await context.write(pb.UploadPartReply(held_bytes=0))
            await context.read()
            await context.write(pb.UploadPartReply(held_bytes=5))
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the certificate of kitchen was revoked")

    async def FetchFile(self, requests: Any, context: Any) -> None:
        await context.read()
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the certificate of kitchen was revoked")


def test_streams_say_that_a_certificate_is_not_accepted(tmp_path: Path, lab: LabCertificates) -> None:
    """An agent with an update to deliver calls nothing else; it must not wait as if the coordinator were away."""
    server = Revoked()
    (tmp_path / "part").write_bytes(b"0123456789")

    async def scene(address: str) -> None:
        transport = GrpcTransport(address, tmp_path, lab.device("kitchen")[1])
        header = pb.UploadHeader(task_id="t", attempt=1, device_id="d", size_bytes=10, digest="0" * 64)
        streams = Streams(lambda: transport._stub, address, transport._as_error, 20)
        says = "the certificate of kitchen was revoked"
        with pytest.raises(UntrustedError, match=says):
            await streams.send(header, lambda: open_regular(tmp_path / "part"))
        with pytest.raises(UntrustedError, match=says):
            await streams.fetch("0" * 64, [(0, 10)], lambda offset, data: None)
        server.moves = True
        with pytest.raises(CutError, match=says):  # and it is tried again at once
            await streams.send(header, lambda: open_regular(tmp_path / "part"))
        await transport.close()

    over_tls(lab, server, scene)


def test_ends_that_do_not_fit_are_told_apart(tmp_path: Path, lab: LabCertificates) -> None:
    others = LabCertificates(tmp_path / "others")

    async def told(address: str, identity: Identity | Insecure) -> str:
        transport = GrpcTransport(address, tmp_path, identity)
        transport.note = "its certificate expired" if identity is not INSECURE else ""
        try:
            with pytest.raises(UntrustedError) as caught:
                await transport.report_failure(FAILURE)
        finally:
            await transport.close()
        return str(caught.value)

    async def scene(address: str) -> None:
        assert "by a coordinator that wants TLS; if it does, leave out --insecure" in await told(address, INSECURE)
        theirs = others.device("a")[1]
        assert "its certificate expired" in await told(address, theirs)
        mixed = Identity(theirs.key, theirs.certificate, lab.operator.authority)
        assert "its certificate expired" in await told(address, mixed)

    over_tls(lab, Named(), scene)

    async def plain() -> None:
        running = grpc.aio.server()
        port = running.add_insecure_port("127.0.0.1:0")
        await running.start()
        transport = GrpcTransport(f"127.0.0.1:{port}", tmp_path, lab.device("a")[1])
        with pytest.raises(UntrustedError, match="it speaks plain text, and this side wants TLS"):
            await transport.report_failure(FAILURE)
        await transport.close()
        await running.stop(None)

    asyncio.run(plain())
