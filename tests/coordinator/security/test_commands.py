"""`fedepth-coordinator certs …` and `enroll` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fedepth_wire.tls import read_identity
from fedepth_wire.tokens import parse_token
from typer.testing import CliRunner

from coordinator.cli import app
from coordinator.security.certificates import Certificates
from coordinator.security.reach import reachable
from fedepth.errors import ConfigError, TrustError


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDEPTH_CERTS", "certificates")

    def run(*arguments: str) -> str:
        told = CliRunner().invoke(app, list(arguments), prog_name="fedepth-coordinator")
        if told.exception is not None and not isinstance(told.exception, SystemExit):
            raise told.exception
        assert told.exit_code == 0, told.output
        return told.stdout

    run("certs", "init")
    return run


def test_who_has_a_certificate_is_listed(typed: Any) -> None:
    typed("certs", "issue", "kitchen", "--days", "30")
    typed("certs", "issue", "ann", "--operator", "--output", "bundle.pem")
    assert read_identity(Path("kitchen.pem")).certificate
    typed("certs", "revoke", "kitchen")
    rows = json.loads(typed("certs", "list", "--json"))
    assert [(row["name"], row["role"], row["state"]) for row in rows] == [
        ("coordinator", "coordinator", "valid"),
        ("kitchen", "device", "revoked"),
        ("ann", "operator", "valid"),
        ("operator", "operator", "valid"),
    ]
    assert "revoked" in typed("certs", "list")


def test_certificates_below_the_home_directory(typed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--certs=~/certs`: most shells expand a ~ only where a word begins."""
    (home := tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(home))
    typed("certs", "init", "--certs=~/certs")
    typed("certs", "issue", "ann", "--operator", "--certs=~/certs", "--output", str(home / "ann.pem"))
    assert (home / "certs" / "authority.pem").exists() and not Path("~").exists()
    monkeypatch.setenv("FEDEPTH_CERTS", "~/certs")  # as from a service's settings
    assert "ann" in typed("certs", "list")


def test_a_bundle_is_not_written_over(typed: Any) -> None:
    typed("certs", "issue", "kitchen")
    before = Path("kitchen.pem").read_bytes()
    with pytest.raises(ConfigError, match=r"--output: kitchen\.pem is there already"):
        typed("certs", "issue", "kitchen")
    assert Path("kitchen.pem").read_bytes() == before
    assert len(json.loads(typed("certs", "list", "--json"))) == 3  # nothing was issued for it


def test_an_operator_has_no_device_id(typed: Any) -> None:
    with pytest.raises(ConfigError, match="--id is for a device"):
        typed("certs", "issue", "ann", "--operator", "--id", "00000000-0000-4000-8000-000000000001")
    assert not Path("ann.pem").exists()


def test_enroll_prints_what_the_device_types(typed: Any) -> None:
    Certificates(Path("certificates")).note_enrollment("127.0.0.1:4711")
    line = typed("enroll", "kitchen").splitlines()[-1]
    assert line.startswith("fedepth-client enroll 127.0.0.1:4711 --token ")
    parse_token(line.split()[-1])
    line = typed("enroll", "kitchen", "--address", "desk.local:9000").splitlines()[-1]
    assert line.startswith("fedepth-client enroll desk.local:9000 --token ")
    told = json.loads(typed("enroll", "kitchen", "--json"))
    assert told["command"].endswith(told["token"])
    with pytest.raises(TrustError, match="is not a name for a certificate"):
        typed("enroll", "")


@pytest.mark.parametrize(
    ("listening", "dialled"),
    [
        ("", "127.0.0.1:8971"),
        ("127.0.0.1:9", "127.0.0.1:9"),
        ("[::1]:9", "[::1]:9"),
        ("desk.local:9", "desk.local:9"),
        ("192.168.1.10", "192.168.1.10:8971"),  # not where devices are served
        ("desk.local", "desk.local:8971"),
        ("::1", "[::1]:8971"),
    ],
)
def test_where_a_device_reaches_us(listening: str, dialled: str) -> None:
    assert reachable(listening) == dialled


@pytest.mark.parametrize("listening", ["0.0.0.0:9", "[::]:9"])
def test_all_addresses_stand_for_one_of_ours(listening: str) -> None:
    host, _, port = reachable(listening).rpartition(":")
    assert port == "9" and host not in ("0.0.0.0", "[::]")


@pytest.mark.parametrize("listening", ["0.0.0.0", "::", "[::]"])
def test_all_addresses_without_a_port_have_that_of_enrolment(listening: str) -> None:
    assert reachable(listening).endswith(":8971")


@pytest.mark.parametrize("address", ["0.0.0.0:²", "0.0.0.0:99999", "[::]:0", "0.0.0.0:", ":::9", "x y", "-:9:"])
def test_an_address_that_cannot_be_dialled_makes_no_token(typed: Any, address: str) -> None:
    """It would be out there, and nobody would have been told."""
    with pytest.raises(ConfigError, match="is not an address that can be used"):
        typed("enroll", "kitchen", f"--address={address}")
    with pytest.raises(TrustError, match="no certificate or token has the name"):
        typed("certs", "revoke", "kitchen")


def test_a_coordinators_host_may_be_no_ascii(tmp_path: Path) -> None:
    found = Certificates(tmp_path)
    found.note_enrollment("küche.local:4711")
    assert reachable(found.enrollment_address()) == "küche.local:4711"
