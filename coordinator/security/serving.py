"""A coordinator's certificates while it serves: who it is, who may call, where devices enrol."""

from __future__ import annotations

import asyncio
import contextlib
import itertools

import grpc
import structlog
from fedepth_wire.tls import Identity, server_credentials

from coordinator.security.certificates import Certificates
from coordinator.security.enrolling import enrollment_credentials, enrollment_server
from coordinator.security.guard import Guard
from fedepth.errors import FedepthError

RENEW_S = 3600.0  # how often it is looked whether the coordinator's certificate is due
_REMIND = 24  # every how many of these looks it is said that the authority will end
_log = structlog.get_logger()


class Secured:
    """What a server over mTLS has in addition to one over plain text.

    Attributes:
        guard: an interceptor for the server.
        enrollment: the server for devices without a certificate.
    """

    def __init__(self, certificates: Certificates) -> None:
        """Touches no file; `open` does. Must be made in a running event loop, as servers are."""
        self.certificates = certificates
        certificates.warn = lambda text: _log.error("a certificate cannot be renewed; trying again later", error=text)
        self.guard = Guard(certificates.registry)
        self.enrollment = enrollment_server(certificates)
        self._served: _Served | None = None

    def open(self) -> tuple[grpc.ServerCredentials, grpc.ServerCredentials]:
        """Reads the certificates: credentials of the server, and of the one for enrolment.

        Raises:
            FedepthError: they cannot be used.
        """
        self.certificates.check()
        self._served = _Served(self.certificates)
        self.certificates.operator()  # its renewal is nobody else's business
        self._warn_of_the_end()
        return (
            server_credentials(self._served.identity, self._served.take_renewed),
            enrollment_credentials(self.certificates.enrollment()),
        )

    async def look(self) -> None:
        """Renews the coordinator's certificate if it is due."""
        assert self._served is not None
        await self._served.look()

    async def keep_up(self) -> None:
        """Looks for what was revoked, and renews the coordinator's certificate in time, until it is cancelled."""
        await asyncio.gather(self.guard.watch(), self._renew())

    async def _renew(self) -> None:
        for look in itertools.count(1):
            await asyncio.sleep(RENEW_S)
            await self.look()
            if look % _REMIND == 0:
                await asyncio.to_thread(self._warn_of_the_end)

    def _warn_of_the_end(self) -> None:
        with contextlib.suppress(FedepthError):  # whoever needs the authority is told what is wrong with it
            if what_to_do := self.certificates.ending():
                _log.warning("the authority will end, and every certificate with it", what_to_do=what_to_do)


class _Served:
    """The identity that connections are answered with, as it is renewed."""

    def __init__(self, certificates: Certificates) -> None:
        self._certificates = certificates
        self.identity = certificates.coordinator()
        self._next: Identity | None = None

    def take_renewed(self) -> Identity | None:
        """Another identity, once; called by gRPC at every connection, in a thread of its own."""
        renewed, self._next = self._next, None
        return renewed

    async def look(self) -> None:
        """Renews the certificate if it is due, or takes over what another coordinator has renewed."""
        try:
            found = await asyncio.to_thread(self._certificates.coordinator)
        except FedepthError as error:
            _log.error("the coordinator's certificate cannot be renewed; trying again in an hour", error=str(error))
            return
        if found != self.identity:
            self.identity = self._next = found
            _log.info("the coordinator's certificate is renewed")
