"""The state directory: who this device is, one agent at a time, and small things to remember."""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec

from fedepth.errors import StateError
from fedepth.files import write_atomically

T = TypeVar("T")


class StateLock:
    """Held while an agent runs: two agents on one state directory would deliver each other's updates.

    The kernel drops the lock when the process ends, however it ends.
    """

    def __init__(self, state: Path) -> None:
        """Creates the directory if need be, and takes the lock.

        Raises:
            StateError: another agent holds it, or the directory cannot be written.
        """
        path = state / "lock"
        try:
            state.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+", encoding="ascii")  # noqa: SIM115 - held open as long as the lock
        except OSError as error:
            raise StateError(f"{state} cannot be used as state directory: {error.strerror}; give --state DIR") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "?"
            self._file.close()
            raise StateError(
                f"{state} is in use by another agent (process {holder}); stop it or give another --state"
            ) from None
        for leftover in state.glob(".*.tmp"):  # of a write that a crash cut short (fedepth.files.replacing)
            leftover.unlink()
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def __enter__(self) -> StateLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def device_id(state: Path) -> str:
    """This device's id, made once and kept for ever.

    Raises:
        StateError: the file is damaged. A new id would make this another device, so the operator decides.
    """
    path = state / "device-id"
    if not path.exists():
        write_atomically(path, f"{uuid.uuid4()}\n".encode())
    text = path.read_bytes().decode("ascii", errors="replace").strip()
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise StateError(f"{path} holds {text[:40]!r}, which is no UUID; delete it to join as a new device") from None


def remember(path: Path, value: object) -> None:
    """Keeps a small value as JSON."""
    write_atomically(path, msgspec.json.encode(value) + b"\n")


def recall(path: Path, kind: type[T]) -> T | None:
    """What `remember` kept; None if there is nothing, or it is damaged: such values can be learnt again."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
