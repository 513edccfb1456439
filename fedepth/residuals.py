"""Residuals: what an encoding has left out of a device's updates, and is added to its next one (fedepth.encoding).

residuals/JOB/ROUND-TASK-ATTEMPT/N-DIGEST.safetensors                    as that task has left them
work/TASK-ATTEMPT/residuals/JOB/ROUND-TASK-ATTEMPT/N-DIGEST.safetensors  what a trainer leaves, until its update is kept

There is one folder at most, no larger than the model. It replaces the one before when its update is kept, since that
update holds what was left out before. What an update has left out lives as long as the update
counts: if the coordinator refuses it, or it is lost and its task is given again, the next one begins without. Nor is
anything taken over from another job or model, another encoding, or a round that is no more. A file that is missing or
damaged is left out: of its tensors no more is lost than one rounding.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import structlog

from fedepth.files import delete, disk_errors, sync_folder
from fedepth.kept_files import damage, entries, make_folder, model_key, number_and_digest
from fedepth.layout import Encoding
from fedepth.task import Result, Task

_NAME = re.compile(r"([0-9]{8,20})-.+")
_log = structlog.get_logger()


def residuals_folder(folder: Path, task: Task) -> Path:
    """Where below `folder` what a task leaves out belongs."""
    return folder / _job(task) / _name(task.round, task.task_id, task.attempt)


class Residuals:
    """What lies in `state/residuals`. Only one process may use it at a time (see identity.StateLock)."""

    def __init__(self, state: Path, log: Any = _log) -> None:
        """`log` is told what becomes of it."""
        self._folder = state / "residuals"
        self._log = log
        self._refused = ""  # the last that was dropped, should it not be kept by then

    def of(self, task: Task) -> tuple[Path, ...]:
        """The files that a task begins with. What it has no use for is deleted.

        Raises:
            DiskError: the folder cannot be read.
        """
        wanted = task.training.encoding is Encoding.INT8
        job = self._folder / _job(task)
        with disk_errors("residuals cannot be listed", self._folder):
            for path in entries(self._folder):
                if path != job or not wanted:
                    self._delete(path, "it is of another job, model or encoding")
            held = [(number, path) for path in entries(job) if (number := _round(path)) is not None] if wanted else []
            for number, path in held:
                if number >= task.round:
                    self._delete(path, f"its update does not count in round {task.round}")
            earlier = sorted((number, path) for number, path in held if number < task.round)
            for _, path in earlier[:-1]:  # where a disk did not let it go
                delete(path)
            files = entries(earlier[-1][1]) if earlier else []
        return tuple(path for path in files if self._is_sound(path, task))

    def keep(self, left: Path) -> None:
        """Takes over what a trainer has left in `left`, in place of what was there; nothing where nothing is. A second
        time goes on where the first was stopped.

        Raises:
            DiskError: it could not be kept. The same call may be made again.
        """
        with disk_errors("residuals cannot be kept", self._folder):
            for job in entries(left):
                for found in entries(job):
                    if found.name == self._refused:
                        continue
                    target = self._folder / job.name / found.name
                    make_folder(target.parent, self._folder, self._log)
                    # First, so that there are never two: the update, which holds what they hold, is kept by now.
                    for other in entries(target.parent):
                        if other.is_dir() and not other.is_symlink():
                            shutil.rmtree(other)
                        else:
                            other.unlink()
                    found.rename(target)
                    for folder in (target.parent, *target.parents[1:3]):
                        sync_folder(folder)
                    self._log.info("residual kept", of=target.name)
        shutil.rmtree(left, ignore_errors=True)

    def drop(self, result: Result) -> None:
        """Deletes what an update has left out that was refused."""
        name = self._refused = _name(result.round, result.task_id, result.attempt)
        for job in entries(self._folder):
            if (job / name).exists():
                self._delete(job / name, "its update was refused")

    def clear(self, why: str) -> None:
        """Deletes all there is."""
        if os.path.lexists(self._folder):
            self._delete(self._folder, why)

    def _is_sound(self, path: Path, task: Task) -> bool:
        name = number_and_digest(path.name)
        problem = damage(path, name[1], task) if name else "its name is none of a residual"
        if problem:
            self._log.warning("a residual is damaged; it is deleted", file=str(path), problem=problem)
            delete(path)
        return not problem

    def _delete(self, path: Path, why: str) -> None:
        self._log.info("a residual is deleted", folder=str(path), reason=why)
        delete(path)


def _job(task: Task) -> str:
    return model_key(task, task.training.encoding.value)


def _name(number: int, task_id: str, attempt: int) -> str:
    return f"{number:08d}-{task_id}-{attempt}"


def _round(path: Path) -> int | None:
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else None
