"""A coordinator's own certificate changes while it serves."""

from __future__ import annotations

import asyncio
import ssl

import grpc
import structlog
from fedepth_wire.tls import fingerprint

from coordinator.security.certificates import Certificates
from coordinator.security.serving import Secured
from tests.coordinator.security.conftest import DAY_S, Made


def test_connections_from_now_on_meet_the_renewed_certificate(made: Made) -> None:
    async def scene() -> None:
        secured = Secured(made.certificates)
        credentials, _ = await asyncio.to_thread(secured.open)
        server = grpc.aio.server(interceptors=[secured.guard])
        port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()

        async def met() -> str:
            found = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port), timeout=20)
            return fingerprint(found.encode())

        before = fingerprint(made.certificates.coordinator().certificate)
        assert await met() == before
        await secured.look()
        assert await met() == before
        made.time.now += 61 * DAY_S
        await secured.look()
        after = await met()
        assert after == fingerprint(made.certificates.coordinator().certificate) != before
        assert await met() == after
        # Another coordinator, which serves with the same folder, has renewed it.
        made.time.now += 61 * DAY_S
        other = Certificates(made.folder, made.time).coordinator()
        await secured.look()
        assert await met() == fingerprint(other.certificate)
        await server.stop(0)

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_certificate_that_cannot_be_renewed_is_told_and_kept(made: Made) -> None:
    async def scene() -> None:
        secured = Secured(made.certificates)
        await asyncio.to_thread(secured.open)
        made.time.now += 61 * DAY_S
        (made.folder / "authority.pem").unlink()
        with structlog.testing.capture_logs() as logs:
            await secured.look()
            made.time.now += 30 * DAY_S
            await secured.look()
        assert [line["event"] for line in logs] == [
            "a certificate cannot be renewed; trying again later",
            "the coordinator's certificate cannot be renewed; trying again in an hour",  # and it has ended by now
        ]
        assert "coordinator.pem cannot be renewed, and is used until it ends (" in logs[0]["error"]
        assert all("authority.pem cannot be read" in line["error"] for line in logs)

    asyncio.run(scene())
