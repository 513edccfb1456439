"""What ends a call to the coordinator, as errors that say whether the same call may work later."""

from __future__ import annotations

import re

import grpc
import grpc.aio
from fedepth_wire.channel import broken_handshake, plainly, unresolved
from fedepth_wire.tls import Identity, Insecure

from fedepth.errors import TransportError

_AWAY = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
_SERVERS_OWN = {
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}
_COME_BACK = re.compile(r"; come back in ([0-9]{1,6}(?:\.[0-9]{1,3})?) s$")
_TOO_LARGE = "larger than max"  # what gRPC says of a message; it has the same status as a busy coordinator


class TemporaryError(TransportError):
    """The same call may work later, without anybody doing anything here."""


class UnreachableError(TemporaryError):
    """The coordinator cannot be reached now."""


class UntrustedError(UnreachableError):
    """One side does not accept the other's certificate. Somebody may give one of them another one."""


class CutError(UnreachableError):
    """A transfer was cut that had moved something, or gave way to a new connection: it can go on at once."""


class BusyError(TemporaryError):
    """The coordinator answers, and can do nothing for us now, such as for want of disk space.

    Attributes:
        after_s: when to come back, if it has said so.
    """

    def __init__(self, message: str, after_s: float | None = None) -> None:
        super().__init__(message)
        self.after_s = after_s


class ServerError(TemporaryError):
    """The coordinator met an error of its own, or asks to begin again."""


def as_error(
    address: str, error: grpc.aio.AioRpcError, identity: Identity | Insecure, note: str = ""
) -> TransportError:
    """What a status means for whoever called `address`.

    Args:
        identity: that it was called with.
        note: what is known to be wrong with it; "" if nothing is.
    """
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE not in details:
        come_back = _COME_BACK.search(details)
        return BusyError(f"{address}: {details}", float(come_back[1]) if come_back else None)
    if unresolved(details):
        return UnreachableError(f"{address}: this machine cannot resolve that name ({plainly(code, details)})")
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return UntrustedError(f"{address}: {details}")
    if why := broken_handshake(details, identity):
        return UntrustedError(f"{address}: {note or why} ({plainly(code, details)})")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return TransportError(f"{address} does not know what this version calls ({details}); is it an older one?")
    kind = UnreachableError if code in _AWAY else ServerError if code in _SERVERS_OWN else TransportError
    return kind(f"{address}: {plainly(code, details)}")
