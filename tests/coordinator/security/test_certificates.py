"""The folder of an authority: made once, its own alone, and nothing half done by two at once."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from fedepth_wire.tls import COORDINATOR_NAME, Identity, Role, fingerprint, parse_uri, read_identity, write_identity

from coordinator.security.authority import belongs_together, key_pem, make_authority, new_key, public_key_digest
from coordinator.security.certificates import Certificates
from coordinator.security.registry import Registry
from edge_client.certificate.keys import facts_of
from fedepth.errors import StateError, TrustError, UnavailableError
from tests.coordinator.security.conftest import DAY_S, DEVICE, OTHER, Made, request_for


def parsed(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def usage(pem: bytes) -> list[Any]:
    return list(parsed(pem).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def names(pem: bytes) -> x509.SubjectAlternativeName:
    return parsed(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def test_what_certificates_are_good_for(made: Made) -> None:
    coordinator, operator, device = made.certificates.coordinator(), made.operator(), made.device()
    assert usage(coordinator.certificate) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert names(coordinator.certificate).get_values_for_type(x509.DNSName) == [COORDINATOR_NAME]
    for identity, uri in ((operator, "urn:fedepth:operator:operator"), (device, f"urn:fedepth:device:{DEVICE}")):
        assert usage(identity.certificate) == [ExtendedKeyUsageOID.CLIENT_AUTH]
        assert names(identity.certificate).get_values_for_type(x509.DNSName) == []
        assert facts_of(identity).uri == uri
        key = parsed(identity.certificate).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1"
        assert not parsed(identity.certificate).extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_all_of_it_is_the_users_alone(made: Made) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in made.folder.iterdir() if path.name != "lock"}
    assert set(modes.values()) == {0o600}
    assert made.folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", [".", "authority.pem"])
def test_what_others_may_read_is_refused(made: Made, name: str) -> None:
    path = (made.folder / name).resolve()
    path.chmod(path.stat().st_mode | 0o040)
    with pytest.raises(TrustError, match=rf"{path.name} can be read or changed by others \(mode 0[67]40\).*chmod go="):
        made.certificates.check()


def test_a_bundle_that_others_may_read_is_refused(made: Made, tmp_path: Path) -> None:
    bundle = tmp_path / "kitchen.pem"
    write_identity(bundle, made.device())
    assert read_identity(bundle).certificate
    bundle.chmod(0o644)
    with pytest.raises(TrustError, match=r"others may read or change it \(mode 0644\); .*chmod 600"):
        read_identity(bundle)


@pytest.mark.parametrize("damage", [b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_damaged_bundle_is_told(tmp_path: Path, damage: bytes) -> None:
    bundle = tmp_path / "kitchen.pem"
    bundle.write_bytes(damage)
    bundle.chmod(0o600)
    with pytest.raises(TrustError, match=r"does not hold a key, its certificate and the authority's"):
        read_identity(bundle)


def test_init_replaces_nothing_and_makes_what_is_missing(made: Made) -> None:
    before = {path: path.read_bytes() for path in made.folder.glob("*.pem")}
    assert not made.certificates.init()
    (made.folder / "operator.pem").unlink()  # as after a crash
    assert made.certificates.init()
    after = {path: path.read_bytes() for path in made.folder.glob("*.pem")}
    changed = {path.name for path in after if before[path] != after[path]}
    assert changed == {"operator.pem"}


@pytest.mark.parametrize("cut", ["empty", "without tables"])
def test_an_init_that_a_full_disk_or_a_kill_has_stopped_is_finished_by_the_next(tmp_path: Path, cut: str) -> None:
    """The record is a file before it has tables."""
    whole = Certificates(tmp_path / "whole")
    whole.init()
    folder = tmp_path / "cut"
    folder.mkdir(mode=0o700)
    (folder / "authority.pem").write_bytes((whole.folder / "authority.pem").read_bytes())
    (folder / "authority.pem").chmod(0o600)
    with contextlib.closing(sqlite3.connect(folder / "record.sqlite")) as database:
        if cut != "empty":
            database.execute("VACUUM")
    found = Certificates(folder)
    assert found.init() and not found.init()
    assert (folder / "authority.pem").read_bytes() == (whole.folder / "authority.pem").read_bytes()
    assert facts_of(found.issue(Role.DEVICE, "kitchen", 1)).name == "kitchen"


def test_a_folder_without_an_authority_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match=r"no certificates in .* yet; .*fedepth-coordinator certs init.*--insecure"):
        Certificates(tmp_path / "none").check()


def test_two_that_issue_at_once_get_two_certificates(made: Made) -> None:
    code = (
        "import sys; from pathlib import Path; from fedepth_wire.tls import Role\n"
        "from coordinator.security.certificates import Certificates\n"
        "for number in range(10):\n"
        "    Certificates(Path(sys.argv[1])).issue(Role.DEVICE, f'{sys.argv[2]}-{number}', 1)\n"
    )
    argv = [sys.executable, "-c", code, str(made.folder)]
    running = [subprocess.Popen([*argv, name]) for name in ("a", "b")]
    assert [process.wait(60) for process in running] == [0, 0]
    entries = made.certificates.registry.entries()
    assert len({entry.issued.fingerprint for entry in entries}) == len(entries) == 22
    assert {entry.issued.subject.name[0] for entry in entries if entry.issued.subject.role is Role.DEVICE} == {"a", "b"}


def test_two_that_init_at_once_make_one_authority(tmp_path: Path) -> None:
    folder = tmp_path / "certificates"
    argv = [sys.executable, "-m", "coordinator", "certs", "init", "--certs", str(folder)]
    running = [subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=60) for process in running]
    for process, (_, said) in zip(running, told, strict=True):
        assert process.returncode == 0 or "another command" in said, said
    found = Certificates(folder)
    found.check()
    facts_of(found.coordinator())
    facts_of(found.operator())


@pytest.mark.parametrize("name", ["", " x", "a\nb", "x" * 65, "\x1b[2J", "ü" * 33, "\ud800", "-x", "--help"])
def test_what_is_no_name(made: Made, name: str) -> None:
    says = "is not a name for a certificate"
    with pytest.raises(TrustError, match=says):
        made.device(name)
    with pytest.raises(TrustError, match=says):
        made.certificates.make_token(name, 60)  # or its device would be told in the end


@pytest.mark.parametrize("name", ["x" * 64, "ü" * 32, 'o\'brien "k"', "küche 😀", "a/b"])
def test_what_is_a_name(made: Made, name: str) -> None:
    assert facts_of(made.device(name)).name == name


def test_an_operator_has_a_name_that_a_uri_can_hold(made: Made) -> None:
    with pytest.raises(TrustError, match="is not an operator's name"):
        made.certificates.issue(Role.OPERATOR, "Ann Other", 1)
    assert facts_of(made.certificates.issue(Role.OPERATOR, "ann", 1)).uri == "urn:fedepth:operator:ann"


def test_an_id_has_one_name_at_a_time(made: Made) -> None:
    made.device("kitchen", DEVICE)
    with pytest.raises(
        TrustError, match=rf"{DEVICE} is known as kitchen, and now asks to be hall.*certs revoke kitchen"
    ):
        made.device("hall", DEVICE)
    made.device("kitchen", DEVICE)  # under its own, as often as it likes
    made.device("hall", OTHER)
    assert len(made.certificates.registry.revoke("kitchen")) == 2
    made.device("hall", DEVICE)


def test_an_id_stays_its_names_when_its_certificate_has_expired(made: Made) -> None:
    made.device("kitchen", DEVICE, days=1)
    made.time.now += 2 * DAY_S
    with pytest.raises(TrustError, match=rf"{DEVICE} is known as kitchen, and now asks to be hall"):
        made.device("hall", DEVICE)
    made.device("kitchen", DEVICE)


@pytest.mark.parametrize("who", ["kitchen", DEVICE])
def test_tokens_are_revoked_with_their_device(made: Made, who: str) -> None:
    """By its name or its id; what a token was made for is the name that it has now."""
    made.device("hall", DEVICE)
    made.certificates.registry.revoke("hall")
    made.device("kitchen", DEVICE)  # within the same second
    token, _ = made.certificates.make_token("kitchen", 60)
    another, _ = made.certificates.make_token("hall", 60)
    assert [entry.issued.subject.name for entry in made.certificates.registry.revoke(who)] == ["kitchen"]
    request = request_for(new_key())
    with pytest.raises(TrustError, match="the token for kitchen has expired"):
        made.certificates.enroll(token.secret, request, DEVICE, 30)
    made.certificates.enroll(another.secret, request, OTHER, 30)


def test_who_is_not_there_cannot_be_revoked(made: Made) -> None:
    with pytest.raises(TrustError, match="no certificate or token has the name or id 'kichen'"):
        made.certificates.registry.revoke("kichen")
    made.device("kitchen", DEVICE)
    assert [entry.issued.subject.name for entry in made.certificates.registry.revoke(DEVICE)] == ["kitchen"]
    assert made.certificates.registry.revoke("kitchen") == []  # again: nothing is valid any more


def test_the_coordinators_and_operators_own_are_renewed_when_a_third_is_left(made: Made) -> None:
    before = made.certificates.coordinator()
    made.time.now += 59 * DAY_S
    assert made.certificates.coordinator() == before
    made.time.now += 2 * DAY_S
    after = made.certificates.coordinator()
    assert after != before and made.certificates.coordinator() == after
    assert facts_of(after).not_after - made.time.now == pytest.approx(90 * DAY_S, abs=2)
    made.time.now += 300 * DAY_S
    assert facts_of(made.operator()).not_after - made.time.now == pytest.approx(365 * DAY_S, abs=2)


def test_what_is_due_is_used_until_it_ends_where_it_cannot_be_renewed(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full or read-only disk keeps no coordinator from starting, and no operator from looking."""
    before = made.certificates.coordinator(), made.operator()
    made.time.now += 70 * DAY_S
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Registry, "add", _full)
        assert (made.certificates.coordinator(), made.operator()) == before
        said = capsys.readouterr().err
        assert said.startswith("coordinator.pem cannot be renewed, and is used until it ends (2")
        assert said.endswith("database or disk is full\n") and said.count("\n") == 1  # the operator's is not due
        made.time.now += 25 * DAY_S
        with pytest.raises(UnavailableError, match="disk is full"):
            made.certificates.coordinator()


