"""What an authority has issued, what of it is revoked, and which tokens are out: an SQLite file.

Every change is one transaction, so that two commands at once, a coordinator beside them, and a power cut leave nothing
half done. A certificate is recorded before anybody has it: what is not recorded here is not believed, even if the
authority has signed it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedepth_wire.tls import KEY_MODE, Role

from coordinator.security.authority import Issued, Subject
from fedepth.errors import DiskError, StateError, TrustError, UnavailableError
from fedepth.printable import as_typed, printable, quoted

MOST_RENEWALS = 3  # of one id in a day: a device that is led by somebody else must not fill the disk
_DAY_S = 86400
_BUSY_S = 10.0
_VERSION = 1
_SCHEMA = """
CREATE TABLE certificates (
    fingerprint TEXT PRIMARY KEY,
    role TEXT NOT NULL,
    id TEXT NOT NULL,
    name TEXT NOT NULL,
    public_key TEXT NOT NULL,
    not_before INTEGER NOT NULL,
    not_after INTEGER NOT NULL,
    issued_at INTEGER NOT NULL,
    how TEXT NOT NULL,
    certificate BLOB NOT NULL,
    revoked_at INTEGER
);
CREATE INDEX certificates_by_id ON certificates (role, id);
CREATE INDEX certificates_by_name ON certificates (role, name);
CREATE INDEX certificates_revoked ON certificates (not_after) WHERE revoked_at IS NOT NULL;
CREATE TABLE tokens (
    digest TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    made_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    public_key TEXT,
    device_id TEXT,
    fingerprint TEXT REFERENCES certificates
);
"""
# By what SQLite says (sqlite3ErrStr), whose codes Python 3.10 does not tell.
_ADVICE = (
    ("readonly", "make the folder writable, or check that disk"),
    ("disk is full", "free some space there"),
    ("locked", "another command has it; try again"),
)
_COLUMNS = "role, id, name, certificate, fingerprint, public_key, not_before, not_after, issued_at, how, revoked_at"


@dataclass(frozen=True)
class Entry:
    """A certificate as it is recorded. Times are seconds since 1970.

    Attributes:
        how: "issued" by a command, "enrolled" with a token, or "renewed" by its device.
        revoked_at: None if it is not.
    """

    issued: Issued
    issued_at: int
    how: str
    revoked_at: int | None

    def state(self, now: float) -> str:
        """ "revoked", "expired" or "valid"."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if now >= self.issued.not_after else "valid"


