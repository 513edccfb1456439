"""The state directory: who this device is, one agent at a time, and small things to remember."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec
import structlog

from fedepth.errors import LockedError, StateError
from fedepth.files import NOT_JSON, disk_errors, lock_file, open_regular, read_regular, write_atomically

T = TypeVar("T")
_log = structlog.get_logger()

_MOST_ID_BYTES = 100
_MOST_REMEMBERED_BYTES = 1 << 20


class StateLock:
    """Held while an agent runs: two agents on one state directory would deliver each other's updates.

    The kernel drops the lock when the process ends, however it ends.
    """

    def __init__(self, state: Path) -> None:
        """Creates the directory if need be, and takes the lock.

        Raises:
            StateError: another agent holds it, or the directory cannot be written.
        """
        try:
            state.mkdir(parents=True, exist_ok=True)
            self._file = lock_file(state / "lock")
        except LockedError as error:
            raise StateError(
                f"{state} is in use by another agent (process {error.holder}); stop it or give another --state"
            ) from None
        except OSError as error:
            raise StateError(f"{state} cannot be used as state directory: {error.strerror}; give --state DIR") from None
        for leftover in state.glob(".*.tmp"):  # of a write that a crash cut short (fedepth.files.replacing)
            with contextlib.suppress(OSError):  # it takes a little space until a later start
                leftover.unlink()

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
        DiskError: it cannot be read or made.
    """
    path = state / "device-id"
    with disk_errors("the device's id cannot be read or made", state):
        if not os.path.lexists(path):
            write_atomically(path, f"{uuid.uuid4()}\n".encode())
        with open_regular(path) as file:
            text = file.read(_MOST_ID_BYTES).decode("ascii", errors="replace").strip()
    try:
        return str(uuid.UUID(text))
    except ValueError:
        message = f"{path} holds {text[:40]!r}, which is not a UUID; delete it to join as a new device"
        raise StateError(message) from None


def adopt_id(state: Path, identifier: str) -> None:
    """Makes this device the one with an id that others know it by.

    Raises:
        StateError: it is another one already.
        OSError: it cannot be written.
    """
    path = state / "device-id"
    if os.path.lexists(path):
        own = device_id(state)
        if own != identifier:
            raise StateError(
                f"this device is {own} already ({path}), and the bundle is for {identifier}; have one made for it: "
                f"fedepth-coordinator certs issue DEVICE --id {own}"
            )
        return
    write_atomically(path, f"{identifier}\n".encode())


def remember(path: Path, value: object) -> None:
    """Keeps a small value as JSON.

    Raises:
        DiskError: it cannot be written. Such values can be learnt again, so that this need not end anything.
    """
    with disk_errors(f"{path.name} cannot be written", path.parent):
        write_atomically(path, msgspec.json.encode(value) + b"\n")


def recall(path: Path, kind: type[T]) -> T | None:
    """What `remember` kept; None if there is nothing that can be read: such values can be learnt again."""
    try:
        return msgspec.json.decode(read_regular(path, _MOST_REMEMBERED_BYTES), type=kind)
    except (OSError, *NOT_JSON) as error:
        if not isinstance(error, FileNotFoundError):
            _log.warning("what was learnt before cannot be read; learning it again", file=str(path), error=str(error))
        return None
