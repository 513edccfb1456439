"""Channels and their settings, in one place: message limits, keepalive, reconnection."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import quote

import grpc

from fedepth.address import Address, parse_address
from fedepth_wire.bounds import CHUNK_BYTES
from fedepth_wire.times import KEEPALIVE_ANSWER_S, KEEPALIVE_S
from fedepth_wire.tls import COORDINATOR_NAME, Identity, Insecure, channel_credentials

# From either side, the largest is a chunk in its envelope: reports, tasks and results have less than half of that.
MESSAGE_LIMIT_BYTES = CHUNK_BYTES + (64 << 10)

# A device behind NAT must keep its path open: it is asked now and then whether it is there.
_COMMON: list[tuple[str, int]] = [
    ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_ANSWER_S * 1000)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
CLIENT_OPTIONS = [
    *_COMMON,
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 10_000),
    ("grpc.dns_min_time_between_resolutions_ms", 5_000),  # a coordinator that has moved is found at the next try
    # A coordinator is reached directly. gRPC would go through http_proxy, which on many machines is set for the web and
    # knows nothing of a LAN.
    ("grpc.enable_http_proxy", 0),
]
SERVER_OPTIONS = [
    *_COMMON,
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", int(KEEPALIVE_S * 1000) // 3),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server beside the first
]
_WRAPPING = re.compile(
    r"^(?:failed to connect to all addresses; last error: )?(?:[A-Z_]+: )?(?:ipv[46]:\S+?: )?"
    r"(?:Failed to connect to remote host: )?"
)

MOST_STREAMS = 64  # of one connection, which is one device's: it has about ten
HANDSHAKE_S = 30  # a link of 2 kB/s takes five for the 5 kB of it
# Of a server that strangers reach.
TLS_SERVER_OPTIONS = [
    *SERVER_OPTIONS,
    ("grpc.max_concurrent_streams", MOST_STREAMS),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_S * 1000),
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
]


def open_channel(address: str, identity: Identity | Insecure) -> grpc.aio.Channel:
    """A channel to `address` (fedepth.address). Names are looked up as the system does, again and again.

    Args:
        identity: who calls; whoever answers must be the coordinator of the same authority. INSECURE: plain text, to
            whoever answers.

    Raises:
        ConfigError: it is no address.
    """
    where = target(parse_address(address))
    if isinstance(identity, Insecure):
        return grpc.aio.insecure_channel(where, options=CLIENT_OPTIONS)
    options = [*CLIENT_OPTIONS, ("grpc.ssl_target_name_override", COORDINATOR_NAME)]
    return grpc.aio.secure_channel(where, channel_credentials(identity), options=options)


def target(address: Address) -> str:
    """An address as gRPC wants it, with its scheme: by itself gRPC would take a host named "unix" for a scheme."""
    host = address.ascii_host
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return f"dns:///{host}:{address.port}"
    return f"ipv4:{host}:{address.port}" if version == 4 else f"ipv6:[{quote(host, safe=':')}]:{address.port}"


def plainly(code: grpc.StatusCode, details: str) -> str:
    """Why a call has not been answered, without what gRPC puts around it: "Connection refused"."""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and details == "Deadline Exceeded":
        return "no answer in time"
    return _WRAPPING.sub("", details) or code.name


def unresolved(details: str) -> bool:
    """Whether a call's details say that the name of the other side could not be looked up."""
    return "hostname lookup error" in details or "DNS resolution failed" in details


def wrong_clock(details: str) -> str:
    """Why the certificate of the other side is not valid now, and what to do, from a call's details; "" if it is."""
    if "CERTIFICATE_VERIFY_FAILED: certificate has expired" in details:
        return (
            "its certificate has expired, or the clock here is ahead; look at both clocks, and restart the coordinator"
        )
    if "CERTIFICATE_VERIFY_FAILED: certificate is not yet valid" in details:
        return "its certificate is not valid yet: the clock of this machine, or of the coordinator's, is wrong"
    return ""


def broken_handshake(details: str, identity: Identity | Insecure) -> str:
    """What is wrong between the two ends, and what to do, from a call's details; "" if it may be the network.

    TLS says little of it: a server that refuses a certificate closes the connection, as a broken network does.
    """
    if "WRONG_VERSION_NUMBER" in details:
        return (
            "it speaks plain text, and this side wants TLS; start it without --insecure, or this side with it (on one "
            "machine only)"
        )
    if why := wrong_clock(details):
        return why
    if any(sign in details for sign in ("CERTIFICATE_VERIFY_FAILED", "BAD_SIGNATURE", "Hostname Verification")):
        return (
            "who answers is not the coordinator that this side's certificate is for: another machine, or a coordinator "
            "whose certificates were made anew; then get a new certificate from it (fedepth-coordinator enroll)"
        )
    if "Socket closed" in details and "failed to connect" in details:
        return (
            "the connection was closed at once, by a broken network or by a coordinator that wants TLS; if it does, "
            "leave out --insecure"
            if isinstance(identity, Insecure)
            else "the connection was closed at once, by a broken network or by a coordinator that does not accept this "
            "side's certificate: it has expired by its clock, or is of another authority"
        )
    return ""
