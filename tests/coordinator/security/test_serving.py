"""A coordinator's own certificate changes while it serves."""

from __future__ import annotations

import asyncio
import ssl

import grpc
import pytest
import structlog
from fedepth_wire.tls import fingerprint

from coordinator.security import serving
from coordinator.security.authority import AUTHORITY_DAYS
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


def test_an_authority_that_ends_within_a_year_is_told_every_day(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "RENEW_S", 0.0)

    async def told(looks: int) -> list[str]:
        """What is said of it at the start, and in so many looks."""
        secured, seen = Secured(made.certificates), 0

        async def look() -> None:
            nonlocal seen
            seen += 1
            if seen > looks:
                raise asyncio.CancelledError

        monkeypatch.setattr(secured, "look", look)
        with structlog.testing.capture_logs() as logs:
            await asyncio.to_thread(secured.open)
            with pytest.raises(asyncio.CancelledError):
                await secured.keep_up()
        return [line["what_to_do"] for line in logs if "authority will end" in line["event"]]

    made.time.now += (AUTHORITY_DAYS - 365) * DAY_S - 60
    assert asyncio.run(told(48)) == []
    made.time.now += DAY_S
    once, *daily = asyncio.run(told(71))
    assert daily == [once] * 2
    assert "in 364 days" in once
    assert "fedepth-coordinator certs init --certs DIR" in once
