"""Which devices are there: who waits for a task, and when each gave its last sign of life.

Nothing of it is recorded: after a restart the devices call again. Nothing grows: a device that was silent for a lease
is forgotten, unless it waits.
"""

from __future__ import annotations

from collections.abc import Set


class Presence:
    """Devices by id. Every method takes constant time, on average."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._seen: dict[str, float] = {}  # the longest silent first
        self._waiting: set[str] = set()

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
        self.see(device_id, now)

    def leave(self, device_id: str, now: float) -> None:
        """A device no longer waits, since it hung up or was answered."""
        self._waiting.discard(device_id)
        self.see(device_id, now)

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
