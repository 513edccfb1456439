"""Devices get certificates: with a token on the enrolment port, with the certificate that runs out on the usual one."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import structlog
from fedepth_wire.bounds import check_message
from fedepth_wire.channel import HANDSHAKE_S
from fedepth_wire.times import BUSY_RETRY_S
from fedepth_wire.tls import Identity, caller_of
from fedepth_wire.v1 import trust_pb2 as pb
from fedepth_wire.v1.trust_pb2_grpc import (
    CertificatesServicer,
    EnrollmentServicer,
    add_EnrollmentServicer_to_server,
)

from coordinator.listening import ENROLLMENT_CONNECTIONS
from coordinator.security.certificates import DEVICE_DAYS, Certificates
from fedepth.errors import FedepthError, ProtocolError, TrustError
from fedepth.printable import printable

_MOST_CALLS = 16  # at once; each takes a few milliseconds
_LOG_EVERY_S = 10.0
_MESSAGE_BYTES = 16 << 10
_OPTIONS = [
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    ("grpc.max_metadata_size", 4 << 10),
    ("grpc.max_concurrent_streams", 1),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_S * 1000),
    ("grpc.max_allowed_incoming_connections", ENROLLMENT_CONNECTIONS),
    # Nobody has a reason to stay here.
    ("grpc.max_connection_idle_ms", 20_000),
    ("grpc.max_connection_age_ms", 60_000),
    ("grpc.max_connection_age_grace_ms", 10_000),
    ("grpc.so_reuseport", 0),
]

Context = grpc.aio.ServicerContext[Any, Any]
_log = structlog.get_logger()


class EnrollmentService(EnrollmentServicer):
    """Trades tokens for certificates."""

    def __init__(self, certificates: Certificates) -> None:
        self._certificates = certificates
        self._refused = 0  # since that was last said
        self._said = -_LOG_EVERY_S

    async def Enroll(self, request: pb.EnrollRequest, context: Context) -> pb.EnrollReply:
        try:
            check_message(request)
            certificate, authority = await asyncio.to_thread(
                self._certificates.enroll, request.secret, request.request, request.device_id, DEVICE_DAYS
            )
        except (TrustError, ProtocolError) as error:
            self._note_refusal(str(error), context.peer())
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        except FedepthError as error:  # it names files of this machine, which are nothing for a stranger
            self._note_refusal(str(error), context.peer())
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "busy: no certificate can be made now, and the coordinator's log says why; come back in "
                f"{BUSY_RETRY_S:g} s",
            )
        _log.info("device enrolled", device_id=request.device_id, peer=context.peer())
        return pb.EnrollReply(certificate=certificate, authority=authority)

    def _note_refusal(self, why: str, peer: str) -> None:
        """Says it, but not as often as a stranger asks."""
        self._refused += 1
        now = time.monotonic()
        if now >= self._said + _LOG_EVERY_S:
            _log.warning("enrolment refused", reason=printable(why), peer=peer, times=self._refused)
            self._refused, self._said = 0, now


class CertificatesService(CertificatesServicer):
    """Renews the certificates of those who call with one."""

    def __init__(self, certificates: Certificates) -> None:
        self._certificates = certificates

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewReply:
        try:
            check_message(request)
            caller = caller_of(context.auth_context())
            if caller is None:
                raise TrustError("there is no certificate to renew")
            certificate = await asyncio.to_thread(self._certificates.renew, caller.fingerprint, request.request)
        except (TrustError, ProtocolError) as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        except FedepthError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"busy: {error}; come back in {BUSY_RETRY_S:g} s")
        _log.info("certificate renewed", device=caller.name, device_id=caller.id)
        return pb.RenewReply(certificate=certificate)


def enrollment_server(certificates: Certificates) -> grpc.aio.Server:
    """The server for devices that have no certificate yet; it does not listen yet."""
    server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=_MOST_CALLS)
    add_EnrollmentServicer_to_server(EnrollmentService(certificates), server)
    return server


def enrollment_credentials(identity: Identity) -> grpc.ServerCredentials:
    """Of a server that anybody may talk to, and that a token recognises."""
    return grpc.ssl_server_credentials([(identity.key, identity.certificate)])
