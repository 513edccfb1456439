"""An authority whose clock the test sets, and servers over mutual TLS on port 0."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from fedepth_wire.channel import TLS_SERVER_OPTIONS
from fedepth_wire.tls import Identity, Role, server_credentials

from coordinator.security.authority import Authority, Subject, key_pem, new_key, read_authority
from coordinator.security.certificates import Certificates
from coordinator.security.guard import Guard

DEVICE = "11111111-1111-4111-8111-111111111111"
OTHER = "22222222-2222-4222-8222-222222222222"
DAY_S = 86400


@dataclass
class Time:
    """Seconds since 1970; real TLS libraries look at the real clock, so it begins there."""

    now: float

    def __call__(self) -> float:
        return self.now


@dataclass
class Made:
    """An authority in its folder."""

    certificates: Certificates
    time: Time
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = self.certificates.folder

    @property
    def authority(self) -> Authority:
        return read_authority(self.folder / "authority.pem")

    def device(self, name: str = "kitchen", device_id: str = DEVICE, days: float = 30) -> Identity:
        return self.certificates.issue(Role.DEVICE, name, days, device_id)

    def operator(self) -> Identity:
        return self.certificates.operator()

    def unrecorded(self, role: Role, identifier: str) -> Identity:
        """What somebody could make who has stolen the authority's key."""
        key = new_key()
        issued = self.authority.issue(Subject(role, identifier, "thief"), key.public_key(), 30, self.time())
        return Identity(key_pem(key), issued.certificate, self.authority.pem)


def request_for(key: Any) -> bytes:
    return x509.CertificateSigningRequestBuilder(x509.Name([])).sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Made]:
    import time

    def made(name: str = "certificates") -> Made:
        clock = Time(time.time())
        found = Certificates(tmp_path / name, clock)
        found.init()
        return Made(found, clock)

    return made


@pytest.fixture
def made(make: Callable[..., Made]) -> Made:
    return make()


@asynccontextmanager
async def guarded(made: Made, add: Callable[[grpc.aio.Server], None]) -> AsyncIterator[tuple[Guard, str]]:
    """A server behind a guard, and its address."""
    guard = Guard(made.certificates.registry, made.time)
    server = grpc.aio.server(options=TLS_SERVER_OPTIONS, interceptors=[guard])
    add(server)
    credentials = server_credentials(made.certificates.coordinator(), lambda: None)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield guard, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
