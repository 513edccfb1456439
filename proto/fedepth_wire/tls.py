"""Who is at the two ends of a connection: certificates of one private authority, for client and server alike.

A certificate's subjectAltName holds one URI that names role and id, and that is who the caller is; its common name is
for people. Clients expect one fixed name of the coordinator, whatever address they dial: devices reach it through NAT,
DHCP and renamed machines, and the authority signs no certificate with that name for anybody else.

Nothing here parses a certificate, for which an idle agent would have to keep a library: gRPC tells what it has
verified.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from pathlib import Path

import grpc

from fedepth.errors import TrustError
from fedepth.files import open_regular, write_atomically
from fedepth.printable import printable

COORDINATOR_NAME = "coordinator.fedepth.internal"
ENROLLMENT_NAME = "enrollment.fedepth.internal"
KEY_MODE = 0o600

_URN = "urn:fedepth:"
_MOST_BUNDLE_BYTES = 64 << 10
_BLOCK = re.compile(rb"-----BEGIN (?P<kind>[A-Z0-9 ]+)-----\r?\n[A-Za-z0-9+/=\s]+-----END (?P=kind)-----\r?\n?")
_OPERATOR_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_DEVICE_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_CERTIFICATES_CACHED = 4096


class Role(str, Enum):
    """What a certificate is for."""

    DEVICE = "device"
    OPERATOR = "operator"
    COORDINATOR = "coordinator"


class Insecure(Enum):
    """Takes the place of an identity where plain text was asked for by name."""

    INSECURE = "insecure"


INSECURE = Insecure.INSECURE


@dataclass(frozen=True)
class Identity:
    """A key, its certificate, and the certificate of the authority that signed it; all PEM."""

    key: bytes = field(repr=False)
    certificate: bytes
    authority: bytes


@dataclass(frozen=True)
class Caller:
    """Who calls, as its verified certificate says.

    Attributes:
        id: a device's UUID, or an operator's name; empty for a coordinator.
        name: for people.
        fingerprint: sha256 (hex) of the certificate.
    """

    role: Role
    id: str
    name: str
    fingerprint: str


def uri_of(role: Role, identifier: str) -> str:
    """The URI that a certificate of this role and id holds."""
    return f"{_URN}{role.value}" if role is Role.COORDINATOR else f"{_URN}{role.value}:{identifier}"


def parse_uri(uri: str) -> tuple[Role, str]:
    """Role and id.

    Raises:
        TrustError: it is not such a URI.
    """
    kind, _, identifier = uri.removeprefix(_URN).partition(":")
    wanted = {Role.DEVICE.value: _DEVICE_ID, Role.OPERATOR.value: _OPERATOR_ID}.get(kind)
    if uri == uri_of(Role.COORDINATOR, ""):
        return Role.COORDINATOR, ""
    if not uri.startswith(_URN) or wanted is None or not wanted.fullmatch(identifier):
        raise TrustError(f"{printable(uri[:200])} in a certificate names neither device nor operator nor coordinator")
    return Role(kind), identifier


def read_identity(path: Path, *, carried: bool = False) -> Identity:
    """What a bundle holds; see `write_identity`.

    Args:
        carried: it is on its way to where it will be used, perhaps on a stick whose file system knows no owners: others
            may read it here.

    Raises:
        TrustError: it is missing, others may read it, or it holds something else.
    """
    shown = printable(str(path))
    try:
        with open_regular(path) as file:
            facts = os.fstat(file.fileno())
            text = file.read(_MOST_BUNDLE_BYTES + 1)
    except OSError as error:
        raise TrustError(f"{shown} cannot be read: {error.strerror or error}") from None
    if not carried and stat.S_IMODE(facts.st_mode) & 0o077:
        raise TrustError(
            f"{shown} holds a private key, and others may read or change it (mode {stat.S_IMODE(facts.st_mode):04o}); "
            f"make it yours alone: chmod 600 {shown}"
        )
    if not carried and facts.st_uid not in (os.geteuid(), 0):
        raise TrustError(f"{shown} holds a private key and belongs to another user (uid {facts.st_uid}); chown it")
    blocks = [(match["kind"], match[0]) for match in _BLOCK.finditer(text)]
    if [kind for kind, _ in blocks] != [b"PRIVATE KEY", b"CERTIFICATE", b"CERTIFICATE"]:
        raise TrustError(f"{shown} does not hold a key, its certificate and the authority's; it is damaged")
    return Identity(*(block for _, block in blocks))


def write_identity(path: Path, identity: Identity) -> None:
    """Puts key, certificate and authority into one file, so that one rename replaces them all.

    Raises:
        OSError: it cannot be written.
    """
    write_atomically(path, identity.key + identity.certificate + identity.authority, KEY_MODE)


def channel_credentials(identity: Identity) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(identity.authority, identity.key, identity.certificate)


def server_credentials(identity: Identity, renewed: Callable[[], Identity | None]) -> grpc.ServerCredentials:
    """Credentials of a server that takes clients of its own authority only.

    Args:
        renewed: asked at every connection, in a thread of gRPC's: another identity from now on, or None.
    """

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        found = renewed()
        return None if found is None else _configuration(found)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(identity),
        fetch,  # type: ignore[arg-type]  # None, for no change, is documented
        require_client_authentication=True,
    )


def caller_of(properties: Mapping[str, Iterable[bytes]]) -> Caller | None:
    """Who calls, from a call's `auth_context()`; None over plain text.

    Raises:
        TrustError: the certificate does not say who it is for. The authority signs no such certificate.
    """
    certificates = tuple(properties.get("x509_pem_cert", ()))
    if not certificates:
        return None
    uris, names = tuple(properties.get("peer_uri", ())), tuple(properties.get("x509_common_name", ()))
    if len(uris) != 1 or len(names) != 1:
        raise TrustError(f"a certificate with {len(uris)} URIs and {len(names)} common names says of nobody who it is")
    role, identifier = parse_uri(uris[0].decode("ascii", "replace"))
    return Caller(role, identifier, names[0].decode("utf-8", "replace"), fingerprint(certificates[0]))


@lru_cache(_CERTIFICATES_CACHED)
def fingerprint(certificate: bytes) -> str:
    """sha256 (hex) of a certificate in PEM.

    Raises:
        TrustError: it is none.
    """
    block = _BLOCK.search(certificate)
    if block is None or block["kind"] != b"CERTIFICATE":
        raise TrustError("what should be a certificate is none")
    try:
        return hashlib.sha256(
            base64.b64decode(b"".join(block[0].split(b"-----")[2].split()), validate=True)
        ).hexdigest()
    except binascii.Error:
        raise TrustError("what should be a certificate is none") from None


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(identity.key, identity.certificate)], identity.authority)