class Registry:
    """The record of one authority. Every method opens the file and closes it, and may be called in any thread."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path.absolute()  # as seen from here, wherever the process goes
        self._clock = clock

    def create(self) -> None:
        """Makes the file, unless it is there.

        Raises:
            DiskError, StateError: it cannot be made, or is something else.
        """
        try:
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, KEY_MODE))
        except OSError as error:
            raise DiskError(f"{printable(str(self._path))} cannot be made: {error.strerror}") from None
        with self._transaction() as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {_VERSION}")

    def is_made(self) -> bool:
        """Whether `create` came to its end: a full disk or a kill leaves a file without tables.

        Raises:
            UnavailableError, StateError: it is not there, or cannot be read.
        """
        with self._transaction(reads=True) as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
        return bool(version)

    # --- certificates

    def add(self, issued: Issued, how: str) -> None:
        """Records a certificate that is about to be handed out.

        Raises:
            TrustError: its id is another device's.
        """
        self.add_all([issued], how)

    def add_all(self, issued: Iterable[Issued], how: str) -> None:
        """The same of several, all or none.

        Raises:
            TrustError: the id of one is another device's.
        """
        with self._transaction() as database:
            for each in issued:
                self._check_id(database, each.subject)
                self._insert(database, each, how)

    def renew(self, fingerprint: str, public_key: str, make: Callable[[Issued], Issued]) -> Issued:
        """The certificate for this key: the one that was made for it already, or what `make` makes of the one before.

        One that does not outlive the one before is no answer that was lost: a device was killed before it forgot its
        key, or has got another certificate meanwhile. Nor is one that is not valid yet, made while the clock was ahead.

        Args:
            fingerprint: of the certificate that runs out.

        Raises:
            TrustError: that, or the one for the key, is not valid.
            UnavailableError: this id has had MOST_RENEWALS in a day.
        """
        with self._transaction() as database:
            now = self._clock()
            found = self._select(database, "fingerprint = ?", fingerprint)
            if not found or found[0].state(now) != "valid":
                raise TrustError("a certificate that is not valid cannot be renewed")
            subject = found[0].issued.subject
            rows = self._select(database, "role = ? AND id = ?", subject.role.value, subject.id)
            for entry in rows:
                if entry.issued.public_key == public_key:
                    if entry.revoked_at is not None:
                        raise TrustError("the certificate for this key was revoked")
                    if entry.issued.not_before <= now and entry.issued.not_after > found[0].issued.not_after:
                        return entry.issued
            recent = [each for each in rows if each.how == "renewed" and each.issued_at > now - _DAY_S]
            if len(recent) >= MOST_RENEWALS:
                raise UnavailableError(f"{subject.name} has had {len(recent)} new certificates within a day")
            issued = make(found[0].issued)
            self._insert(database, issued, "renewed")
            return issued

    def find(self, fingerprint: str) -> Entry | None:
        with self._transaction(reads=True) as database:
            found = self._select(database, "fingerprint = ?", fingerprint)
        return found[0] if found else None

    def revoked(self) -> frozenset[str]:
        """Fingerprints of all revoked certificates that would be valid otherwise."""
        with self._transaction(reads=True) as database:
            rows = database.execute(
                "SELECT fingerprint FROM certificates WHERE revoked_at IS NOT NULL AND not_after > ?",
                (int(self._clock()),),
            ).fetchall()
        return frozenset(row[0] for row in rows)

    def entries(self) -> list[Entry]:
        """All certificates, by role and name, the newest of each last."""
        with self._transaction(reads=True) as database:
            return self._select(database, "1 = 1")

    def revoke(self, who: str) -> list[Entry]:
        """Revokes all certificates of a device or operator, by its name or id, and its unused tokens; those that were
        valid until now.

        Raises:
            TrustError: there is nobody of this name.
        """
        with self._transaction() as database:
            now = int(self._clock())
            where = "(name = ? OR id = ?) AND role != ?"
            entries = self._select(database, where, who, who, Role.COORDINATOR.value)
            # An id is renamed by a certificate for it: the name that was recorded last is what its tokens are made for.
            last = f"SELECT name FROM certificates WHERE {where} ORDER BY rowid DESC LIMIT 1"
            tokens = database.execute(
                f"UPDATE tokens SET expires_at = 0 WHERE (name = ? OR name = ({last})) AND fingerprint IS NULL",
                (who, who, who, Role.COORDINATOR.value),
            ).rowcount
            if not entries and not tokens:
                raise TrustError(
                    f"no certificate or token has the name or id {quoted(who)}; fedepth-coordinator certs list shows "
                    "all"
                )
            database.execute(
                f"UPDATE certificates SET revoked_at = ? WHERE revoked_at IS NULL AND {where}",
                (now, who, who, Role.COORDINATOR.value),
            )
            return [entry for entry in entries if entry.state(now) == "valid"]

    # --- tokens

    def add_token(self, secret: bytes, name: str, lifetime_s: float) -> int:
        """Records a token for a device of this name, and nothing of its secret but a digest; when it expires."""
        now = int(self._clock())
        expires = now + int(lifetime_s)
        with self._transaction() as database:
            database.execute("DELETE FROM tokens WHERE expires_at < ?", (now - 30 * _DAY_S,))
            database.execute(
                "INSERT INTO tokens (digest, name, made_at, expires_at) VALUES (?, ?, ?, ?)",
                (_digest(secret), name, now, expires),
            )
        return expires

    def enroll(self, secret: bytes, device_id: str, public_key: str, make: Callable[[Subject], Issued]) -> Issued:
        """Uses a token up: records the certificate that `make` makes for its device, and returns it.

        The same key may come again with it, since an answer can be lost on its way.

        Raises:
            TrustError: there is no such token, it has expired or another key has had it, or the id is another device's.
        """
        with self._transaction() as database:
            row = database.execute(
                "SELECT name, expires_at, public_key, device_id, fingerprint FROM tokens WHERE digest = ?",
                (_digest(secret),),
            ).fetchone()
            if row is None:
                raise TrustError("this token is not known here; it was mistyped, or is of another coordinator")
            name, expires, used_by, used_for, made = row
            if used_by is not None and (used_by, used_for) != (public_key, device_id):
                raise TrustError(f"the token for {printable(name)} has been used; {_another(name)}")
            if made is not None:
                (entry,) = self._select(database, "fingerprint = ?", made)
                if entry.revoked_at is not None:
                    raise TrustError(f"the certificate of {printable(name)} was revoked; {_another(name)}")
                return entry.issued
            if self._clock() >= expires:
                raise TrustError(f"the token for {printable(name)} has expired; {_another(name)}")
            subject = Subject(Role.DEVICE, device_id, name)
            self._check_id(database, subject)
            issued = make(subject)
            self._insert(database, issued, "enrolled")
            database.execute(
                "UPDATE tokens SET public_key = ?, device_id = ?, fingerprint = ? WHERE digest = ?",
                (public_key, device_id, issued.fingerprint, _digest(secret)),
            )
            return issued

    # --- inside a transaction

    def _check_id(self, database: sqlite3.Connection, subject: Subject) -> None:
        if subject.role is not Role.DEVICE:
            return
        for entry in self._select(database, "role = ? AND id = ?", subject.role.value, subject.id):
            # One that has expired still says whose id it is, with all that is kept under it.
            if entry.revoked_at is None and entry.issued.subject.name != subject.name:
                other = entry.issued.subject.name
                raise TrustError(
                    f"the device {subject.id} is known as {printable(other)}, and now asks to be "
                    f"{printable(subject.name)}. If it is the same one: fedepth-coordinator certs revoke "
                    f"{as_typed(other)}, then try again. If it is a copy of it: delete device-id in its state "
                    "directory, and it joins as a new device"
                )

    def _insert(self, database: sqlite3.Connection, issued: Issued, how: str) -> None:
        subject = issued.subject
        database.execute(
            f"INSERT INTO certificates ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
            (
                subject.role.value,
                subject.id,
                subject.name,
                issued.certificate,
                issued.fingerprint,
                issued.public_key,
                issued.not_before,
                issued.not_after,
                int(self._clock()),
                how,
            ),
        )

    def _select(self, database: sqlite3.Connection, where: str, *values: str) -> list[Entry]:
        rows = database.execute(
            f"SELECT {_COLUMNS} FROM certificates WHERE {where} ORDER BY role, name, id, issued_at, rowid",
            values,
        ).fetchall()
        return [
            Entry(Issued(Subject(Role(role), identifier, name), *issued), issued_at, how, revoked_at)
            for role, identifier, name, *issued, issued_at, how, revoked_at in rows
        ]

    @contextlib.contextmanager
    def _transaction(self, *, reads: bool = False) -> Iterator[sqlite3.Connection]:
        """One transaction that waits for those of others, and is undone if the block fails.

        Raises:
            UnavailableError: the disk cannot be used now, or another process does not let go of it.
            StateError: the file is damaged.
        """
        shown = printable(str(self._path))
        try:
            database = sqlite3.connect(f"{self._path.as_uri()}?mode=rw", uri=True, timeout=_BUSY_S)
            try:
                database.isolation_level = None
                database.execute("PRAGMA synchronous = EXTRA")
                database.execute("BEGIN" if reads else "BEGIN IMMEDIATE")
                try:
                    yield database
                except BaseException:
                    if database.in_transaction:  # SQLite has undone it by itself where the disk is full
                        database.execute("ROLLBACK")
                    raise
                database.execute("COMMIT")
            finally:
                database.close()
        except sqlite3.OperationalError as error:
            advice = next((f"; {what}" for sign, what in _ADVICE if sign in str(error)), "")
            raise UnavailableError(f"{shown} cannot be used now: {error}{advice}") from error
        except sqlite3.DatabaseError as error:
            raise StateError(f"{shown} is damaged: {error}; restore it from a copy") from error


def _digest(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


def _another(name: str) -> str:
    return f"make another one: fedepth-coordinator enroll {as_typed(name)}"
