"""What the agent and its certificate child say to each other, in lines of JSON (fedepth.child).

The child reads `inspect` and answers `facts`. If the agent wants a new certificate, it sends `prepare`, gets `request`,
has the coordinator sign that, sends `install`, and gets `facts` of what is in the bundle now. Any answer may be
`failed` instead. The child ends when its standard input closes. Both sides load this module, so it imports nothing
heavy.
"""

from __future__ import annotations

import msgspec


class Inspect(msgspec.Struct, frozen=True, tag_field="do", tag="inspect"):
    """Read the bundle in this file."""

    bundle: str


class Prepare(msgspec.Struct, frozen=True, tag_field="do", tag="prepare"):
    """Make a new key, which is kept beside the bundle until its certificate is there, and a request for it."""


class Install(msgspec.Struct, frozen=True, tag_field="do", tag="install"):
    """Put the new key and this certificate (PEM) into the bundle, by one rename; not if it is not valid `now`."""

    certificate: bytes
    now: float


class Facts(msgspec.Struct, frozen=True, tag_field="event", tag="facts"):
    """What the certificate in the bundle says. Times are seconds since 1970.

    Attributes:
        uri: names role and id (fedepth_wire.tls).
    """

    uri: str
    name: str
    not_before: float
    not_after: float

    @property
    def due_at(self) -> float:
        """When a third of its life is left."""
        return self.not_after - (self.not_after - self.not_before) / 3

    def is_due(self, now: float) -> bool:
        """Whether a third of its life is left, or less."""
        return now >= self.due_at


class Request(msgspec.Struct, frozen=True, tag_field="event", tag="request"):
    """PKCS #10 in DER."""

    request: bytes


class Failed(msgspec.Struct, frozen=True, tag_field="event", tag="failed"):
    message: str


Command = Inspect | Prepare | Install
Event = Facts | Request | Failed
