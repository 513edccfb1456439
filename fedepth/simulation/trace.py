"""How fast, how well connected and how reliable simulated clients are: a trace, one JSON object a line.

    {"client": "*", "images_per_second": 40, "download_bytes_per_second": 1e6, "upload_bytes_per_second": 2e5}
    {"client": "client-007", "images_per_second": 8, "dropout": 0.2, "available": [[0, 3600]], "every_s": 86400}
    {"round": 3, "clients": ["client-001", "client-007"]}

A line with `client` is about that client, or with "*" about every client without a line of its own; what it leaves out
takes no time and never fails. A line with `round` says who may be drawn in that round. Times are seconds of the
simulation, which begins at 0; they decide who is there and who makes the deadline, and nothing else.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from fedepth.errors import ConfigError
from fedepth.files import NOT_JSON, read_regular
from fedepth.printable import printable, quoted

EVERYBODY = "*"
_MOST_BYTES = 1 << 28


class Conditions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a trace says of one client.

    Attributes:
        images_per_second: when it trains the whole model, one epoch over one image each; None takes no time.
        dropout: probability that a task is begun and never delivered. The client is then away for the round.
        available: from and to in seconds, when the client asks for work; empty: always.
        every_s: after so many seconds `available` begins again; 0: never.
    """

    client: str
    images_per_second: float | None = None
    download_bytes_per_second: float | None = None
    upload_bytes_per_second: float | None = None
    dropout: float = 0.0
    available: tuple[tuple[float, float], ...] = ()
    every_s: float = 0.0

    def is_there(self, now: float) -> bool:
        """Whether the client asks for work at that time."""
        at = now % self.every_s if self.every_s else now
        return not self.available or any(start <= at < end for start, end in self.available)

    def next_change(self, now: float) -> float:
        """When it comes or goes next; infinity if it never does."""
        begin = now - now % self.every_s if self.every_s else 0.0
        edges = [edge + begin for pair in self.available for edge in pair]
        if self.every_s:
            edges += [edge + self.every_s for edge in edges]
        return min((edge for edge in edges if edge > now), default=math.inf)


class _Chosen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    round: int
    clients: tuple[str, ...]


@dataclass(frozen=True)
class Trace:
    """A whole trace.

    Attributes:
        conditions: by client; that of EVERYBODY counts for the rest.
        chosen: by round, who may be drawn in it.
    """

    conditions: Mapping[str, Conditions] = field(default_factory=dict)
    chosen: Mapping[int, frozenset[str]] = field(default_factory=dict)

    def of(self, client: str) -> Conditions:
        found = self.conditions.get(client) or self.conditions.get(EVERYBODY)
        return found if found is not None else Conditions(client)

    def may_be_drawn(self, client: str, round_number: int) -> bool:
        chosen = self.chosen.get(round_number)
        return chosen is None or client in chosen

    def comes_round(self, clients: Iterable[str], since: float) -> float:
        """By when every time at which one of these clients comes or goes has been twice, or for the last time."""
        found = [self.of(client) for client in clients]
        lasts = [end for each in found for pair in each.available for end in pair if math.isfinite(end)]
        return max([since + 2 * each.every_s for each in found] + lasts, default=since)

    def drops_out(self, seed: int, round_number: int, client: str, attempt: int) -> float | None:
        """At which part of its task a client disappears; None if it does not. The same for the same arguments."""
        chance, place = _draws(f"{seed}/{round_number}/{client}/{attempt}")
        return place if chance < self.of(client).dropout else None


def load_trace(path: Path, clients: Collection[str]) -> Trace:
    """Reads a trace.

    Raises:
        ConfigError: it cannot be read, or a line says what no client can do, or names one that there is not.
    """
    try:
        lines = read_regular(path, _MOST_BYTES).splitlines()
    except OSError as error:
        raise ConfigError(f"--trace: {printable(str(path))} cannot be read: {error.strerror}") from None
    known = {*clients, EVERYBODY}
    conditions: dict[str, Conditions] = {}
    chosen: dict[int, frozenset[str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"--trace: {printable(str(path))}, line {number}"
        try:
            fields = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
            found = msgspec.json.decode(line, type=_Chosen if "round" in fields else Conditions, strict=False)
        except NOT_JSON as error:
            raise ConfigError(f"{where}: {error}") from None
        names = found.clients if isinstance(found, _Chosen) else (found.client,)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ConfigError(f"{where}: there is no client {quoted(unknown[0])}")
        if isinstance(found, _Chosen):
            if found.round < 1:
                raise ConfigError(f"{where}: rounds count from 1, this is {found.round}")
            if EVERYBODY in names:
                raise ConfigError(f"{where}: everybody may be drawn in a round without a line; name clients here")
            again = found.round in chosen
            chosen[found.round] = frozenset(names)
        else:
            _check(found, where)
            again = found.client in conditions
            conditions[found.client] = found
        if again:
            what = f"round {found.round}" if isinstance(found, _Chosen) else f"client {quoted(found.client)}"
            raise ConfigError(f"{where}: there is another line about {what}; put all of it into one")
    return Trace(conditions, chosen)


def _check(found: Conditions, where: str) -> None:
    for name in ("images_per_second", "download_bytes_per_second", "upload_bytes_per_second"):
        value = getattr(found, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{where}: {name} must be above 0, is {value}")
    if not 0 <= found.dropout <= 1:
        raise ConfigError(f"{where}: dropout must be from 0 to 1, is {found.dropout}")
    if not (math.isfinite(found.every_s) and found.every_s >= 0):
        raise ConfigError(f"{where}: every_s must be 0 or more, is {found.every_s}")
    for start, end in found.available:
        if not 0 <= start < end or not math.isfinite(start) or (found.every_s and end > found.every_s):
            raise ConfigError(f"{where}: available from {start} to {end} is not within {found.every_s or 'the run'}")


def _draws(text: str) -> tuple[float, float]:
    """Two numbers from 0 to below 1, spread evenly over texts."""
    digest = hashlib.sha256(text.encode()).digest()
    first, second = (int.from_bytes(digest[at : at + 7], "big") / (1 << 56) for at in (0, 8))
    return first, second
