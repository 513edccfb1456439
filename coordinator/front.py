"""What devices see of a coordinator: its server, from when it has something to answer until all calls are over."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
import structlog
from fedepth_wire.tls import Insecure
from fedepth_wire.v1 import federation_pb2
from fedepth_wire.v1.federation_pb2_grpc import add_FederationServicer_to_server
from fedepth_wire.v1.trust_pb2_grpc import add_CertificatesServicer_to_server
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from coordinator.security.certificates import Certificates
from coordinator.security.enrolling import CertificatesService
from coordinator.security.serving import Secured
from coordinator.service import FederationService
from fedepth.address import DEFAULT_PORT, Address
from fedepth.files import disk_errors, write_atomically

GRACE_S = 2.0
_SERVICE = federation_pb2.DESCRIPTOR.services_by_name["Federation"].full_name

T = TypeVar("T")
_log = structlog.get_logger()


@dataclass(frozen=True)
class ServeOptions:
    """Where and how to serve. Port 0 lets the system choose one; `port_file` then tells which.

    `database` and `files` are those of `Store.open`; `accept_changes` that of `fedepth.job_changes`.

    Attributes:
        certificates: of the coordinator and of everybody who may call; INSECURE: plain text, and no questions asked.
        enroll_port: where devices without a certificate get one; None: nowhere.
    """

    state: Path
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    port_file: Path | None = None
    exit_when_done: bool = False
    database: str = ""
    files: str = ""
    accept_changes: bool = False
    certificates: Certificates | Insecure = field(kw_only=True)
    enroll_port: int | None = None


@dataclass(frozen=True)
class Listening:
    """Where a coordinator listens, and where it enrols devices."""

    address: Address
    enrollment: Address | None = None


class Front:
    """The server that devices see, from when there is something to answer them to the end."""

    def __init__(
        self, server: grpc.aio.Server, listening: Listening, options: ServeOptions, secured: Secured | None
    ) -> None:
        self.service = FederationService()
        self.secured = secured
        self.exit_when_done = options.exit_when_done
        self.address = str(listening.address)
        self._server = server
        self._listening = listening
        self._options = options
        self._health = HealthServicer()
        self._keeping_up: asyncio.Future[None] | None = None

    async def enroll(self) -> None:
        """Gives devices their certificates from now on, for which there need be no job yet.

        Raises:
            DiskError: where they get them cannot be kept for the commands that tell operators.
        """
        enrollment = self._listening.enrollment
        if self.secured is None or enrollment is None:
            return
        await self.secured.enrollment.start()
        await asyncio.to_thread(self.secured.certificates.note_enrollment, str(enrollment))
        _log.info("enrolling devices", address=str(enrollment))

    async def open(self, job: str) -> None:
        """Answers calls from now on, if it does not yet."""
        if self._keeping_up is not None:
            return
        server, options, listening, secured = self._server, self._options, self._listening, self.secured
        add_FederationServicer_to_server(self.service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (_SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME),
            server,
        )
        if secured is not None:
            add_CertificatesServicer_to_server(CertificatesService(secured.certificates), server)
            await secured.guard.look()
        await server.start()
        for name in ("", _SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        if options.port_file is not None:
            await asyncio.to_thread(_write_port, options.port_file, listening.address.port)
        enrollment = {} if listening.enrollment is None else {"enrollment": str(listening.enrollment)}
        _log.info("serving", address=self.address, job=job, state=str(options.state), **enrollment)
        if secured is None:
            _log.warning("plain text: whoever reaches this address can read, forge and take part", address=self.address)
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keeping_up = never if secured is None else asyncio.ensure_future(secured.keep_up())

    async def beside(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, while certificates are kept up.

        Raises what `work` raises, or FedepthError: certificates cannot be kept up.
        """
        assert self._keeping_up is not None, "open"
        working = asyncio.ensure_future(work)
        both: set[asyncio.Future[Any]] = {working, self._keeping_up}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                self._keeping_up.result()
            return await working
        finally:
            if not working.done():
                working.cancel()
                await asyncio.wait({working})

    async def announce_end(self) -> None:
        """Says that calls will not be answered for much longer."""
        await self._health.enter_graceful_shutdown()

    async def close(self) -> None:
        """Ends all calls."""
        if self.secured is not None:
            await self.secured.enrollment.stop(0)
        if self._keeping_up is None:
            return
        self._keeping_up.cancel()
        await asyncio.wait({self._keeping_up})
        await self._server.stop(GRACE_S)


def _write_port(path: Path, port: int) -> None:
    with disk_errors("the port cannot be written to --port-file", path.parent):
        write_atomically(path, f"{port}\n".encode())
