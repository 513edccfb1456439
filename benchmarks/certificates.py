"""Certificates of a federation on one machine: an authority of its own, and devices that are enrolled at once."""

from __future__ import annotations

from pathlib import Path

from fedepth_wire.tls import Identity, Role, parse_uri, read_identity, write_identity

from coordinator.security.certificates import Certificates
from edge_client.certificate.client import bundle_of
from edge_client.certificate.keys import facts_of
from edge_client.enroll import enroll_with_bundle
from edge_client.identity import device_id

_DAYS = 30


class LabCertificates:
    """The folder of an authority, made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._certificates = Certificates(folder)

    def serve_options(self) -> tuple[str, ...]:
        """Options of `fedepth-coordinator serve`, with which it enrols at any free port."""
        self._certificates.init()
        return ("--certs", str(self.folder), "--enroll-port", "0")

    @property
    def operator(self) -> Identity:
        """Who may watch."""
        self._certificates.init()
        return self._certificates.operator()

    def device(self, name: str) -> tuple[str, Identity]:
        """The id of a device and its identity; the same whenever it is asked for by this name."""
        bundle = self._bundle(name)
        identity = read_identity(bundle)
        return parse_uri(facts_of(identity).uri)[1], identity

    def enroll(self, name: str, state: Path) -> Path:
        """The state directory of a device, with its certificate in it; one that has an id keeps it."""
        if not bundle_of(state).exists():
            known = device_id(state) if (state / "device-id").exists() else ""
            enroll_with_bundle(self._bundle(name, known), state)
        return state

    def _bundle(self, name: str, known_id: str = "") -> Path:
        self._certificates.init()
        bundle = self.folder / f"device-{name}.pem"
        if not bundle.exists():
            write_identity(bundle, self._certificates.issue(Role.DEVICE, name, _DAYS, known_id))
        return bundle
