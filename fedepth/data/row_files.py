"""Files whose rows are samples: which of them a data set consists of. No numpy, and none is opened.

A data set is one file, or a folder with files for training and files for tests: `train.csv`, `test.jsonl`,
`train-0001.csv.gz`. Names begin with the words of fedepth.data.splits. A folder with a single such file, whatever its
name, is one for training.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path

import msgspec

from fedepth.data.folders import file_key
from fedepth.data.splits import SPLITS
from fedepth.errors import DataError
from fedepth.printable import printable
from fedepth.task import ModelSpec

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_ZIPPED = ".gz"
_NAMES_SHOWN = 10
_KEYS = 1 << 64


def is_row_file(path: Path) -> bool:
    """Whether a file's name says that its rows are samples."""
    name = path.name.lower().removesuffix(_ZIPPED)
    return name.endswith(SUFFIXES) and not path.name.startswith(".")


def holds_rows(source: Path) -> bool:
    """Whether a data set is one of rows, as far as that can be told before a job says so: a file, a folder with
    `train.csv` or the like, or one with such files and no folder in it, which may be of images.

    Raises:
        DataError: the folder cannot be read.
    """
    if not source.is_dir():
        return source.exists() or is_row_file(source)
    files = _row_files(source)
    return any(_split_of(path) == "train" for path in files) or (bool(files) and not _has_folders(source))


def any_row_files(source: Path) -> bool:
    """Whether there is a file with rows at all.

    Raises:
        DataError: the folder cannot be read.
    """
    return source.exists() if not source.is_dir() else bool(_row_files(source))


def find_rows(source: Path, split: str) -> tuple[Path, ...]:
    """The files of a split, in the order of their names.

    Raises:
        DataError: there are none, or the folder cannot be read.
    """
    if split not in SPLITS:
        raise DataError(f"there is no split {split!r}; splits are {', '.join(SPLITS)}")
    if not source.is_dir():
        if not source.exists():
            raise DataError(f"data file {printable(str(source))} does not exist; correct the setting `data`")
        return (source,)
    files = _row_files(source)
    found = tuple(path for path in files if _split_of(path) == split)
    if not found and split == "train" and len(files) == 1 and not _split_of(files[0]):
        return tuple(files)
    if not found:
        shown = ", ".join(printable(path.name) for path in files[:_NAMES_SHOWN]) or "none"
        raise DataError(
            f"{printable(str(source))} holds no file for {split}: one is called as {split}.csv, or with another of "
            f"{', '.join(SUFFIXES)}, also gzipped; the files with rows there are: {shown}"
        )
    return found


def fingerprint(files: tuple[Path, ...]) -> int:
    """Changes with every file: its path, size and times."""
    return sum(file_key(str(path.resolve()), path.stat()) for path in files) % _KEYS


def asked_of(spec: ModelSpec | None) -> str:
    """A digest of what rows are checked for: columns, classes and their numbers."""
    if spec is None:
        return ""
    asked = (spec.columns, spec.classes, spec.first_label)
    return hashlib.sha256(msgspec.json.encode(asked, order="deterministic")).hexdigest()


def _row_files(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            paths = [folder / entry.name for entry in entries if _is_file(entry)]
    except OSError as error:
        raise DataError(
            f"data directory {printable(str(folder))} cannot be read: {error.strerror}; correct the setting `data` or "
            "the permissions"
        ) from None
    return sorted(filter(is_row_file, paths))


def _has_folders(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".") for entry in entries)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return stat.S_ISREG(entry.stat().st_mode)
    except OSError:  # a link to nothing
        return False


def _split_of(path: Path) -> str:
    """ "train" of `training-03.csv`; empty where the name says nothing."""
    word = re.split(r"[-_. ]", path.name.lower(), maxsplit=1)[0]
    return next((split for split, words in SPLITS.items() if word.rstrip("0123456789") in words), "")
