"""The files of a job's state directory: how they are named, and where they lie.

STATE/job.sqlite                                     see records
STATE/model/graph.json                               the job's graph and costs (fedepth.models.traced)
STATE/weights/round-0000-DIGEST.safetensors          the global weights after each round; 0 is the start
STATE/weights/round-0007-DIGEST.aside.safetensors    an average that was not published
STATE/spool/TASK-ATTEMPT/part-0000.safetensors       parts of updates
STATE/exports/                                       ONNX files, and labels.txt with the names of the classes
STATE/lock                                           held while a server runs

DIGEST is the first 12 digits of the sha256: no file of weights ever takes the place of another.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from coordinator.store.storage import NOT_WRITTEN, Directory, Storage
from fedepth.errors import LockedError, StateError
from fedepth.files import disk_errors, file_digest, lock_file, make_durable

GRAPH = "model/graph.json"
LABELS = "exports/labels.txt"

_FOLDERS = ("model", "weights", "spool", "exports")
_WEIGHTS = re.compile(r"weights/round-(\d{4,})(-[0-9a-f]{12}(\.aside)?)?\.safetensors")


def lock_state(directory: Path) -> IO[str]:
    """Takes the state directory for this process, until the file is closed or the process ends.

    Raises:
        StateError: another process has it.
    """
    try:
        with disk_errors(NOT_WRITTEN, directory):
            return lock_file(directory / "lock")
    except LockedError as error:
        raise StateError(
            f"{directory} is in use by another coordinator (process {error.holder}); stop it, or choose another --state"
        ) from None


def weights_name(round_number: int, digest: str) -> str:
    return f"weights/round-{round_number:04d}-{digest[:12]}.safetensors"


def aside_name(round_number: int, digest: str) -> str:
    """The name of an average that was not published."""
    return f"weights/round-{round_number:04d}-{digest[:12]}.aside.safetensors"


def first_weights_name(round_number: int) -> str:
    """What weights were named before names had digests."""
    return f"weights/round-{round_number:04d}.safetensors"


def part_name(task_id: str, attempt: int, part: int) -> str:
    return f"spool/{task_id}-{attempt}/part-{part:04d}.safetensors"


def export_name(path: str) -> str:
    """The name of an ONNX file whose path is recorded, wherever the state directory was then."""
    return f"exports/{PurePosixPath(path).name}"


@dataclass(frozen=True)
class WeightsFile:
    """A file that lies among the weights."""

    name: str
    round: int


class Files:
    """The files of one state directory, and what keeps them."""

    def __init__(self, directory: Path, storage: Storage | None = None) -> None:
        self._directory = directory
        self.storage: Storage = Directory(directory) if storage is None else storage

    def create(self) -> None:
        """Makes the folders that are missing."""
        with disk_errors(NOT_WRITTEN, self._directory):
            for folder in _FOLDERS:
                (self._directory / folder).mkdir(parents=True, exist_ok=True)

    def free_bytes(self) -> int:
        """Space left on the disk of the state directory."""
        return shutil.disk_usage(self._directory).free

    def path(self, name: str) -> Path:
        """Where a file of this name is used."""
        return self._directory / name

    def graph(self) -> Path:
        """The traced model that devices are handed."""
        return self.path(GRAPH)

    def weights(self, round_number: int, digest: str) -> Path:
        """The global weights after this round, if it was published."""
        return self.path(weights_name(round_number, digest))

    def partial_weights(self, round_number: int) -> Path:
        """Where the weights of this round are written before they are sealed."""
        return self._directory / "weights" / f"round-{round_number:04d}.partial"

    def export(self, job_name: str, round_number: int) -> Path:
        """The ONNX file of this round."""
        return self._directory / "exports" / f"{job_name}-round-{round_number:04d}.onnx"

    def spool(self, task_id: str, attempt: int) -> Path:
        """Where the parts of this attempt's update are received."""
        return self._directory / "spool" / f"{task_id}-{attempt}"

    def spooled_attempts(self, task_id: str) -> list[int]:
        """The attempts at a task of whose updates something is here, the last one last."""
        folders = (self._directory / "spool").glob(f"{task_id}-*")
        return sorted(int(folder.name.rpartition("-")[2]) for folder in folders)

    def drop_spool(self, task_id: str, attempt: int) -> None:
        """Deletes the parts of this attempt, if there are any."""
        self.storage.remove(f"spool/{task_id}-{attempt}")

    # --- for the store

    def place(self, partial: Path, name: str, digest: str) -> None:
        """Gives new weights their name and makes them durable.

        Raises:
            StateError: a file of this name holds other bytes.
        """
        path = self.path(name)
        if path.exists():
            found = file_digest(path)
            if found != digest:
                raise StateError(
                    f"{path} holds other bytes than the new weights (sha256 {found[:12]}…, not {digest[:12]}…); "
                    "move it away and start again"
                )
            partial.unlink()
        else:
            with disk_errors(NOT_WRITTEN, path):
                make_durable(partial)  # before the name: no crash may leave a file of this name with other bytes
                partial.replace(path)
        self.storage.keep(name)

    def weights_found(self) -> list[WeightsFile]:
        """What lies among the weights and is named as weights are, in the order of the rounds."""
        matches = [_WEIGHTS.fullmatch(name) for name in sorted(self.storage.names("weights"))]
        return [WeightsFile(match[0], int(match[1])) for match in matches if match]

    def spooled_tasks(self) -> dict[str, set[str]]:
        """The names of the spools that hold anything, by their tasks."""
        found: dict[str, set[str]] = {}
        local = {path.relative_to(self._directory).as_posix() for path in self.path("spool").glob("*/*")}
        for name in local | self.storage.names("spool"):
            folder = PurePosixPath(name).parent
            found.setdefault(folder.name.rpartition("-")[0], set()).add(folder.as_posix())
        return found

    def remove_partial(self) -> None:
        """Deletes weights that were being written when the coordinator ended."""
        with disk_errors(NOT_WRITTEN, self._directory):
            for path in self.path("weights").glob("*.partial"):
                path.unlink()

    def remove_all(self, names: Iterable[str]) -> None:
        for name in names:
            self.storage.remove(name)
