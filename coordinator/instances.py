"""Finds out two agents that are one device: the clones of an SD card, or of a container with its state.

Each start of an agent draws a new instance. A new one takes the place of the one before, as after a restart. If that
one is heard of again, both are alive, and one identity cannot stand for two devices: each would train the other's
tasks. The older is refused then, for as long as it calls.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

KEPT_DEVICES = 10_000
KEPT_INSTANCES = 8


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
    replaced: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_INSTANCES))


class Instances:
    """The living instance of each device, as far as it was heard of since the coordinator's start."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Known] = OrderedDict()

    def rival(self, device_id: str, caller: Caller) -> Caller | None:
        """The other agent that lives under this identity, if `caller` is to be refused for it; else None.

        Agents of before there were instances say none, and cannot be told apart.
        """
        if not caller.instance:
            return None
        known = self._known.get(device_id)
        if known is None:
            self._known[device_id] = known = _Known(caller)
            if len(self._known) > KEPT_DEVICES:
                self._known.popitem(last=False)
        self._known.move_to_end(device_id)
        if caller.instance in known.replaced:
            return known.current
        if caller.instance != known.current.instance:
            known.replaced.append(known.current.instance)
        known.current = caller
        return None
