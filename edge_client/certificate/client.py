"""The device's certificate as the agent sees it: looked at in a child process, and renewed in time.

The agent goes on whatever happens here: a certificate that cannot be renewed today may be tomorrow, and one that has
expired may be replaced by hand (`fedepth-client enroll`) while the agent runs.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import structlog
from fedepth_wire.tls import Identity, Role, read_identity, uri_of

from edge_client.backoff import Clock, Reminder
from edge_client.certificate.protocol import Command, Event, Facts, Failed, Inspect, Install, Prepare, Request
from fedepth.child import Child, module_argv
from fedepth.errors import ChildError, FedepthError, TrustError
from fedepth.printable import as_typed, printable

BUNDLE = "identity.pem"
CHILD_ARGV = tuple(module_argv("edge_client.certificate.process"))
LOOK_S = 10.0  # whether the bundle is another file by now
DAY_S = 86400.0
AGAIN_S = 3600.0  # after a renewal that failed
_log = structlog.get_logger()

E = TypeVar("E", bound=Event)


class Renewable(Protocol):
    """What is asked of the transport."""

    note: str

    async def renew(self, request: bytes) -> bytes: ...

    async def use(self, identity: Identity) -> None: ...


def bundle_of(state: Path) -> Path:
    """Where a device's key and certificate lie."""
    return state / BUNDLE


def device_identity(state: Path) -> Identity:
    """The device's key and certificate.

    Raises:
        TrustError: it has none. Says what to run.
    """
    path = bundle_of(state)
    if not path.exists():
        raise TrustError(
            f"this device has no certificate ({printable(str(path))}): on the coordinator's machine, run "
            "fedepth-coordinator enroll DEVICE, and here what that prints. Or use --insecure on both sides: plain "
            "text, for tests on one machine"
        )
    return read_identity(path)


class CertificateKeeper:
    """Looks after the certificate of a running agent."""

    def __init__(
        self,
        state: Path,
        device_id: str,
        transport: Renewable,
        *,
        clock: Clock | None = None,
        now: Callable[[], float] = time.time,
        remind_s: float = 180.0,
        argv: Sequence[str] = CHILD_ARGV,
    ) -> None:
        self._bundle = bundle_of(state)
        self._uri = uri_of(Role.DEVICE, device_id)
        self._transport = transport
        self._clock = clock or Clock()
        self._now = now
        self._argv = argv
        self._reminder = Reminder(self._clock, remind_s)
        self._seen = self._stamp()

    async def run(self) -> None:
        """Looks once a day, when the certificate is due, and whenever the bundle has changed, until it is cancelled."""
        while True:
            pause = await self.look()
            end = self._clock.now() + pause
            while (left := end - self._clock.now()) > 0 and not self._has_changed():
                await self._clock.sleep(min(left, LOOK_S))
            if self._has_changed():
                await self._take_over()

    async def look(self) -> float:
        """Renews the certificate if it is due, and says what is wrong with it; after how many seconds to look again."""
        try:
            async with self._child() as ask:
                facts: Facts = await ask(Inspect(str(self._bundle)), Facts)
                self._transport.note = trouble(facts, self._uri, self._now())
                if self._transport.note:
                    raise TrustError(self._transport.note)
                if facts.is_due(self._now()):
                    facts = await self._renew(ask, facts)
        except FedepthError as error:
            if self._reminder.due(str(error)):
                _log.error("the certificate of this device needs attention", error=str(error), next_look_s=AGAIN_S)
            return AGAIN_S
        self._reminder.over()
        # One that is made for a day is due, and over, before the next.
        return min(DAY_S, max(AGAIN_S, facts.due_at - self._now()))

    async def _renew(self, ask: Any, facts: Facts) -> Facts:
        request = await ask(Prepare(), Request)
        certificate = await self._transport.renew(request.request)
        renewed: Facts = await ask(Install(certificate, self._now()), Facts)
        await self._take_over()
        _log.info(
            "certificate renewed", name=renewed.name, before=day(facts.not_after), valid_until=day(renewed.not_after)
        )
        return renewed

    async def _take_over(self) -> None:
        """Has the transport go on with what the bundle holds now."""
        self._seen = self._stamp()
        try:
            await self._transport.use(read_identity(self._bundle))
        except TrustError as error:
            _log.error("the bundle cannot be used; going on with the certificate before", error=str(error))

    def _has_changed(self) -> bool:
        return self._stamp() != self._seen

    def _stamp(self) -> tuple[int, int]:
        try:
            facts = self._bundle.stat()
        except OSError:
            return (0, 0)
        return (facts.st_ino, facts.st_mtime_ns)

    @asynccontextmanager
    async def _child(self) -> AsyncIterator[Any]:
        """A child for a few questions; what asks it one."""
        try:
            child = await Child.start("certificate child", self._argv)
        except OSError as error:
            raise ChildError(f"the certificate child cannot be started: {error.strerror or error}") from error

        async def ask(command: Command, wanted: type[E]) -> E:
            await child.send(command)
            message = await child.receive()
            try:
                event: Event = msgspec.convert(message, Event)
            except msgspec.ValidationError as error:
                raise ChildError(f"the certificate child (pid {child.pid}) wrote what nobody knows: {error}") from None
            if isinstance(event, Failed):
                raise TrustError(event.message)
            if not isinstance(event, wanted):
                raise ChildError(f"the certificate child (pid {child.pid}) answered something else than it was asked")
            return event

        try:
            yield ask
        finally:
            await child.stop()


def trouble(facts: Facts, uri: str, now: float) -> str:
    """What keeps a certificate from being used now, and what to do; "" if nothing does."""
    name = printable(facts.name)
    again = f"for a new one, on the coordinator's machine: fedepth-coordinator enroll {as_typed(facts.name)}"
    if now >= facts.not_after:
        return f"the certificate of this device ({name}) expired on {day(facts.not_after)}; {again}"
    if now < facts.not_before:
        return (
            f"the clock of this device says {day(now)}, and its certificate is valid from {day(facts.not_before)} on; "
            "set the clock"
        )
    if facts.uri != uri:
        return (
            f"the certificate of this device ({name}) is for {printable(facts.uri)}, and its state directory is that "
            f"of {uri}. If this is a copy of {name} that joins as a device of its own: fedepth-coordinator enroll "
            "DEVICE on the coordinator's machine, with a name that no other device has"
        )
    return ""


def day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d")
