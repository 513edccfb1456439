"""The way of trained updates from the outbox to the coordinator: what is tried again, and what is set aside."""

from __future__ import annotations

import asyncio

import structlog

from edge_client.backoff import Backoff
from edge_client.call_errors import BusyError, ServerError, UnreachableError
from edge_client.lease import Lease
from edge_client.outbox import Entry, Outbox
from edge_client.transport import Accepted, Refused, Transport
from fedepth.errors import DiskError, FedepthError, ProtocolError, TransportError
from fedepth.residuals import Residuals
from fedepth.task import Failure, Outcome, Progress

DELIVERY_TRIES = 3  # of an update that the coordinator neither takes nor refuses
_log = structlog.get_logger()


class Delivery:
    """Sends what the outbox holds."""

    def __init__(
        self,
        device_id: str,
        outbox: Outbox,
        residuals: Residuals,
        transport: Transport,
        backoff: Backoff,
        lease: Lease,
    ) -> None:
        self._device_id = device_id
        self._outbox = outbox
        self._residuals = residuals
        self._transport = transport
        self._backoff = backoff
        self._lease = lease
        self._tries: dict[str, int] = {}  # of entries that the coordinator neither takes nor refuses

    async def send_all(self) -> None:
        """Sends every kept update, oldest first. One that cannot be sent does not hold up the others.

        Raises:
            TransportError, ProtocolError, DiskError: one of them could not be sent. It is kept, and comes before
                another task.
        """
        held_up: FedepthError | None = None
        entries = await asyncio.to_thread(self._outbox.entries)
        names = {entry.folder.name for entry in entries}
        self._tries = {name: tries for name, tries in self._tries.items() if name in names}
        for entry in entries:
            try:
                await self.send(entry)
            except (UnreachableError, BusyError):
                raise
            except ServerError as error:
                held_up = error
            except (TransportError, ProtocolError, DiskError) as error:
                if not await self._given_up(entry, error):
                    held_up = error
        if held_up is not None:
            raise held_up

    async def send(self, entry: Entry) -> Refused | None:
        """Sends an update and removes it, whether it was accepted or finally refused.

        Raises:
            TransportError, ProtocolError, DiskError: it could not be sent, and is kept.
        """
        result = entry.result
        self._lease.note(Progress(result.task_id, result.attempt, self._device_id, "uploading"))
        # Whether it is still wanted is for CommitUpdate to say: only that answer is final.
        async with self._lease.renewed():
            try:
                answer = await self._transport.deliver(entry)
            except ServerError:
                # Such as bytes that were others than announced: they may have changed on the disk here.
                self._outbox.doubt(entry)
                raise
        self._backoff.reset()
        if isinstance(answer, Accepted):
            _log.info("update accepted", task=result.task_id, round=answer.round)
        else:
            _log.error(
                "update refused; it is dropped", task=result.task_id, reason=answer.reason, message=answer.message
            )
            await asyncio.to_thread(self._residuals.drop, result)
        self._outbox.remove(entry)
        return answer if isinstance(answer, Refused) else None

    async def report_failure(self, failure: Failure) -> None:
        """Tells that a task ended without an update, if the coordinator can be reached now."""
        try:
            await self._transport.report_failure(failure)
        except (TransportError, ProtocolError) as error:
            # The task's lease runs out, so the coordinator learns it all the same, only later.
            _log.warning("the failure could not be reported", error=str(error))

    async def _given_up(self, entry: Entry, error: FedepthError) -> bool:
        """Counts tries of an update that the coordinator neither takes nor refuses; sets it aside after the last."""
        name = entry.folder.name
        tries = self._tries[name] = self._tries.get(name, 0) + 1
        if tries < DELIVERY_TRIES:
            return False
        result = entry.result
        where = await asyncio.to_thread(self._outbox.set_aside, entry, str(error))
        _log.error(
            "an update cannot be delivered; it is set aside",
            task=result.task_id,
            error=str(error),
            tries=tries,
            moved_to=str(where),
        )
        what = f"the update is trained, but cannot be delivered: {error}"
        await self.report_failure(Failure(result.task_id, result.attempt, self._device_id, Outcome.ERROR, what))
        return True
