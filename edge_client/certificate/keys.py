"""Keys and certificates of a device, as files: loads the library for them, which an idle agent does not hold."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtensionOID, NameOID
from fedepth_wire.tls import KEY_MODE, Identity, read_identity, write_identity

from edge_client.certificate.protocol import Facts
from fedepth.errors import TrustError
from fedepth.files import disk_errors, open_regular, write_atomically
from fedepth.printable import printable

_MOST_KEY_BYTES = 8192
# What the library raises for what is damaged.
_UNREADABLE = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


def facts_of(identity: Identity) -> Facts:
    """What a bundle's certificate says.

    Raises:
        TrustError: key, certificate and authority are not of one another, or it does not say who it is for.
    """
    try:
        certificate = x509.load_pem_x509_certificate(identity.certificate)
        authority = x509.load_pem_x509_certificate(identity.authority)
        key = load_pem_private_key(identity.key, None)
        certificate.verify_directly_issued_by(authority)
        same = key.public_key() == certificate.public_key()
        named = certificate.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME).value
        assert isinstance(named, x509.SubjectAlternativeName)
        (uri,) = named.get_values_for_type(x509.UniformResourceIdentifier)
        (name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except _UNREADABLE as error:
        raise TrustError(
            f"the certificate is not one of its authority, or is damaged ({printable(str(error)[:200]) or 'signature'})"
        ) from None
    if not same:
        raise TrustError("the certificate is for another key")
    return Facts(
        uri,
        str(name.value),
        certificate.not_valid_before_utc.timestamp(),
        certificate.not_valid_after_utc.timestamp(),
    )


def pending_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The key in `path`, made if there is none: the same one again after an answer was lost.

    Raises:
        DiskError: it cannot be written or read.
        TrustError: it is damaged.
    """
    with disk_errors("the new key cannot be kept", path.parent):
        if not os.path.lexists(path):
            key = ec.generate_private_key(ec.SECP256R1())
            pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            write_atomically(path, pem, KEY_MODE)
        with open_regular(path) as file:
            text = file.read(_MOST_KEY_BYTES)
    try:
        found = load_pem_private_key(text, None)
    except _UNREADABLE:
        found = None
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise TrustError(f"{printable(str(path))} does not hold a key; delete it and try again")
    return found


def renewal_key(bundle: Path) -> Path:
    """Where the new key lies while the certificate in a bundle is renewed."""
    return bundle.with_name(f"{bundle.name}.key")


def replace_bundle(bundle: Path, identity: Identity) -> None:
    """Puts what a device was enrolled with into its bundle.

    A renewal of the certificate before that has begun is given up: what was certified for its key may be revoked with
    that certificate, and would then be refused whenever the new one is renewed.

    Raises:
        OSError: it cannot be written.
    """
    renewal_key(bundle).unlink(missing_ok=True)
    write_identity(bundle, identity)


def certificate_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS #10 in DER. It names nobody: who the key is for is the coordinator's to say."""
    return x509.CertificateSigningRequestBuilder(x509.Name([])).sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def install(bundle: Path, pending: Path, certificate: bytes, authority: bytes, valid_at: float | None = None) -> Facts:
    """Puts the pending key with its certificate into the bundle, and forgets it.

    Args:
        valid_at: when the certificate must be valid already, since the one before is.

    Raises:
        TrustError: they do not belong together, or that is later; the bundle is as it was.
        DiskError: it cannot be written.
    """
    key = pending_key(pending)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    identity = Identity(pem, certificate, authority)
    facts = facts_of(identity)
    if valid_at is not None and facts.not_before > valid_at:
        raise TrustError(
            "the coordinator's new certificate for this device is valid only in the future: its clock is ahead, or the "
            "clock here is behind; going on with the one before"
        )
    with disk_errors("the certificate cannot be kept", bundle.parent):
        if pending == renewal_key(bundle):
            write_identity(bundle, identity)
        else:
            replace_bundle(bundle, identity)
        read_identity(bundle)
        pending.unlink(missing_ok=True)
    return facts
