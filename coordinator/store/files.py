"""The files of a job's state directory: where they lie, how they become durable, how long they stay.

STATE/job.sqlite                                 see records
STATE/weights/round-0000.safetensors             the global weights after each round; 0 is the start
STATE/spool/TASK-ATTEMPT/part-0000.safetensors   parts of updates
STATE/exports/                                   ONNX files
STATE/lock                                       held while a server runs
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import IO

from fedepth.errors import LockedError, StateError
from fedepth.files import file_digest, lock_file, make_durable


def lock_state(directory: Path) -> IO[str]:
    """Takes the state directory for this process, until the file is closed or the process ends.

    Raises:
        StateError: another process has it.
    """
    try:
        return lock_file(directory / "lock")
    except LockedError as error:
        raise StateError(
            f"{directory} is in use by another coordinator (process {error.holder}); stop it, or choose another --state"
        ) from None


class Files:
    """Weights, spools and exports in one state directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def create(self) -> None:
        """Makes the folders that are missing."""
        for folder in ("weights", "spool", "exports"):
            (self._directory / folder).mkdir(parents=True, exist_ok=True)

    def weights(self, round_number: int) -> Path:
        """The global weights after this round."""
        return self._directory / "weights" / f"round-{round_number:04d}.safetensors"

    def partial_weights(self, round_number: int) -> Path:
        """Where the weights of this round are written before they are sealed."""
        return self._directory / "weights" / f"round-{round_number:04d}.partial"

    def export(self, job_name: str, round_number: int) -> Path:
        """The ONNX file of this round."""
        return self._directory / "exports" / f"{job_name}-round-{round_number:04d}.onnx"

    def seal_weights(self, partial: Path, round_number: int) -> tuple[str, int]:
        """Moves new weights to their place and makes them durable. Returns their sha256 (hex) and size in bytes."""
        digest, size = file_digest(partial), partial.stat().st_size
        make_durable(partial)
        path = self.weights(round_number)
        partial.replace(path)
        make_durable(path)
        return digest, size

    def verify_weights(self, round_number: int, recorded_digest: str) -> None:
        """Hashes the weights of this round.

        Raises:
            StateError: they are missing or damaged.
        """
        path = self.weights(round_number)
        if not path.is_file():
            raise StateError(f"{path} is missing, though round {round_number} is recorded; restore it from a backup")
        digest = file_digest(path)
        if digest != recorded_digest:
            raise StateError(
                f"{path} is damaged: its sha256 is {digest[:12]}…, round {round_number} was recorded with "
                f"{recorded_digest[:12]}…; restore it from a backup"
            )

    def spool(self, task_id: str, attempt: int) -> Path:
        """Where the parts of this attempt's update are received."""
        return self._directory / "spool" / f"{task_id}-{attempt}"

    def drop_spool(self, task_id: str, attempt: int) -> None:
        """Deletes the parts of this attempt, if there are any."""
        folder = self.spool(task_id, attempt)
        if folder.exists():
            shutil.rmtree(folder)

    def keep_spools(self, task_ids: Collection[str]) -> None:
        """Deletes every spool but those of these tasks."""
        for folder in (self._directory / "spool").iterdir():
            if folder.name.rpartition("-")[0] not in task_ids:
                shutil.rmtree(folder)
