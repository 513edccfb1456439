"""What is looked at of a data directory before anything in it is read. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

from fedepth.data.folders import ARCHIVES, hidden, is_folder
from fedepth.data.splits import SPLITS, called_as_split
from fedepth.errors import DataError
from fedepth.printable import printable


def check_directory(directory: Path, split: str) -> None:
    """Looks whether there is a directory that can be read, and such a split.

    Raises:
        DataError: there is not.
    """
    if split not in SPLITS:
        raise DataError(f"there is no split {split!r}; splits are {', '.join(SPLITS)}")
    try:
        is_directory, exists = directory.is_dir(), directory.exists()
        if is_directory:
            os.scandir(directory).close()
    except OSError as error:
        raise DataError(
            f"data directory {printable(str(directory))} cannot be read: {error.strerror}; correct the setting `data` "
            "or the permissions"
        ) from None
    if not is_directory:
        if exists and directory.suffix.lower() in ARCHIVES:
            raise DataError(
                f"data directory {printable(str(directory))} is an archive; unpack it, and name the folder with the "
                "setting `data`"
            )
        what = "is not a directory" if exists else "does not exist"
        raise DataError(f"data directory {printable(str(directory))} {what}; correct the setting `data`")


def folders_in(directory: Path) -> dict[str, list[str]]:
    """The folders in a directory, and of those that are called as splits the folders in each; no hidden ones."""
    return {name: folder_names(directory / name) if called_as_split(name) else [] for name in folder_names(directory)}


def folder_names(directory: Path) -> list[str]:
    """The folders in a directory but hidden ones. None in a directory that cannot be read, which the walk names."""
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.name for entry in entries if not hidden(entry.name) and is_folder(entry))
    except OSError:
        return []