def _full(registry: Registry, *_: Any) -> None:
    raise UnavailableError("record.sqlite cannot be used now: database or disk is full")


def _another_key(identity: Identity) -> Identity:
    return replace(identity, key=key_pem(new_key()))


def _no_key(identity: Identity) -> Identity:
    lines = identity.key.splitlines(keepends=True)
    return replace(identity, key=b"".join([lines[0], b"AAAAAAAA" + lines[1][8:], *lines[2:]]))


def _another_authority(identity: Identity) -> Identity:
    return replace(identity, authority=make_authority(time.time()).pem)


@pytest.mark.parametrize("damage", [_another_key, _no_key, _another_authority])
def test_what_does_not_belong_together_is_made_anew(made: Made, damage: Callable[[Identity], Identity]) -> None:
    """gRPC would say no more than that it cannot listen."""
    path = made.folder / "coordinator.pem"
    write_identity(path, damaged := damage(read_identity(path)))
    assert read_identity(path) == damaged
    found = made.certificates.coordinator()
    assert belongs_together(found) and not belongs_together(damaged) and read_identity(path) == found
    assert facts_of(found)


def test_a_bundle_of_ours_that_is_none_says_that_it_can_be_deleted(made: Made) -> None:
    (made.folder / "coordinator.pem").write_bytes(b"")
    with pytest.raises(TrustError, match=r"it is damaged\. A file that is deleted is made anew"):
        made.certificates.coordinator()


