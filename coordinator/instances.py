"""Finds out two agents that are one device: the clones of an SD card, or of a container with its state.

Each start of an agent draws a new instance. A new one takes the place of the one before, as after a restart. If that
one is heard of again, both are alive, and one identity cannot stand for two devices: each would train the other's
tasks. The older is refused then, for as long as the other is heard of.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

KEPT_DEVICES = 10_000
KEPT_INSTANCES = 8
SILENT_S = 600.0  # after which one that took another's place is taken to be gone


@dataclass(frozen=True)
class Caller:
    """An agent that calls: its instance, and where it is, for people."""

    instance: str
    hostname: str
    peer: str

    @property
    def place(self) -> str:
        return f"{self.hostname or 'an unnamed host'} ({self.peer})"


@dataclass
class _Known:
    current: Caller
    heard_at: float
    replaced: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_INSTANCES))


class Instances:
    """The living instance of each device, as far as it was heard of since the coordinator's start."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: OrderedDict[str, _Known] = OrderedDict()

    def rival(self, device_id: str, caller: Caller) -> Caller | None:
        """The other agent that lives under this identity, if `caller` is to be refused for it; else None.

        Agents of before there were instances say none, and cannot be told apart.
        """
        if not caller.instance:
            return None
        now = self._clock()
        known = self._known.get(device_id)
        if known is None:
            self._known[device_id] = known = _Known(caller, now)
            if len(self._known) > KEPT_DEVICES:
                self._known.popitem(last=False)
        self._known.move_to_end(device_id)
        if caller.instance in known.replaced and now - known.heard_at < SILENT_S:
            return known.current
        if caller.instance != known.current.instance:
            known.replaced.append(known.current.instance)
        known.current, known.heard_at = caller, now
        return None
