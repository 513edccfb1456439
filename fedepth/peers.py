"""Peers: the other models of mutual distillation. They are the device's own from round to round, and never go up.

peers/JOB/ROUND/SLOT-DIGEST.safetensors                    as that round has left them; of each slot the last two
work/TASK-ATTEMPT/peers/JOB/ROUND/SLOT-DIGEST.safetensors  what a trainer leaves, until its update is kept

All that is to be known of a peer stands in its path, so that one rename keeps it. A task begins with peers of a round
before its own. So a task that is trained again gives what it gave, and after a rollback, or a job that begins anew,
nothing is taken from rounds that are no more. A peer that is missing or damaged is left out, and the trainer begins one
anew (fedepth.training.peers).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from fedepth.files import delete, disk_errors, sync_folder
from fedepth.kept_files import damage, entries, make_folder, model_key, number_and_digest
from fedepth.plan import MOST_MODELS
from fedepth.task import Task

ROUNDS_KEPT = 2
_log = structlog.get_logger()


def peers_folder(folder: Path, task: Task) -> Path:
    """Where below `folder` the peers of a task belong."""
    return folder / model_key(task) / f"{task.round:08d}"


class Peers:
    """The peers in `state/peers`. Only one process may use it at a time (see identity.StateLock)."""

    def __init__(self, state: Path, log: Any = _log) -> None:
        """`log` is told what becomes of them."""
        self._folder = state / "peers"
        self._log = log

    def of(self, task: Task) -> tuple[Path | None, ...]:
        """The peers that a task begins with, by slot; None where one is to be begun anew.

        What belongs to another job, or to another model, is deleted, and so is everything if the task's job has none.

        Raises:
            DiskError: the folder cannot be read.
        """
        wanted = min(task.training.mutual, MOST_MODELS) - 1
        job = model_key(task) if wanted > 0 else ""
        with disk_errors("peers cannot be listed", self._folder):
            others = [path for path in entries(self._folder) if path.name != job]
            known = sorted(self._known(self._folder / job), key=lambda each: -each.round) if job else []
        of = "another job, or of another model," if job else "a job that trains one model"
        for path in others:
            self._log.info(f"peers of {of} are deleted", folder=str(path))
            delete(path)
        for each in known:
            if each.slot > wanted:
                delete(each.path)
        earlier = [each for each in known if each.round < task.round]
        found = []
        for slot in range(1, wanted + 1):
            peer = next((each for each in earlier if each.slot == slot and self._is_sound(each, task)), None)
            if peer and slot < task.plan.models:  # the others wait for a plan that has room for them
                self._log.info("a peer goes on", slot=slot, of_round=peer.round, sha256=peer.digest)
            found.append(peer.path if peer else None)
        return tuple(found)

    def keep(self, left: Path) -> None:
        """Takes over what a trainer has left in `left`, in place of older ones; nothing where nothing is. A second time
        goes on where the first was stopped.

        Raises:
            DiskError: it could not be kept. The same call may be made again.
        """
        with disk_errors("peers cannot be kept", self._folder):
            for job in entries(left):
                for found in list(self._known(job)):
                    target = self._folder / job.name / found.path.parent.name / found.path.name
                    make_folder(target.parent, self._folder, self._log)
                    if target.is_dir():
                        delete(target)
                    found.path.rename(target)
                    for folder in (target.parent, *target.parents[1:3]):
                        sync_folder(folder)
                    self._log.info("peer kept", slot=found.slot, round=found.round, sha256=found.digest)
                    self._drop_others(self._folder / job.name, replace(found, path=target))
        shutil.rmtree(left, ignore_errors=True)

    def drop(self, why: str) -> None:
        """Deletes all: the next task begins with new ones."""
        if os.path.lexists(self._folder):
            self._log.warning("all peers are deleted", reason=why)
            delete(self._folder)

    def _drop_others(self, job: Path, kept: _Known) -> None:
        """Of this slot: what is of its round or a later one, which came of another course of the job, and what is too
        old. And what is no peer."""
        known = list(self._known(job))
        peers = {each.path for each in known}
        of_slot = [each for each in known if each.slot == kept.slot and each.round < kept.round]
        earlier = sorted(of_slot, key=lambda each: -each.round)[: ROUNDS_KEPT - 1]
        stay = {each.path for each in (kept, *earlier, *(each for each in known if each.slot != kept.slot))}
        for folder in entries(job):
            for path in entries(folder) if folder.is_dir() else [folder]:
                if path not in stay:
                    if path not in peers:
                        self._log.warning("it is deleted, since only peers belong there", file=str(path))
                    delete(path)
            with contextlib.suppress(OSError):
                folder.rmdir()  # where nothing is left

    def _is_sound(self, peer: _Known, task: Task) -> bool:
        problem = damage(peer.path, peer.digest, task)
        if problem:
            self._log.warning("a peer is damaged; it is deleted", file=str(peer.path), problem=problem)
            delete(peer.path)
        return not problem

    def _known(self, job: Path) -> Iterator[_Known]:
        for folder in entries(job):
            for path in entries(folder):
                name = number_and_digest(path.name)
                if name and folder.name.isdecimal():
                    yield _Known(path, int(folder.name), *name)


@dataclass(frozen=True)
class _Known:
    """A peer, by its path."""

    path: Path
    round: int
    slot: int
    digest: str