def test_what_was_made_while_the_clock_was_ahead_is_made_anew(made: Made) -> None:
    """Such as at a start without a network; devices would believe it only in years."""
    right = made.time.now
    made.time.now += 5 * 365 * DAY_S
    ahead = made.certificates.coordinator(), made.operator()
    made.time.now = right
    found = made.certificates.coordinator(), made.operator()
    for identity, before in zip(found, ahead, strict=True):
        assert identity != before
        assert facts_of(identity).not_before <= right < facts_of(identity).not_after
    assert (made.certificates.coordinator(), made.operator()) == found


@pytest.mark.parametrize("years", [-1, 11])
def test_an_authority_that_is_not_valid_by_the_clock_signs_nothing(made: Made, years: int) -> None:
    token, _ = made.certificates.make_token("hall", 20 * 365 * DAY_S)
    made.time.now += years * 365 * DAY_S
    says = r"the authority in .*authority\.pem is valid from .*If the clock is right, make another authority"
    with pytest.raises(TrustError, match=says):
        made.device()
    with pytest.raises(UnavailableError, match=says):  # which is no fault of a device
        made.certificates.enroll(token.secret, request_for(new_key()), OTHER, 30)


def test_nothing_outlives_its_authority(made: Made) -> None:
    made.time.now += 3649 * DAY_S
    assert facts_of(made.device(days=30)).not_after - made.time.now == pytest.approx(DAY_S, abs=2)


