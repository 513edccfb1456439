"""Trained updates on their way: kept on disk until the coordinator has recorded them or finally refused them.

outbox/TASK-ATTEMPT/entry.json + part-NNNN.safetensors    appears in one rename, whole and fsynced
outbox/.NAME                                              half made or half removed; deleted at the next start
damaged/                                                  what could not be read, for a person to look at
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from fedepth.errors import StateError
from fedepth.files import NOT_JSON, file_digest, sync_folder, write_atomically
from fedepth.task import PartInfo, Result

_log = structlog.get_logger()


@dataclass(frozen=True)
class Entry:
    """One update that waits for its delivery."""

    folder: Path
    result: Result

    def part_path(self, part: PartInfo) -> Path:
        return self.folder / part_name(part.part)


class _Sealed(msgspec.Struct, frozen=True):
    # Boards without a clock battery boot in the past, so the order is a number and not a time.
    sequence: int
    result: Result


def part_name(part: int) -> str:
    return f"part-{part:04d}.safetensors"


class Outbox:
    """The updates in `state/outbox`. Only one process may use it at a time (see identity.StateLock)."""

    def __init__(self, state: Path) -> None:
        """Opens the outbox, and deletes what a crash left half made."""
        self._folder = state / "outbox"
        self._damaged = state / "damaged"
        self._verified: set[str] = set()
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.glob(".*"):
            shutil.rmtree(leftover)

    def put(self, result: Result, parts: Path) -> Entry:
        """Takes the part files out of `parts` and keeps them with `result`. Durable when it returns.

        Raises:
            StateError: a part is missing or has another size, or the disk is full. Nothing is kept then.
        """
        name = f"{result.task_id}-{result.attempt}"
        final, building = self._folder / name, self._folder / f".new-{name}"
        if final.exists():  # parts are immutable on the wire, so what was kept first is what counts
            return self._open(final)[1]
        try:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            for part in result.parts:
                self._take(parts / part_name(part.part), building, part)
            sealed = _Sealed(self._next_sequence(), result)
            write_atomically(building / "entry.json", msgspec.json.encode(sealed))
            building.rename(final)
            sync_folder(self._folder)
        except OSError as error:
            raise StateError(
                f"the update of task {result.task_id} cannot be kept in {self._folder}: {error.strerror}; "
                "free some space there, or make it writable"
            ) from error
        return Entry(final, result)

    def entries(self) -> list[Entry]:
        """Every intact update, oldest first. Damaged ones are moved aside and logged."""
        found: list[tuple[int, Entry]] = []
        for folder in self._folder.iterdir():
            if folder.name.startswith("."):
                continue
            try:
                found.append(self._open(folder))
            except StateError as error:
                self._set_aside(folder, error)
        return [entry for _, entry in sorted(found, key=lambda item: (item[0], item[1].folder.name))]

    def remove(self, entry: Entry) -> None:
        """Deletes an update that was acknowledged or finally refused."""
        leaving = self._folder / f".done-{entry.folder.name}"
        shutil.rmtree(leaving, ignore_errors=True)
        # One rename first: a crash in the middle of the deletion must not leave half an update to be sent.
        entry.folder.rename(leaving)
        sync_folder(self._folder)
        self._verified.discard(entry.folder.name)
        shutil.rmtree(leaving)

    def _take(self, source: Path, folder: Path, part: PartInfo) -> None:
        size = source.stat().st_size if source.exists() else -1
        if size != part.size_bytes:
            held = f"has {size} bytes" if size >= 0 else "is missing"
            raise StateError(f"the trainer promised {source.name} with {part.size_bytes} bytes, but it {held}")
        with open(source, "rb") as file:
            os.fsync(file.fileno())
        source.rename(folder / source.name)

    def _next_sequence(self) -> int:
        numbers = [0]
        for path in self._folder.glob("[!.]*/entry.json"):
            try:
                numbers.append(_read_sealed(path).sequence)
            except StateError:
                continue  # `entries` sets it aside, with its log line
        return max(numbers) + 1

    def _open(self, folder: Path) -> tuple[int, Entry]:
        sealed = _read_sealed(folder / "entry.json")
        entry = Entry(folder, sealed.result)
        if folder.name != f"{sealed.result.task_id}-{sealed.result.attempt}":
            raise StateError(f"{folder.name} holds task {sealed.result.task_id}, attempt {sealed.result.attempt}")
        if folder.name not in self._verified:  # once per start: parts are immutable while we run
            for part in sealed.result.parts:
                _verify(entry.part_path(part), part)
            self._verified.add(folder.name)
        return sealed.sequence, entry

    def _set_aside(self, folder: Path, error: StateError) -> None:
        self._damaged.mkdir(exist_ok=True)
        number = 0
        while (target := self._damaged / f"{folder.name}.{number}").exists():
            number += 1
        folder.rename(target)
        _log.error("a kept update is damaged and was moved aside", error=str(error), moved_to=str(target))


def _read_sealed(path: Path) -> _Sealed:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Sealed)
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}") from None
    except NOT_JSON as error:
        raise StateError(f"{path} is damaged: {error}") from None


def _verify(path: Path, part: PartInfo) -> None:
    try:
        digest = file_digest(path)
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}") from None
    if digest != part.digest:
        raise StateError(f"{path}: sha256 is {digest[:12]}…, expected {part.digest[:12]}…")
