"""Trained updates on their way: kept on disk until the coordinator has recorded them or finally refused them.

outbox/TASK-ATTEMPT/entry.json + part-NNNN.safetensors    appears in one rename, whole and fsynced
outbox/.done-NAME                                         half removed; deleted as soon as that works
work/TASK-ATTEMPT/output/result.json                      the trainer's last word: all parts are there, and durable
outbox/.reserve                                           given up for entry.json where the disk is full
damaged/NAME.N                                            what could not be read, for a person to look at
undelivered/NAME.N + reason.txt                           what the coordinator would not take, without refusing it

Of damaged and of undelivered updates the last KEPT_ASIDE stay. Whatever cannot be written or removed now is a
DiskError and changes nothing: the same call may be made again, and goes on where it was.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from edge_client.trainer.protocol import RESULT
from fedepth.errors import DiskError, StateError
from fedepth.files import (
    NOT_JSON,
    WrongFileError,
    disk_errors,
    file_digest,
    read_regular,
    sync_folder,
    write_atomically,
)
from fedepth.sizes import format_size
from fedepth.task import PartInfo, Result

KEPT_ASIDE = 5
READ_TRIES = 3  # before what a disk cannot read counts as damaged
MOST_ENTRY_BYTES = 4 << 20  # that are read of an entry.json: no message to the coordinator may be longer
RESERVE_BYTES = 256 << 10  # more than an entry.json takes
_FEWEST_FILES = 64  # of inodes: a task makes about as many files as it has blocks
_ENTRY = "entry.json"
_REASON = "reason.txt"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_log = structlog.get_logger()
_T = TypeVar("_T")


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


def trained_result(parts: Path) -> Result | None:
    """What a trainer left in its folder as its last act; None if it did not come so far.

    Raises:
        StateError: that cannot be read.
    """
    return _read(parts / RESULT, Result) if (parts / RESULT).exists() else None


class Outbox:
    """The updates in `state/outbox`. Only one process may use it at a time (see identity.StateLock)."""

    def __init__(self, state: Path) -> None:
        """Opens the outbox, and deletes what a crash left half removed.

        Raises:
            DiskError: its folder cannot be made.
        """
        self._folder = state / "outbox"
        self._damaged = state / "damaged"
        self._undelivered = state / "undelivered"
        self._reserve = self._folder / ".reserve"
        self._verified: set[str] = set()
        self._unread: dict[str, int] = {}  # how often an entry could not be read
        self._stuck: set[str] = set()  # damaged, and cannot be moved
        self._acknowledged: set[str] = set()  # but still there, since the disk did not let them go
        with disk_errors("no outbox can be made", self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._sweep()

    def check_room(self, wanted_bytes: int) -> None:
        """Whether an update of `wanted_bytes` could be stored. Writes something only where the reserve is gone.

        Raises:
            DiskError: the folder cannot be written, or has too little space or too few files left.
        """
        with disk_errors("nothing could be stored", self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            disk = os.statvfs(self._folder)
            if disk.f_flag & os.ST_RDONLY:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            if not os.access(self._folder, os.W_OK | os.X_OK):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        free = disk.f_bavail * disk.f_frsize
        if free < wanted_bytes:
            raise DiskError(
                f"{self._folder} has {format_size(free)} free, but a task may take "
                f"{format_size(wanted_bytes, round_up=True)}; free some space there"
            )
        if disk.f_files and disk.f_favail < _FEWEST_FILES:  # some file systems have no bound, and say 0
            raise DiskError(
                f"the disk of {self._folder} has room for {disk.f_favail} more files, but a task may make "
                f"{_FEWEST_FILES}; delete some files there"
            )
        if not self._reserve.exists():
            with disk_errors("nothing could be stored", self._folder):
                write_atomically(self._reserve, os.urandom(RESERVE_BYTES))  # which no file system makes smaller

    def put(self, result: Result, parts: Path) -> Entry:
        """Keeps `result` with the part files in the folder `parts`, which becomes the entry. Durable when it returns.

        Raises:
            StateError: a part is missing or has another size.
            DiskError: it could not be kept. The parts are where they were, and the same call may be made again.
        """
        final = self._folder / f"{result.task_id}-{result.attempt}"
        with disk_errors(f"the update of task {result.task_id} cannot be kept", self._folder):
            if final.exists():  # parts are immutable on the wire, so what was kept first is what counts
                sync_folder(self._folder)
                kept = self._open(final)[1]
                if kept.result.trained_from(result.weights_digest):
                    return kept
                self._set_aside_other(kept, result.weights_digest)
            for part in result.parts:
                _check_size(parts / part_name(part.part), part)
            # First of all: a folder with this file in it is found by `recover`, whatever happens from here on.
            self._seal(parts / _ENTRY, _Sealed(self._next_sequence(), result))
            for part in result.parts:
                _sync_file(parts / part_name(part.part))
            parts.rename(final)
            sync_folder(self._folder)
        self._verified.add(final.name)  # the trainer has hashed what it wrote
        return Entry(final, result)

    def recover(self, parts: Path) -> bool:
        """Takes over a folder that a trainer has filled, whether or not a `put` has sealed it by then.

        Returns whether it was one.

        Raises:
            DiskError: it cannot be read or moved now.
        """
        sealed = parts / _ENTRY
        try:
            result = _read_sealed(sealed).result if sealed.exists() else trained_result(parts)
            if result is None:
                return False
            self._verified.discard(self.put(result, parts).folder.name)  # who knows what has happened since
        except DiskError:
            raise
        except StateError as error:
            _log.error("a trained update cannot be recovered", error=str(error))
            return False
        _log.info("a trained update was recovered", task=result.task_id)
        return True

    def entries(self) -> list[Entry]:
        """Every intact update that waits, oldest first. Damaged ones are moved aside and logged.

        Raises:
            DiskError: the folder cannot be read.
        """
        found: list[tuple[int, Entry]] = []
        with disk_errors("kept updates cannot be listed", self._folder):
            self._sweep()
            folders = [folder for folder in self._folder.iterdir() if not folder.name.startswith(".")]
        for folder in folders:
            if folder.name in self._acknowledged:
                continue
            try:
                found.append(self._open(folder))
            except DiskError as error:
                self._cannot_read(folder, error)
            except StateError as error:
                self._move_damaged(folder, error)
        return [entry for _, entry in sorted(found, key=lambda item: (item[0], item[1].folder.name))]

    def find(self, task_id: str, weights_digest: str) -> Entry | None:
        """The update of a task, of whichever attempt, that waits or that the coordinator would not take before.

        One that was trained from other weights answers another task, though that had the same id: the coordinator goes
        on from a copy of its state. It is set aside.

        Raises:
            DiskError: see `entries`.
        """
        with disk_errors("undelivered updates cannot be listed", self._undelivered):
            for folder in _kept(self._undelivered):
                name = _name_aside(folder)
                target = self._folder / name
                if name.rpartition("-")[0] != task_id or target.exists():
                    continue
                try:
                    answers = _read_sealed(folder / _ENTRY).result.trained_from(weights_digest)
                except StateError as error:
                    _log.error("an update that was set aside cannot be read", error=str(error), folder=str(folder))
                    continue
                if answers:
                    folder.rename(target)
                    sync_folder(self._folder)
        for entry in self.entries():
            if entry.result.task_id == task_id:
                if entry.result.trained_from(weights_digest):
                    return entry
                with disk_errors(f"the update of task {task_id} cannot be moved", self._undelivered):
                    self._set_aside_other(entry, weights_digest)
        return None

    def _set_aside_other(self, entry: Entry, weights_digest: str) -> None:
        held = entry.result.weights_digest
        reason = f"trained from weights {held[:12]}…, its task has {weights_digest[:12]}… now"
        with contextlib.suppress(OSError):
            write_atomically(entry.folder / _REASON, f"{reason}\n".encode())
        where = self._move_aside(entry.folder, self._undelivered)
        _log.warning(
            "a kept update was trained from other weights than its task has now; it is set aside",
            task=entry.result.task_id,
            trained_from=held[:12],
            task_has=weights_digest[:12],
            moved_to=str(where),
        )
        self._drop_oldest(self._undelivered)

    def doubt(self, entry: Entry) -> None:
        """Has `entries` read the update again before it is sent again."""
        self._verified.discard(entry.folder.name)

    def remove(self, entry: Entry) -> None:
        """Deletes an update that was acknowledged or finally refused; later, if the disk does not let it go now."""
        self._acknowledged.add(entry.folder.name)
        self._sweep()
        if entry.folder.name in self._acknowledged:
            _log.warning("a delivered update cannot be deleted yet", folder=str(entry.folder))

    def set_aside(self, entry: Entry, reason: str) -> Path:
        """Takes an update out of the way that the coordinator does not take, and that nobody refused.

        Raises:
            DiskError: it cannot be moved now.
        """
        with disk_errors(f"the update of task {entry.result.task_id} cannot be moved", self._undelivered):
            with contextlib.suppress(OSError):  # the log has it too
                write_atomically(entry.folder / _REASON, f"{reason}\n".encode())
            target = self._move_aside(entry.folder, self._undelivered)
        self._drop_oldest(self._undelivered)
        return target

    def _seal(self, path: Path, sealed: _Sealed) -> None:
        data = msgspec.json.encode(sealed)
        try:
            write_atomically(path, data)
        except OSError as error:
            if error.errno not in _FULL or not self._reserve.exists():
                raise
            self._reserve.unlink()
            write_atomically(path, data)

    def _sweep(self) -> None:
        """Deletes what is acknowledged or half removed, as far as the disk lets it go."""
        for name in tuple(self._acknowledged):
            leaving = self._folder / f".done-{name}"
            shutil.rmtree(leaving, ignore_errors=True)
            # One rename first: a crash in the middle of the deletion must not leave half an update to be sent.
            try:
                (self._folder / name).rename(leaving)
                sync_folder(self._folder)
            except FileNotFoundError:
                pass  # renamed before, and then not synced
            except OSError:
                continue  # `remove` has said so
            self._acknowledged.discard(name)
            self._forget(name)
        for leftover in self._folder.glob(".*"):
            if leftover == self._reserve:
                continue
            shutil.rmtree(leftover, ignore_errors=True)
            with contextlib.suppress(OSError):
                leftover.unlink()

    def _next_sequence(self) -> int:
        numbers = [0]
        for path in self._folder.glob(f"[!.]*/{_ENTRY}"):
            try:
                numbers.append(_read_sealed(path).sequence)
            except StateError:
                continue  # `entries` sets it aside, with its log line
        return max(numbers) + 1

    def _open(self, folder: Path) -> tuple[int, Entry]:
        sealed = _read_sealed(folder / _ENTRY)
        entry = Entry(folder, sealed.result)
        if folder.name != f"{sealed.result.task_id}-{sealed.result.attempt}":
            raise StateError(f"{folder.name} holds task {sealed.result.task_id}, attempt {sealed.result.attempt}")
        if folder.name not in self._verified:  # once per start, and where the coordinator got something else
            for part in sealed.result.parts:
                _verify(entry.part_path(part), part)
            self._verified.add(folder.name)
        self._unread.pop(folder.name, None)
        return sealed.sequence, entry

    def _cannot_read(self, folder: Path, error: DiskError) -> None:
        """A disk that fails once may read it the next time."""
        tries = self._unread[folder.name] = self._unread.get(folder.name, 0) + 1
        _log.error("a kept update cannot be read", error=str(error), tries=tries)
        if tries >= READ_TRIES:
            self._move_damaged(folder, error)

    def _move_damaged(self, folder: Path, error: StateError) -> None:
        """An update that cannot be moved stays, and holds up no other."""
        try:
            target = self._move_aside(folder, self._damaged)
        except OSError as problem:
            if folder.name not in self._stuck:
                _log.error("a kept update is damaged and cannot be moved", error=str(error), problem=str(problem))
            self._stuck.add(folder.name)
            return
        _log.error("a kept update is damaged and was moved aside", error=str(error), moved_to=str(target))
        self._drop_oldest(self._damaged)

    def _move_aside(self, folder: Path, where: Path) -> Path:
        where.mkdir(exist_ok=True)
        kept = _kept(where)
        number = _number_aside(kept[-1]) + 1 if kept else 0
        target = where / f"{folder.name}.{number}"
        folder.rename(target)
        self._forget(folder.name)
        return target

    def _drop_oldest(self, where: Path) -> None:
        for old in _kept(where)[:-KEPT_ASIDE]:
            message = f"{old} is deleted: of the updates in {where} the last {KEPT_ASIDE} are kept"
            _log.warning("the oldest update that was moved aside before is deleted", message=message)
            shutil.rmtree(old, ignore_errors=True)

    def _forget(self, name: str) -> None:
        self._verified.discard(name)
        self._stuck.discard(name)
        self._unread.pop(name, None)


def _kept(where: Path) -> list[Path]:
    """What was moved aside into a folder, oldest first."""
    found = where.iterdir() if where.exists() else ()
    return sorted((path for path in found if _number_aside(path) >= 0), key=_number_aside)


def _name_aside(path: Path) -> str:
    return path.name.rpartition(".")[0]


def _number_aside(path: Path) -> int:
    """NAME.N is the N-th that was moved aside; -1 for what has no number."""
    number = path.name.rpartition(".")[2]
    return int(number) if number.isdecimal() else -1


def _check_size(path: Path, part: PartInfo) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        size = -1
    if size != part.size_bytes:
        held = f"has {size} bytes" if size >= 0 else "is missing"
        raise StateError(f"the trainer promised {path.name} with {part.size_bytes} bytes, but it {held}")


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _nothing_missing() -> Iterator[None]:
    """A file that is not there, or is no file, is damage, which no later try cures."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StateError(f"{error.filename} is missing") from None
    except WrongFileError as error:
        raise StateError(f"{error.filename} {error.strerror}") from None


def _read_sealed(path: Path) -> _Sealed:
    return _read(path, _Sealed)


def _read(path: Path, kind: type[_T]) -> _T:
    try:
        with disk_errors(f"{path.name} cannot be read", path.parent), _nothing_missing():
            return msgspec.json.decode(read_regular(path, MOST_ENTRY_BYTES, follow=False), type=kind)
    except NOT_JSON as error:
        raise StateError(f"{path} is damaged: {error}") from None


def _verify(path: Path, part: PartInfo) -> None:
    with disk_errors(f"{path.name} cannot be read", path.parent), _nothing_missing():
        size = path.lstat().st_size
        if size != part.size_bytes:  # before it is hashed: a file with a hole may seem to have any size
            raise StateError(f"{path} has {size} bytes, expected {part.size_bytes}")
        digest = file_digest(path, follow=False)
    if digest != part.digest:
        raise StateError(f"{path}: sha256 is {digest[:12]}…, expected {part.digest[:12]}…")