# --- renewal


def test_a_renewal_keeps_id_and_name_and_needs_a_third_left(made: Made) -> None:
    device, key = made.device(days=30), new_key()
    certificate = fingerprint(device.certificate)
    with pytest.raises(TrustError, match="not to be renewed yet"):
        made.certificates.renew(certificate, request_for(key))
    made.time.now += 20 * DAY_S
    renewed = made.certificates.renew(certificate, request_for(key))
    assert made.certificates.renew(certificate, request_for(key)) == renewed  # its answer was lost
    entry = made.certificates.registry.find(fingerprint(renewed))
    assert entry is not None and entry.how == "renewed"
    assert (entry.issued.subject.id, entry.issued.subject.name) == (DEVICE, "kitchen")
    assert entry.issued.public_key == public_key_digest(key.public_key())
    assert entry.issued.not_after - made.time.now == pytest.approx(30 * DAY_S, abs=2)


@pytest.mark.parametrize("key_of", ["the certificate itself", "an earlier one"])
def test_a_key_that_was_certified_long_ago_gets_no_old_certificate(made: Made, key_of: str) -> None:
    """A device was killed before it forgot the key, or while it renewed, and was enrolled again then."""
    device, key = made.device(days=30), new_key()
    made.time.now += 20 * DAY_S
    earlier = made.certificates.renew(fingerprint(device.certificate), request_for(key))
    before = earlier if key_of == "the certificate itself" else made.device(days=90).certificate
    made.time.now += 25 * DAY_S if before == earlier else 70 * DAY_S
    renewed = made.certificates.renew(fingerprint(before), request_for(key))
    assert parsed(renewed).not_valid_after_utc > max(parsed(each).not_valid_after_utc for each in (before, earlier))


def test_what_is_revoked_or_expired_is_not_renewed(made: Made) -> None:
    device, key = made.device(days=30), new_key()
    made.time.now += 25 * DAY_S
    renewed = made.certificates.renew(fingerprint(device.certificate), request_for(key))
    made.certificates.registry.revoke("kitchen")
    for certificate in (device.certificate, renewed, made.device("hall", OTHER, days=-1).certificate):
        with pytest.raises(TrustError, match="not valid cannot be renewed"):
            made.certificates.renew(fingerprint(certificate), request_for(key))


