"""The folder of an authority: its key, the coordinator's and the operator's bundles, and the record of all it issued.

    authority.pem     key and certificate of the authority
    coordinator.pem   bundle (fedepth_wire.tls) of the coordinators that serve with this folder
    operator.pem      bundle of the operator who made the folder
    enrollment.pem    key and certificate of the enrolment server
    enrollment        where the last coordinator that was started enrols devices: HOST:PORT
    record.sqlite     what was issued and revoked, and which tokens are out

Whoever can read authority.pem can be anybody. All files are the user's alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import sys
import time
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from fedepth_wire.tls import Identity, Role, fingerprint, read_identity, write_identity
from fedepth_wire.tokens import SECRET_BYTES, Token

from coordinator.security.authority import (
    Authority,
    Issued,
    Subject,
    belongs_together,
    key_pem,
    make_authority,
    make_enrollment,
    new_key,
    public_key_digest,
    read_authority,
    requested_key,
    write_authority,
)
from coordinator.security.registry import Registry
from fedepth.errors import FedepthError, LockedError, TrustError, UnavailableError
from fedepth.files import disk_errors, lock_file, read_regular, user_folder, write_atomically
from fedepth.printable import printable, quoted

DEVICE_DAYS = 365
COORDINATOR_DAYS = 90
AUTHORITY_NOTICE_DAYS = 365  # an operator is told for so long that the authority will end
TOKEN_S = 86400
RENEWED_WITH = 1 / 3  # of its life left
MOST_DAYS = 3650
# Of a common name. RFC 5280 (ub-common-name) counts characters, and the library that makes certificates counts bytes.
MOST_NAME_BYTES = 64

_OPERATOR = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_MOST_ADDRESS_BYTES = 1024


def default_folder() -> Path:
    """Where certificates are kept unless somebody says otherwise: one folder for all jobs of a user.

    Raises:
        StateError: there is no home directory.
    """
    base = user_folder("XDG_STATE_HOME", ".local/state", "give --certs DIR, or set HOME")
    return base / "fedepth-coordinator" / "certificates"


def check_name(name: str) -> str:
    """A name that a certificate may hold.

    Raises:
        TrustError: it is none.
    """
    size = len(name.encode("utf-8", "replace"))
    if not 0 < size <= MOST_NAME_BYTES or printable(name) != name or name != name.strip() or name.startswith("-"):
        raise TrustError(
            f"{quoted(name)} is not a name for a certificate: 1 to {MOST_NAME_BYTES} bytes as UTF-8, of characters "
            "that can be shown, and without a '-' in front, which commands take for an option"
        )
    return name


def is_due(not_before: float, not_after: float, now: float) -> bool:
    """Whether a certificate should be renewed: a third of its life is left, or less."""
    return now >= not_after - (not_after - not_before) * RENEWED_WITH


class Certificates:
    """One authority in its folder. Methods touch the disk, and may be called in any thread.

    Attributes:
        warn: is told what will keep something from working one day, and does not yet.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        """Opens nothing yet; see `check`."""
        self.folder = folder
        self.warn: Callable[[str], None] = lambda text: print(printable(text), file=sys.stderr)
        self._clock = clock
        self.registry = Registry(folder / "record.sqlite", clock)

    def check(self) -> None:
        """Sees that the folder holds an authority that only its user can read.

        Raises:
            TrustError: it does not. Says what to run.
        """
        shown = printable(str(self.folder))
        try:
            facts = self.folder.stat()
            complete = all((self.folder / name).exists() for name in ("authority.pem", "coordinator.pem"))
            complete = complete and (self.folder / "record.sqlite").exists()
        except FileNotFoundError:
            facts, complete = None, False
        except OSError as error:
            raise TrustError(f"{shown} cannot be read: {error.strerror or error}") from None
        if facts is None or not complete:
            raise TrustError(
                f"there are no certificates in {shown} yet; make them once: fedepth-coordinator certs init. Or use "
                "--insecure: plain text, for tests on one machine"
            )
        for path in (self.folder, self.folder / "authority.pem"):
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & 0o077:
                raise TrustError(
                    f"{printable(str(path))} can be read or changed by others (mode {mode:04o}), who could be anybody "
                    f"then; make it yours alone: chmod go= {printable(str(path))}"
                )

    def init(self) -> bool:
        """Makes what is missing of an authority; False if nothing was.

        Raises:
            TrustError: another command is making it now, or others may read what is there.
            DiskError: it cannot be written.
        """
        with disk_errors("the certificates cannot be made", self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                lock = lock_file(self.folder / "lock")
            except LockedError as error:
                raise TrustError(f"another command (process {error.holder}) is making these certificates") from None
            with contextlib.closing(lock):
                made = self._init()
        self.check()
        return made

    def _init(self) -> bool:
        wanted = ("authority.pem", "record.sqlite", "enrollment.pem", "coordinator.pem", "operator.pem")
        missing = [name for name in wanted if not (self.folder / name).exists()]
        if "record.sqlite" not in missing and not self.registry.is_made():
            missing.append("record.sqlite")
        if "authority.pem" in missing:
            write_authority(self.folder / "authority.pem", make_authority(self._clock()))
        if "record.sqlite" in missing:
            self.registry.create()
        if "enrollment.pem" in missing:
            write_identity(self.folder / "enrollment.pem", make_enrollment(self._clock()))
        self.coordinator()
        self.operator()
        return bool(missing)

    # --- for others

    def issue(self, role: Role, name: str, days: float, device_id: str = "") -> Identity:
        """A new key with a certificate, recorded.

        Args:
            device_id: of a device that has one; a new one otherwise.

        Raises:
            TrustError: the name cannot be one, the id is no UUID or another device's, or the authority is missing.
        """
        check_name(name)
        if role is Role.OPERATOR and not _OPERATOR.fullmatch(name):
            raise TrustError(f"{quoted(name)} is not an operator's name: letters, digits, '.', '_' and '-'")
        identifier = name if role is Role.OPERATOR else ""
        if role is Role.DEVICE:
            identifier = _uuid(device_id) if device_id else str(uuid.uuid4())
        authority, key = self._authority(), new_key()
        issued = authority.issue(Subject(role, identifier, name), key.public_key(), days, self._clock())
        self.registry.add(issued, "issued")
        return Identity(key_pem(key), issued.certificate, authority.pem)

    def make_token(self, name: str, lifetime_s: float) -> tuple[Token, int]:
        """A token with which a device of this name gets its certificate once, and when it expires."""
        check_name(name)
        enrollment = self.enrollment()
        token = Token(secrets.token_bytes(SECRET_BYTES), bytes.fromhex(fingerprint(enrollment.certificate)))
        return token, self.registry.add_token(token.secret, name, lifetime_s)

    def enroll(self, secret: bytes, request: bytes, device_id: str, days: float) -> tuple[bytes, bytes]:
        """Trades a token's secret for a certificate; that, and the authority's.

        Raises:
            TrustError: no. Says why.
            UnavailableError: the folder cannot be used now.
        """
        key = requested_key(request)
        issued = self.registry.enroll(
            secret,
            _uuid(device_id),
            public_key_digest(key),
            lambda subject: self._signing().issue(subject, key, days, self._clock()),
        )
        return issued.certificate, self._signing().pem

    def renew(self, certificate: str, request: bytes) -> bytes:
        """A new certificate for whoever has the one with fingerprint `certificate`, for as long as that was made for.

        Raises:
            TrustError: there is none such, it was revoked, or has too long to go.
            UnavailableError: not so often, or the folder cannot be used now.
        """
        key = requested_key(request)

        def made(before: Issued) -> Issued:
            now = self._clock()
            if not is_due(before.not_before, before.not_after, now):
                raise TrustError(f"the certificate of {printable(before.subject.name)} is not to be renewed yet")
            days = (before.not_after - before.not_before) / 86400 - 1  # without the day before it was made
            return self._signing().issue(before.subject, key, max(1, days), now)

        return self.registry.renew(certificate, public_key_digest(key), made).certificate

    def ending(self) -> str:
        """What to do about an authority that ends within a year, with all that it has signed; "" if it lasts longer.

        Raises:
            TrustError: it is missing or damaged, or not valid now.
        """
        end = self._authority().certificate.not_valid_after_utc
        days = int((end.timestamp() - self._clock()) / 86400)
        if days >= AUTHORITY_NOTICE_DAYS:
            return ""
        return (
            f"the authority in {printable(str(self.folder))} ends on {end:%Y-%m-%d}, in {days} days. Make another one "
            "before that, and enrol all devices with it: fedepth-coordinator certs init --certs DIR, with a new folder"
        )

    # --- the coordinator's own

    def coordinator(self) -> Identity:
        """The coordinator's bundle, made anew first if it is due, revoked, damaged, not valid yet, or in no record.

        One that is due is used as long as it is valid, where no other can be made.

        Raises:
            TrustError: it, or the authority, is missing or damaged.
            DiskError: it cannot be written.
        """
        return self._own("coordinator.pem", Role.COORDINATOR, "coordinator", COORDINATOR_DAYS)

    def operator(self) -> Identity:
        """The same of the operator's."""
        return self._own("operator.pem", Role.OPERATOR, "operator", DEVICE_DAYS)

    def _own(self, file: str, role: Role, name: str, days: float) -> Identity:
        path, now = self.folder / file, self._clock()
        held, entry = None, None
        if os.path.lexists(path):
            try:
                held = read_identity(path)
            except TrustError as error:
                raise TrustError(f"{error}. A file that is deleted is made anew") from None
            whole = belongs_together(held)
            entry = self.registry.find(fingerprint(held.certificate)) if whole else None
            # One from the future was made while the clock here was ahead: nobody would believe it for years.
            if (
                entry
                and entry.state(now) == "valid"
                and entry.issued.not_before <= now
                and not is_due(entry.issued.not_before, entry.issued.not_after, now)
            ):
                return held
        try:
            with disk_errors(f"{file} cannot be made", self.folder):
                identity = self.issue(role, name, days)
                write_identity(path, identity)
        except FedepthError as error:
            if held is None or entry is None or entry.state(now) != "valid":
                raise
            until = datetime.fromtimestamp(entry.issued.not_after, timezone.utc)
            self.warn(f"{file} cannot be renewed, and is used until it ends ({until:%Y-%m-%d}): {error}")
            return held
        return identity

    def enrollment(self) -> Identity:
        """Key and certificate of the enrolment server."""
        return read_identity(self.folder / "enrollment.pem")

    def note_enrollment(self, address: str) -> None:
        """Keeps where devices are enrolled, for the commands that tell operators."""
        with disk_errors("the address cannot be written", self.folder):
            write_atomically(self.folder / "enrollment", f"{address}\n".encode(), 0o600)

    def enrollment_address(self) -> str:
        """What `note_enrollment` kept; "" if nothing was."""
        try:
            return read_regular(self.folder / "enrollment", _MOST_ADDRESS_BYTES).decode("utf-8", "replace").strip()
        except OSError:
            return ""

    def _signing(self) -> Authority:
        """The authority, for a device, whose fault it is not if there is none."""
        try:
            return self._authority()
        except TrustError as error:
            raise UnavailableError(str(error)) from None

    def _authority(self) -> Authority:
        """The authority, which is valid now: nobody believes what one signs that is not.

        Raises:
            TrustError: there is none, or it is not valid.
        """
        path = self.folder / "authority.pem"
        authority = read_authority(path)
        begin, end = authority.certificate.not_valid_before_utc, authority.certificate.not_valid_after_utc
        if not begin.timestamp() <= self._clock() < end.timestamp():
            raise TrustError(
                f"the authority in {printable(str(path))} is valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d}, and the "
                f"clock here says {datetime.fromtimestamp(self._clock(), timezone.utc):%Y-%m-%d}. If the clock is "
                "right, make another authority, and enrol all devices with it: fedepth-coordinator certs init --certs "
                "DIR, with a new folder"
            )
        return authority


def _uuid(text: str) -> str:
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise TrustError(f"{quoted(text)} is not a device's id, which is a UUID") from None
