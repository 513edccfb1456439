"""Finds what our coroutines do with files and databases in the event loop itself, which then stands still for as long
as a disk, a server or a bucket does.

Whatever a test's own coroutine calls does not count: only what one of ours does, or a callback of the loop.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from coordinator.store.database import Database

ROOT = Path(__file__).parents[2]
_OURS = tuple(str(ROOT / name) for name in ("coordinator", "fedepth", "proto"))
_TESTS = str(ROOT / "tests")
# https://docs.python.org/3/library/audit_events.html
_EVENTS = ("open", "os.", "shutil.", "sqlite3.connect", "tempfile.")
_NOT_FILES = ("os.putenv", "os.unsetenv", "os.posix_spawn", "os.fork", "os.kill", "os.exec", "os.add_dll_directory")
_LOADING = ("<frozen importlib", "linecache.py")  # code, for running and for showing it

_found: list[str] | None = None
_installed = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _found is None or not event.startswith(_EVENTS) or event.startswith(_NOT_FILES):
        return
    # A descriptor, as of a child's pipe, or what the kernel says of a process, is on no disk.
    if event == "open" and (isinstance(arguments[0], int) or os.fsdecode(arguments[0]).startswith("/proc/")):
        return
    look(event)


def look(what: str) -> None:
    """Notes a call, if the event loop of this thread is in it."""
    if _found is None or asyncio._get_running_loop() is None:
        return
    frame: FrameType | None = sys._getframe(1)
    place = ""
    while frame is not None:
        code = frame.f_code
        if any(part in code.co_filename for part in _LOADING):
            return
        ours = code.co_filename.startswith(_OURS)
        if ours and not place:
            place = f"{Path(code.co_filename).relative_to(ROOT)}:{frame.f_lineno} {code.co_name}"
        if code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
            if ours:
                _found.append(f"{what} at {place}, in coroutine {code.co_name}")
                return
            if code.co_filename.startswith(_TESTS):
                return
        frame = frame.f_back
    if place:
        _found.append(f"{what} at {place}, in a callback")


@contextmanager
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Within the block, the list takes what is found."""
    global _found, _installed
    if not _installed:
        sys.addaudithook(_audit)  # it cannot be removed again
        _installed = True
    stat, usage, bounded = Path.stat, shutil.disk_usage, Database._bounded

    def looked_stat(self: Path, **how: Any) -> Any:
        look("stat")
        return stat(self, **how)

    def looked_usage(path: Any) -> Any:
        look("disk_usage")
        return usage(path)

    def looked_bounded(self: Database, *how: Any) -> Any:
        look("database")
        return bounded(self, *how)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", looked_stat)
        patch.setattr(shutil, "disk_usage", looked_usage)
        patch.setattr(Database, "_bounded", looked_bounded)
        _found = found = []
        try:
            yield found
        finally:
            _found = None
