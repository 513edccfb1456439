"""The certificate of a running agent: looked at in a real child, renewed in time, taken over, and never in silence."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from fedepth_wire.tls import Identity, Role, fingerprint, read_identity, write_identity

from coordinator.security.certificates import Certificates
from edge_client.backoff import Clock
from edge_client.call_errors import UnreachableError
from edge_client.certificate import client
from edge_client.certificate.client import (
    AGAIN_S,
    DAY_S,
    LOOK_S,
    CertificateKeeper,
    bundle_of,
    device_identity,
    trouble,
)
from edge_client.certificate.keys import certificate_request, facts_of, install, pending_key
from edge_client.certificate.protocol import Facts, Failed, Inspect, Prepare
from edge_client.enroll import enroll_with_bundle
from edge_client.identity import device_id
from fedepth.errors import TrustError

NOW = 1_800_000_000.0
FACTS = Facts("urn:fedepth:device:1", "kitchen", NOW - 60 * DAY_S, NOW + 30 * DAY_S)


class FakeTransport:
    """Renews with the authority at hand."""

    def __init__(self, certificates: Certificates, state: Path) -> None:
        self.note = ""
        self.used: list[Identity] = []
        self.requests: list[bytes] = []
        self.failing: list[Exception] = []
        self.certificates, self._state = certificates, state

    async def renew(self, request: bytes) -> bytes:
        self.requests.append(request)
        certificate = fingerprint(read_identity(bundle_of(self._state)).certificate)
        renewed = self.certificates.renew(certificate, request)
        if self.failing:
            raise self.failing.pop()
        return renewed

    async def use(self, identity: Identity) -> None:
        self.used.append(identity)


class Device:
    """A state directory with a certificate in it, and the keeper of that."""

    def __init__(self, folder: Path, days: float) -> None:
        self.certificates = Certificates(folder / "certificates")
        self.certificates.init()
        self.state = folder / "state"
        self.enroll("kitchen", days)
        self.transport = FakeTransport(self.certificates, self.state)
        self.identity = read_identity(bundle_of(self.state))

    def enroll(self, name: str, days: float) -> None:
        own = device_id(self.state) if self.state.exists() else ""
        bundle = self.state.with_name("bundle.pem")
        write_identity(bundle, self.certificates.issue(Role.DEVICE, name, days, own))
        enroll_with_bundle(bundle, self.state)

    def keeper(self, **options: Any) -> CertificateKeeper:
        return CertificateKeeper(self.state, device_id(self.state), self.transport, **options)

    @property
    def bundle(self) -> Identity:
        return read_identity(bundle_of(self.state))


@pytest.fixture
def device(tmp_path: Path) -> Callable[[float], Device]:
    return lambda days: Device(tmp_path, days)


def test_a_certificate_with_long_to_go_is_left_alone(device: Callable[[float], Device]) -> None:
    kitchen = device(30)
    assert asyncio.run(kitchen.keeper().look()) == DAY_S
    assert (kitchen.transport.requests, kitchen.transport.used, kitchen.bundle) == ([], [], kitchen.identity)


def test_a_certificate_is_renewed_when_a_third_of_its_life_is_left(device: Callable[[float], Device]) -> None:
    kitchen = device(0.4)  # and a day before it was made
    assert asyncio.run(kitchen.keeper().look()) == pytest.approx(DAY_S / 3, abs=60)  # it is for a day now
    assert kitchen.bundle.certificate != kitchen.identity.certificate
    assert kitchen.bundle.key != kitchen.identity.key
    assert kitchen.transport.used == [kitchen.bundle]
    assert bundle_of(kitchen.state).stat().st_mode & 0o777 == 0o600
    assert not list(kitchen.state.glob("*.key"))


def test_a_certificate_for_a_day_is_looked_at_when_it_is_due(device: Callable[[float], Device]) -> None:
    kitchen = device(1)
    assert asyncio.run(kitchen.keeper().look()) == pytest.approx(DAY_S / 3, abs=60)
    assert not kitchen.transport.requests


def test_a_renewal_whose_answer_was_lost_goes_on_with_the_same_key(device: Callable[[float], Device]) -> None:
    kitchen = device(0.4)
    kitchen.transport.failing = [UnreachableError("the link broke")]
    with structlog.testing.capture_logs() as logs:
        assert asyncio.run(kitchen.keeper().look()) == AGAIN_S
    assert [line["error"] for line in logs] == ["the link broke"]
    assert kitchen.bundle == kitchen.identity
    assert asyncio.run(kitchen.keeper().look()) > AGAIN_S
    made = [entry for entry in kitchen.certificates.registry.entries() if entry.how == "renewed"]
    assert [entry.issued.certificate for entry in made] == [kitchen.bundle.certificate]


@pytest.mark.parametrize("way", ["bundle", "token"])
def test_a_renewal_that_was_cut_is_given_up_when_the_device_is_enrolled_again(
    device: Callable[[float], Device], way: str
) -> None:
    """What was certified for its key may be revoked, and would be refused for ever."""
    kitchen = device(0.4)
    kitchen.transport.failing = [UnreachableError("killed before the answer")]
    with structlog.testing.capture_logs():
        assert asyncio.run(kitchen.keeper().look()) == AGAIN_S
    kitchen.certificates.registry.revoke("kitchen")
    if way == "bundle":
        kitchen.enroll("kitchen", 0.4)
    else:
        pending = kitchen.state / "enrollment.key"
        request = certificate_request(pending_key(pending))
        token, _ = kitchen.certificates.make_token("kitchen", 60)
        signed = kitchen.certificates.enroll(token.secret, request, device_id(kitchen.state), 0.4)
        install(bundle_of(kitchen.state), pending, *signed)
    before = kitchen.bundle
    assert asyncio.run(kitchen.keeper().look()) > AGAIN_S
    assert kitchen.bundle.key != before.key and kitchen.transport.used == [kitchen.bundle]
    assert not list(kitchen.state.glob("*.key"))


def test_a_renewal_by_a_coordinator_whose_clock_is_ahead_is_not_taken(device: Callable[[float], Device]) -> None:
    """When that clock is right again, nobody would believe the device for weeks, and its own clock would be blamed."""
    kitchen = device(6)
    before, now = kitchen.bundle, time.time() + 4 * DAY_S
    clock = [now + 1.5 * DAY_S]
    kitchen.transport.certificates = Certificates(kitchen.certificates.folder, lambda: clock[0])
    keeper = kitchen.keeper(now=lambda: now)
    with structlog.testing.capture_logs() as logs:
        assert asyncio.run(keeper.look()) == AGAIN_S
    assert "is valid only in the future: its clock is ahead" in logs[0]["error"]
    assert (kitchen.bundle, kitchen.transport.used) == (before, [])
    clock[0] = now
    assert asyncio.run(keeper.look()) == DAY_S
    assert kitchen.bundle != before
    assert facts_of(kitchen.bundle).not_before <= now


def test_an_answer_for_another_key_is_not_put_into_the_bundle(device: Callable[[float], Device]) -> None:
    kitchen = device(0.4)

    async def wrong(request: bytes) -> bytes:
        return kitchen.identity.certificate

    kitchen.transport.renew = wrong  # type: ignore[method-assign]
    with structlog.testing.capture_logs() as logs:
        assert asyncio.run(kitchen.keeper().look()) == AGAIN_S
    assert "the certificate is for another key" in logs[0]["error"]
    assert kitchen.bundle == kitchen.identity


def test_what_is_wrong_is_noted_for_the_messages_of_calls(device: Callable[[float], Device]) -> None:
    kitchen = device(1)
    keeper = kitchen.keeper(now=lambda: NOW + 1e9)
    with structlog.testing.capture_logs() as logs:
        assert asyncio.run(keeper.look()) == AGAIN_S
        assert asyncio.run(keeper.look()) == AGAIN_S
    assert "the certificate of this device (kitchen) expired on" in kitchen.transport.note
    assert "fedepth-coordinator enroll kitchen" in kitchen.transport.note
    assert len(logs) == 1  # the same again is not said within three minutes


def test_a_bundle_that_was_replaced_by_hand_is_taken_over(device: Callable[[float], Device]) -> None:
    kitchen = device(30)
    slept: list[float] = []

    class Hand(Clock):
        async def sleep(self, seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == 1:
                kitchen.enroll("kitchen", 30)
            elif len(slept) == 3:
                raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(kitchen.keeper(clock=Hand()).run())
    assert kitchen.transport.used == [kitchen.bundle]
    assert slept[0] == pytest.approx(LOOK_S, abs=1)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (FACTS, ""),
        (Facts(FACTS.uri, "kitchen", NOW - 2, NOW - 1), "(kitchen) expired on 2027-01-15; for a new one"),
        (Facts(FACTS.uri, "kitchen", NOW + DAY_S, NOW + 2 * DAY_S), "the clock of this device says 2027-01-15"),
        (
            Facts("urn:fedepth:device:2", "hall", 0, NOW + 1),
            "(hall) is for urn:fedepth:device:2, and its state",
        ),
        # Not "enroll hall": two devices of one name would be revoked together.
        (
            Facts("urn:fedepth:device:2", "hall", 0, NOW + 1),
            "enroll DEVICE on the coordinator's machine, with a name that no other device has",
        ),
    ],
)
def test_what_keeps_a_certificate_from_being_used(facts: Facts, says: str) -> None:
    told = trouble(facts, FACTS.uri, NOW)
    assert says in told and bool(told) == bool(says)


def test_when_a_certificate_is_due() -> None:
    assert not FACTS.is_due(NOW - 1)
    assert FACTS.is_due(NOW)


def test_a_device_without_a_certificate_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match=r"no certificate .*fedepth-coordinator enroll DEVICE.*--insecure"):
        device_identity(tmp_path)


def test_a_child_that_cannot_go_on_says_why(device: Callable[[float], Device]) -> None:
    from edge_client.certificate.process import answer

    kitchen = device(1)
    assert answer(Prepare(), None) == Failed("no bundle was named yet")
    bundle = bundle_of(kitchen.state)
    bundle.write_bytes(b"damaged")
    told = answer(Inspect(str(bundle)), bundle)
    assert isinstance(told, Failed) and "is damaged" in told.message


def test_an_idle_agent_holds_no_library_that_it_has_no_use_for() -> None:
    unused = "'cryptography', 'typer', 'difflib', 'fractions', 'statistics', 'tomllib', 'tomli'"
    # As its process begins: without rich, which loads fractions.
    begin = "import sys; sys.modules['rich'] = None; import edge_client.daemon"
    code = f"{begin}; print(sorted({{{unused}}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert client.CHILD_ARGV[-1] == "edge_client.certificate.process"
