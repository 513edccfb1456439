"""A disk that fails at a chosen step, once or for a while."""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedepth import files

STEPS = ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir")


@dataclass
class Disk:
    """Counts steps below `folder`: what changes names, syncs, or opens a file to write to it.

    Attributes:
        fails_from: the first step that fails, counted from 1; 0 for none.
        times: how many fail in a row.
        on_step: called before every step with its number.
        names: what was done, in order.
    """

    folder: Path
    fails_from: int = 0
    times: int = 1
    code: int = 0
    on_step: Callable[[int], None] = lambda number: None
    names: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return 0 < self.fails_from <= len(self.names)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in STEPS:
            patch.setattr(os, name, self._step(name, getattr(os, name)))
        patch.setattr(files, "open", self._open, raising=False)

    def _step(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self._is_mine(args[0]):
                self._take(name, args[0])
            return real(*args, **options)

        return call

    def _open(self, path: Path, mode: str = "r", **options: Any) -> Any:
        if "x" in mode:
            self._take("write", path)
        return builtins.open(path, mode, **options)

    def _is_mine(self, what: Any) -> bool:
        if isinstance(what, int):
            what = Path(f"/proc/self/fd/{what}").readlink()
        path = Path(os.fsdecode(what))
        return not path.is_absolute() or path.is_relative_to(self.folder)  # names below a folder that rmtree has open

    def _take(self, name: str, what: Any) -> None:
        self.names.append(name)
        self.on_step(len(self.names))
        if self.failed and len(self.names) < self.fails_from + self.times:
            raise OSError(self.code, os.strerror(self.code), None if isinstance(what, int) else os.fspath(what))
