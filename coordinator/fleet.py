"""The devices that call a job: who they are, and whether they may take part."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from coordinator.admission import lacking_classes
from coordinator.instances import Caller, Instances
from coordinator.observe.events import Events
from coordinator.security.limits import CLONES, Limits
from coordinator.store.records import Store
from fedepth.task import DeviceReport, ModelSpec

_CLASSES_SHOWN = 100
RECORD_S = 600.0  # a device that says nothing new is recorded so often, with what memory it has


@dataclass(frozen=True)
class _Known:
    report: DeviceReport
    recorded_at: float


@dataclass(frozen=True)
class Refusal:
    """Why a device cannot take part, for people; `reason` is a name for what its agent can act on."""

    message: str
    reason: str = ""


class Fleet:
    """The devices that called last, at most so many; the record has them all. It is made in a thread: it reads it."""

    def __init__(
        self,
        store: Store,
        events: Events,
        most_devices: int,
        clock: Callable[[], float] = time.monotonic,
        model: ModelSpec | None = None,
    ) -> None:
        self._store = store
        self._events = events
        self._most_devices = most_devices
        self._clock = clock
        self._model = model  # says which classes a device lacks
        self._instances = Instances(clock)
        self._limits = Limits[object](clock)
        self._names = store.device_names()  # for messages, which must neither wait nor fail
        self._known: OrderedDict[str, _Known] = OrderedDict()

    async def see(self, report: DeviceReport, peer: str) -> Refusal | None:
        """Takes note of a device that called, whether or not it can take part. Returns why it is refused, if it is.

        Raises:
            UnavailableError: that cannot be recorded now.
        """
        caller = Caller(report.instance, report.hostname, peer)
        rival = self._instances.rival(report.device_id, caller)
        if rival is not None:
            if not self._limits.take(report.device_id, report.name, CLONES):
                self._events.send(
                    "cloned_identity",
                    device=report.name,
                    device_id=report.device_id,
                    refused=caller.place,
                    served=rival.place,
                )
            return Refusal(
                f"another agent with the identity of this one, {report.device_id}, is alive on {rival.place}; stop one "
                "of the two, and delete device-id in its state directory if it is to join as a device of its own",
                "clone",
            )
        known = self._known.get(report.device_id)
        now = self._clock()
        if known is None or now - known.recorded_at >= RECORD_S or _changed(known.report, report):
            if not await self._store.short(self._store.see_device, report, self._most_devices):
                return Refusal(
                    f"the job has all of the {self._most_devices} devices that it takes; to admit "
                    "more, raise [limits] devices in the job file"
                )
            recorded_at = now
        else:
            recorded_at = known.recorded_at
        known = self._known.get(report.device_id)  # another call of it may have come meanwhile
        self._names[report.device_id] = report.name
        self._known[report.device_id] = _Known(report, recorded_at)
        self._known.move_to_end(report.device_id)
        if len(self._known) > self._most_devices:
            self._known.popitem(last=False)
        if known is None:
            self._events.send(
                "device_seen",
                device=report.name,
                device_id=report.device_id,
                samples=report.sample_count,
                budget=report.budget.budget_bytes,
                hardware=report.hardware,
                lacking=lacking_classes(report, self._model)[:_CLASSES_SHOWN] if self._model else (),
            )
        return None

    def name(self, device_id: str) -> str:
        """What the operator of a device calls it; its id if it is not known."""
        return self._names.get(device_id, device_id)


def _changed(before: DeviceReport, now: DeviceReport) -> bool:
    """Whether a report says anything new but how much memory is free, which changes all the time."""
    return replace(before, budget=now.budget) != now
