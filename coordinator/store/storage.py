"""Where the files of a job are kept durably: in the state directory itself, or in a bucket (see `bucket`).

A file is named by its path in the state directory, such as "weights/round-0003-0123456789ab.safetensors", and used
through its local path there, whatever keeps it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

from fedepth.errors import StateError
from fedepth.files import disk_errors, file_digest, make_durable, sync_folder

NOT_WRITTEN = "the state of the job cannot be written"


class Storage(Protocol):
    """Keeps files by name. Every method may be repeated, and raises UnavailableError when it cannot work just now."""

    def keep(self, name: str) -> None:
        """Makes the local file of this name, which is whole, durable."""

    def fetch(self, name: str, digest: str) -> None:
        """Sees that the local file of this name has this sha256 (hex). Hashes it.

        Raises:
            StateError: it is missing or damaged, and there is no sound copy.
        """

    def ready(self, name: str, digest: str) -> None:
        """Sees that a kept file is at its local path, and that a local one is kept, after a start elsewhere.

        Raises:
            StateError: as `fetch`, where the two can differ.
        """

    def holds(self, name: str, size_bytes: int) -> bool:
        """Whether a file of this name and size is kept, or lies here to be kept."""

    def names(self, folder: str) -> set[str]:
        """The names of all kept files in a folder and the folders in it."""

    def rename(self, name: str, new: str) -> None:
        """Gives a kept file another name, unless that has happened already."""

    def remove(self, name: str) -> None:
        """Deletes a file, or a folder with all its files, if it is there."""


class Directory:
    """Keeps files where they lie: in the state directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def keep(self, name: str) -> None:
        path = self._directory / name
        with disk_errors(NOT_WRITTEN, path):
            make_durable(path)

    def fetch(self, name: str, digest: str) -> None:
        path = self._directory / name
        if not path.is_file():
            raise StateError(f"{path} is missing")
        found = file_digest(path)
        if found != digest:
            raise StateError(f"{path} is damaged: its sha256 is {found[:12]}…, recorded is {digest[:12]}…")

    def ready(self, name: str, digest: str) -> None:
        pass  # the local path is where it is kept

    def holds(self, name: str, size_bytes: int) -> bool:
        path = self._directory / name
        return path.is_file() and path.stat().st_size == size_bytes

    def names(self, folder: str) -> set[str]:
        found = (self._directory / folder).rglob("*")
        return {path.relative_to(self._directory).as_posix() for path in found if path.is_file()}

    def rename(self, name: str, new: str) -> None:
        path, target = self._directory / name, self._directory / new
        if path.exists() and not target.exists():
            with disk_errors(NOT_WRITTEN, target):
                path.replace(target)
                make_durable(target)

    def remove(self, name: str) -> None:
        path = self._directory / name
        with disk_errors(NOT_WRITTEN, path):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            sync_folder(path.parent)
