"""What a federation left behind, as the judge reads it: acknowledgements, refusals, trainings, tracebacks, exits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.faults.federation import Federation
from fedepth.files import file_digest

TRACEBACK = "Traceback (most recent call last)"
BUG = "this is a bug in fedepth"  # so ends a child, or a program (fedepth.program)
_FIRED = re.compile(
    r"^@(?P<at>[\d.]+) (?P<pid>\d+) (?P<rule>\d+) (?P<action>\w+) "
    r"(?P<call>\w+) (?P<error>\d+) (?P<number>\d+) (?P<path>.*)$"
)
_REMOVED = re.compile(r"/outbox/\.done-(?P<task>.+)-(?P<attempt>\d+)$")


@dataclass(frozen=True)
class Told:
    """An answer to an update that a device took note of; attempt 0 where it was killed before it did."""

    device: str
    task: str
    attempt: int
    accepted: bool
    reason: str


@dataclass(frozen=True)
class Training:
    """A training that a trainer has done; without digests it was cut short."""

    device: str
    task: str
    attempt: int
    digests: tuple[str, ...]
    at: float


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """The log lines in a journal that are JSON; what fired, under "@"."""
    if not path.exists():
        return
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith("{"):
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue  # cut short by a kill
        elif match := _FIRED.match(line):
            yield {"@": match["action"], **match.groupdict()}


def told(federation: Federation, device: str) -> list[Told]:
    """Every answer to an update that this device logged, with the attempt that left its outbox for it."""
    found: list[Told] = []
    open_: dict[str, list[int]] = {}
    for entry in entries(federation.journal(device)):
        event = str(entry.get("event", ""))
        if "task" in entry and (event == "update accepted" or event.startswith("update refused")):
            found.append(Told(device, entry["task"], 0, event == "update accepted", str(entry.get("reason", ""))))
            open_.setdefault(entry["task"], []).append(len(found) - 1)
        elif "@" in entry and (match := _REMOVED.search(entry["path"])):
            for index in open_.pop(match["task"], []):
                old = found[index]
                found[index] = Told(old.device, old.task, int(match["attempt"]), old.accepted, old.reason)
    return found


def trainings(federation: Federation, device: str) -> list[Training]:
    """What the trainers of this device did; of real ones, what its agent says."""
    path = federation.folder / f"{device}.trainings"
    if federation.real_trainers or not path.exists():
        return []
    found: list[Training] = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        digests = tuple(entry.get("digests", ()))
        training = Training(device, entry["task"], entry["attempt"], digests, entry["time"])
        if entry["event"] == "begun":
            found.append(training)
        else:
            found[-1] = training
    return found


def ended_without(federation: Federation, device: str) -> dict[str, str]:
    """Tasks that this device gave up, and why."""
    return {
        entry["task"]: f"{entry.get('outcome')}: {entry.get('message')}"
        for entry in entries(federation.journal(device))
        if entry.get("event") == "task ended without an update" and "task" in entry
    }


def files_by_digest(federation: Federation) -> dict[str, Path]:
    """Every part and every weights file that there ever was."""
    return {_digest(path): path for path in sorted(federation.archive.iterdir())}


_digest = lru_cache(maxsize=100_000)(file_digest)  # what is in an archive never changes


def tracebacks(federation: Federation, before: dict[str, int]) -> list[str]:
    """The last lines of tracebacks, and words of bugs whose traces are elsewhere, in what was written since `before`,
    which is moved on."""
    found: list[str] = []
    for name in federation.managed:
        for path in (federation.journal(name), federation.log(name)):
            if not path.exists():
                continue
            text = path.read_bytes()[before.get(str(path), 0) :].decode(errors="replace")
            before[str(path)] = path.stat().st_size
            if path == federation.journal(name) or TRACEBACK not in "".join(found):
                found += [f"{name}: {last}" for last in _last_lines(text)]
    return sorted(set(found))


def _last_lines(text: str) -> Iterator[str]:
    """What each traceback ends with: the first line behind it that is not indented."""
    for block in text.split(TRACEBACK)[1:]:
        lines = block.replace("\\n", "\n").split("\n")[1:]
        last = next((line for line in lines if line and not line.startswith((" ", "@", "+", "|"))), "a traceback")
        yield last[:200]
    yield from (line[line.index(BUG) :][:200] for line in text.splitlines() if BUG in line)
