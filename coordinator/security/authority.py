"""A private certificate authority: keys on P-256, certificates as RFC 5280 has them, and who they are for.

P-256 keeps a handshake at some 3 kB, so that links that break every 40 kB can be worked over. A device's certificate is
good for clients only (extended key usage), so that no device can pose as the coordinator.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from fedepth_wire.tls import COORDINATOR_NAME, ENROLLMENT_NAME, KEY_MODE, Identity, Role, uri_of

from fedepth.errors import TrustError
from fedepth.files import read_regular, write_atomically
from fedepth.printable import printable

AUTHORITY_DAYS = 3650
# Clocks of small boards are behind after a start without a network.
_BACKDATED = timedelta(days=1)
_MOST_BYTES = 64 << 10


@dataclass(frozen=True)
class Subject:
    """Who a certificate is for.

    Attributes:
        id: a device's UUID, an operator's name, "" for the coordinator.
        name: for people; at most 64 bytes.
    """

    role: Role
    id: str
    name: str


@dataclass(frozen=True)
class Issued:
    """A certificate and what is kept of it. Times are seconds since 1970; digests sha256 in hex.

    Attributes:
        fingerprint: of the certificate.
        public_key: digest of the key that it certifies.
    """

    subject: Subject
    certificate: bytes
    fingerprint: str
    public_key: str
    not_before: int
    not_after: int


@dataclass(frozen=True)
class Authority:
    """A key that signs, and its certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def issue(self, subject: Subject, public_key: ec.EllipticCurvePublicKey, days: float, now: float) -> Issued:
        """Certifies that a key is a subject's, for so many days from `now` on, and at most as long as the authority."""
        start = datetime.fromtimestamp(int(now), timezone.utc)
        end = min(start + timedelta(days=days), self.certificate.not_valid_after_utc)
        usage = ExtendedKeyUsageOID.SERVER_AUTH if subject.role is Role.COORDINATOR else ExtendedKeyUsageOID.CLIENT_AUTH
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri_of(subject.role, subject.id))]
        if subject.role is Role.COORDINATOR:
            names.append(x509.DNSName(COORDINATOR_NAME))
        made = (
            _certificate(_name(subject.name), public_key, start - _BACKDATED, end)
            .issuer_name(self.certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.certificate_key), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return Issued(
            subject,
            made.public_bytes(Encoding.PEM),
            made.fingerprint(hashes.SHA256()).hex(),
            public_key_digest(public_key),
            int(made.not_valid_before_utc.timestamp()),
            int(made.not_valid_after_utc.timestamp()),
        )

    @property
    def certificate_key(self) -> ec.EllipticCurvePublicKey:
        key = self.certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return key


def make_authority(now: float) -> Authority:
    """A new authority. Its name holds some of its key's digest: two of them must not be taken for each other."""
    key = new_key()
    start = datetime.fromtimestamp(int(now), timezone.utc)
    name = _name(f"fedepth authority {public_key_digest(key.public_key())[:16]}")
    made = (
        _certificate(name, key.public_key(), start - _BACKDATED, start + timedelta(days=AUTHORITY_DAYS))
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(key, made)


def make_enrollment(now: float) -> Identity:
    """Key and certificate of the enrolment server: signed by itself, since tokens say which one it is."""
    key = new_key()
    start = datetime.fromtimestamp(int(now), timezone.utc)
    name = _name("fedepth enrolment")
    made = (
        _certificate(name, key.public_key(), start - _BACKDATED, start + timedelta(days=AUTHORITY_DAYS))
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(ENROLLMENT_NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(Encoding.PEM)
    return Identity(key_pem(key), pem, pem)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_key_digest(key: ec.EllipticCurvePublicKey) -> str:
    """sha256 (hex) of a public key, as SubjectPublicKeyInfo in DER."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def belongs_together(identity: Identity) -> bool:
    """Whether key, certificate and authority of a bundle can be read, and are of one another."""
    try:
        certificate = x509.load_pem_x509_certificate(identity.certificate)
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(identity.authority))
        return load_pem_private_key(identity.key, None).public_key() == certificate.public_key()
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False


def requested_key(request: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of a certificate request (PKCS #10, DER), whose sender has shown that the private key is its own.

    Raises:
        TrustError: it is damaged, or of another kind of key.
    """
    try:
        parsed = x509.load_der_x509_csr(request)
        valid = parsed.is_signature_valid
        key = parsed.public_key()
    except (ValueError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise TrustError(f"the certificate request cannot be read: {printable(str(error)[:200])}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise TrustError("the certificate request is for a key that is not on the curve P-256")
    if not valid:
        raise TrustError("the certificate request is not signed by its own key")
    return key


def read_authority(path: Path) -> Authority:
    """What `write_authority` wrote.

    Raises:
        TrustError: it is missing or damaged.
    """
    try:
        text = read_regular(path, _MOST_BYTES)
        key, certificate = load_pem_private_key(text, None), x509.load_pem_x509_certificate(text)
    except OSError as error:
        raise TrustError(f"{printable(str(path))} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise TrustError(
            f"{printable(str(path))} does not hold the authority's key and certificate "
            f"({printable(str(error)[:200])}); restore it from a copy"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TrustError(f"{printable(str(path))} holds a key of another kind than the authority's")
    return Authority(key, certificate)


def write_authority(path: Path, authority: Authority) -> None:
    write_atomically(path, key_pem(authority.key) + authority.pem, KEY_MODE)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _certificate(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
