"""How a device gets its first certificate: with a token over the network, or with a bundle that somebody brings along.

The device makes its own key, which never leaves it. It sends nothing before it has seen that the server is the one that
the token names, by the digest of that server's certificate, and then talks to nobody but whoever has that certificate.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from pathlib import Path

import grpc
from fedepth_wire.channel import CLIENT_OPTIONS, plainly, target, wrong_clock
from fedepth_wire.tls import ENROLLMENT_NAME, Role, parse_uri, read_identity, uri_of
from fedepth_wire.tokens import Token
from fedepth_wire.v1 import trust_pb2 as pb
from fedepth_wire.v1.trust_pb2_grpc import EnrollmentStub

from edge_client.certificate.client import bundle_of, day, trouble
from edge_client.certificate.keys import certificate_request, facts_of, install, pending_key, replace_bundle
from edge_client.certificate.protocol import Facts
from edge_client.identity import adopt_id, device_id
from fedepth.address import Address
from fedepth.errors import TransportError, TrustError
from fedepth.files import disk_errors
from fedepth.printable import printable

TIMEOUT_S = 60.0
_KINDS = {Role.OPERATOR: "an operator", Role.COORDINATOR: "a coordinator"}


def enroll_with_token(address: Address, token: Token, state: Path) -> Facts:
    """Gets a certificate for this device's id.

    Raises:
        TransportError: nobody answers there. Try again, with the same token.
        TrustError: whoever answers is not whom the token names, or refuses.
        DiskError, StateError: the state directory cannot be used.
    """
    with disk_errors("the state directory cannot be made", state):
        state.mkdir(parents=True, exist_ok=True)
    identifier = device_id(state)
    pending = state / "enrollment.key"
    request = certificate_request(pending_key(pending))
    server = _server_certificate(address)
    if not token.is_for(ssl.PEM_cert_to_DER_cert(server)):
        raise TrustError(
            f"who answers at {address} is not the coordinator that made the token; nothing was sent to it. Check the "
            "address and its port, which is that of enrolment"
        )
    try:
        reply = asyncio.run(
            _enroll(address, server, pb.EnrollRequest(secret=token.secret, request=request, device_id=identifier))
        )
    except TrustError as error:
        raise TrustError(f"{error}{_what_there_is(state, identifier)}") from None
    facts = install(bundle_of(state), pending, reply.certificate, reply.authority)
    if facts.uri != uri_of(Role.DEVICE, identifier):
        bundle_of(state).unlink()
        raise TrustError(f"the coordinator at {address} answered with a certificate for {printable(facts.uri)}")
    return facts


def _what_there_is(state: Path, identifier: str) -> str:
    """What may make up for a token that is refused: its first use, whose end nobody saw."""
    try:
        facts = facts_of(read_identity(bundle_of(state)))
    except TrustError:
        return ""
    if trouble(facts, uri_of(Role.DEVICE, identifier), time.time()):
        return ""
    return f". This device has a certificate: it is {printable(facts.name)} until {day(facts.not_after)}"


def enroll_with_bundle(bundle: Path, state: Path) -> Facts:
    """Takes over a bundle that `fedepth-coordinator certs issue` made, with the id in it.

    Raises:
        TrustError: it cannot be used, or this device has another id already.
        DiskError, StateError: the state directory cannot be used.
    """
    identity = read_identity(bundle, carried=True)
    facts = facts_of(identity)
    role, identifier = parse_uri(facts.uri)
    if role is not Role.DEVICE:
        raise TrustError(f"{printable(str(bundle))} is for {_KINDS[role]}, not for a device")
    now = time.time()
    if now >= facts.not_after:  # not yet valid may be the clock here, which is set one day
        raise TrustError(
            f"{printable(str(bundle))} is for {printable(facts.name)} until {day(facts.not_after)}, and here it is "
            f"{day(now)}; if the clock is right, have fedepth-coordinator certs issue make another"
        )
    with disk_errors("the certificate cannot be kept", state):
        state.mkdir(parents=True, exist_ok=True)
        adopt_id(state, identifier)
        replace_bundle(bundle_of(state), identity)
    return facts


def _server_certificate(address: Address) -> str:
    """The certificate (PEM) of whoever listens there; it is believed in nothing yet."""
    try:
        return ssl.get_server_certificate((address.ascii_host, address.port), timeout=TIMEOUT_S)
    except ssl.SSLError as error:
        raise TransportError(
            f"{address} does not speak TLS ({error.reason or error}): is it the enrolment port, which the "
            "coordinator's log names at its start?"
        ) from None
    except TimeoutError:
        raise TransportError(
            f"{address} does not answer within {TIMEOUT_S:g} s; is it the enrolment port, which the "
            "coordinator's log names at its start? Then try again, with the same token"
        ) from None
    except OSError as error:
        raise TransportError(
            f"nobody answers at {address} ({error.strerror or error}); is the coordinator running, with --host for "
            "other machines, and is this its enrolment port? Then try again, with the same token"
        ) from None


async def _enroll(address: Address, server: str, request: pb.EnrollRequest) -> pb.EnrollReply:
    options = [*CLIENT_OPTIONS, ("grpc.ssl_target_name_override", ENROLLMENT_NAME)]
    credentials = grpc.ssl_channel_credentials(server.encode())
    async with grpc.aio.secure_channel(target(address), credentials, options=options) as channel:
        try:
            reply: pb.EnrollReply = await EnrollmentStub(channel).Enroll(request, timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            details = printable(error.details() or "")
            if error.code() is grpc.StatusCode.PERMISSION_DENIED:
                raise TrustError(f"the coordinator at {address} refuses: {details}") from None
            if why := wrong_clock(details):
                raise TransportError(
                    f"the coordinator at {address}: {why}. Here it is {day(time.time())}. Then try again, with the "
                    "same token"
                ) from None
            raise TransportError(
                f"the coordinator at {address} did not answer ({plainly(error.code(), details)}); try again, "
                "with the same token"
            ) from None
        return reply