def test_what_is_revoked_while_it_is_renewed_stays_revoked(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was looked at before: a command on the other terminal may be faster."""
    device, renew = made.device(days=30), Registry.renew
    made.time.now += 25 * DAY_S

    def overtaken(registry: Registry, *args: Any) -> Any:
        registry.revoke("kitchen")
        return renew(registry, *args)

    monkeypatch.setattr(Registry, "renew", overtaken)
    with pytest.raises(TrustError, match="not valid cannot be renewed"):
        made.certificates.renew(fingerprint(device.certificate), request_for(new_key()))
    assert {
        entry.state(made.time.now) for entry in made.certificates.registry.entries() if entry.issued.subject.id
    } == {
        "revoked",
        "valid",  # of the operator
    }


def test_renewals_are_few(made: Made) -> None:
    certificate = fingerprint(made.device(days=30).certificate)
    made.time.now += 25 * DAY_S
    for _ in range(3):
        made.certificates.renew(certificate, request_for(new_key()))
    with pytest.raises(UnavailableError, match="kitchen has had 3 new certificates within a day"):
        made.certificates.renew(certificate, request_for(new_key()))
    made.time.now += DAY_S + 1
    made.certificates.renew(certificate, request_for(new_key()))


# --- requests and the record


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (lambda: ec.generate_private_key(ec.SECP384R1()), "not on the curve P-256"),
        (lambda: rsa.generate_private_key(65537, 2048), "not on the curve P-256"),
        (ed25519.Ed25519PrivateKey.generate, "not on the curve P-256"),
    ],
)
def test_a_request_for_another_kind_of_key(made: Made, key: Callable[[], Any], says: str) -> None:
    made_key = key()
    builder = x509.CertificateSigningRequestBuilder(x509.Name([]))
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding

    algorithm = None if isinstance(made_key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    request = builder.sign(made_key, algorithm).public_bytes(Encoding.DER)
    token, _ = made.certificates.make_token("kitchen", 60)
    with pytest.raises(TrustError, match=says):
        made.certificates.enroll(token.secret, request, DEVICE, 30)


def test_a_request_that_its_key_has_not_signed(made: Made) -> None:
    token, _ = made.certificates.make_token("kitchen", 60)
    request = bytearray(request_for(new_key()))
    request[-1] ^= 1
    with pytest.raises(TrustError):
        made.certificates.enroll(token.secret, bytes(request), DEVICE, 30)
    for garbage in (b"", b"x", bytes(2000)):
        with pytest.raises(TrustError, match="cannot be read"):
            made.certificates.enroll(token.secret, garbage, DEVICE, 30)


def test_a_damaged_record_is_told(made: Made) -> None:
    (made.folder / "record.sqlite").write_bytes(b"no database, but more than a hundred bytes" * 9)
    with pytest.raises(StateError, match=r"record\.sqlite is damaged: .*restore it from a copy"):
        made.certificates.registry.entries()


def test_a_record_on_a_full_or_read_only_disk_says_what_to_do(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect

    def limited(pragma: str) -> Callable[..., sqlite3.Connection]:
        def opened(*args: Any, **options: Any) -> sqlite3.Connection:
            database: sqlite3.Connection = connect(*args, **options)
            database.execute(pragma)
            return database

        return opened

    for pragma, says in (
        ("PRAGMA query_only = 1", r"record\.sqlite cannot be used now: .*readonly database; make the folder writable"),
        ("PRAGMA max_page_count = 1", r"cannot be used now: database or disk is full; free some space there"),
    ):
        monkeypatch.setattr(sqlite3, "connect", limited(pragma))
        with pytest.raises(UnavailableError, match=says):
            for number in range(100):
                made.device(f"device-{number}", "")


def test_a_record_that_somebody_holds_is_busy(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.security.registry._BUSY_S", 0.01)
    other = sqlite3.connect(made.folder / "record.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UnavailableError, match=r"record\.sqlite cannot be used now: database is locked"):
        made.device()
    other.execute("ROLLBACK")
    other.close()
    made.device()


@pytest.mark.parametrize("uri", ["", "urn:fedepth:device:", "urn:fedepth:device:x", "urn:fedepth:admin:a", "http://x/"])
def test_a_uri_that_names_nobody(uri: str) -> None:
    with pytest.raises(TrustError, match="names neither device nor operator nor coordinator"):
        parse_uri(uri)
