"""Which devices are there: who waits for a task, and when each gave its last sign of life.

Nothing of it is recorded: after a restart the devices call again. Nothing grows: a device that was silent for a lease
is forgotten, unless it waits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set

REJECTED_S = 90.0  # a device that was rejected asks again within this time
_MOST_REJECTED = 1000


class Presence:
    """Devices by id. Every method takes constant time, on average."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._seen: dict[str, float] = {}  # the longest silent first
        self._waiting: set[str] = set()
        self._rejected: OrderedDict[str, tuple[float, str]] = OrderedDict()  # when, and why; the longest ago first

    @property
    def waiting(self) -> Set[str]:
        """Devices that wait for a task now."""
        return self._waiting

    def see(self, device_id: str, now: float) -> None:
        """Takes note of a sign of life."""
        self._seen.pop(device_id, None)
        self._seen[device_id] = now

    def wait(self, device_id: str, now: float) -> None:
        """A device asks for a task and waits."""
        self._waiting.add(device_id)
        self._rejected.pop(device_id, None)
        self.see(device_id, now)

    def leave(self, device_id: str, now: float) -> None:
        """A device no longer waits, since it hung up or was answered."""
        self._waiting.discard(device_id)
        self.see(device_id, now)

    def reject(self, device_id: str, why: str, now: float) -> bool:
        """A device asked and cannot take part. Whether that is news: it was not rejected for this just before."""
        _, before = self._rejected.pop(device_id, (now, ""))
        self._rejected[device_id] = now, why
        if len(self._rejected) > _MOST_REJECTED:
            self._rejected.popitem(last=False)
        return why != before

    def rejections(self, now: float) -> str:
        """How many devices cannot take part, and why the last one cannot; "" if there are none."""
        while self._rejected and now - next(iter(self._rejected.values()))[0] > REJECTED_S:
            self._rejected.popitem(last=False)
        if not self._rejected:
            return ""
        count, (_, why) = len(self._rejected), next(reversed(self._rejected.values()))
        return f"1 device was rejected: {why}" if count == 1 else f"{count} devices were rejected, the last: {why}"

    def seen_at(self, device_id: str) -> float:
        """When it gave its last sign of life; minus infinity if that is long ago."""
        return self._seen.get(device_id, float("-inf"))

    def live(self, now: float) -> Set[str]:
        """Devices that wait, or gave a sign of life within a lease."""
        self._forget(now)
        return self._seen.keys()

    def everyone_waits(self, now: float) -> bool:
        """Whether every live device waits."""
        return len(self.live(now)) == len(self._waiting)

    def _forget(self, now: float) -> None:
        while self._seen:
            device_id, seen = next(iter(self._seen.items()))
            if now - seen <= self._lease_s:
                return
            del self._seen[device_id]
            if device_id in self._waiting:  # its call is open: that it says nothing is no silence
                self._seen[device_id] = now
