"""Files whose rows are samples: which of them a data set consists of. No numpy, and none is opened.

A data set is one file, or a folder with files for training and files for tests: `train.csv`, `test.jsonl`,
`train-0001.csv.gz`. Names begin with the words of fedepth.data.splits. A folder with a single such file, whatever its
name, is one for training.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec

from fedepth.data.folders import ARCHIVES, UNPACK, LeftOut, file_key, gathered, hidden, is_folder, not_a_file
from fedepth.data.splits import SPLITS
from fedepth.errors import DataError
from fedepth.printable import printable
from fedepth.task import ModelSpec

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_ZIPPED = ".gz"
_SPREADSHEETS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")
_NAMED = f"; files with rows are called *{', *'.join(SUFFIXES)}"
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
    files = row_files(source)
    return any(_split_of(path) == "train" for path in files) or (bool(files) and not _has_folders(source))


def any_row_files(source: Path) -> bool:
    """Whether there is a file with rows at all.

    Raises:
        DataError: the folder cannot be read.
    """
    return source.exists() if not source.is_dir() else bool(row_files(source))


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
    files = row_files(source)
    found = _of_split(files, split)
    if not found:
        shown = ", ".join(printable(path.name) for path in files[:_NAMES_SHOWN]) or "none"
        raise DataError(
            f"{printable(str(source))} holds no file for {split}: one is called as {split}.csv, or with another of "
            f"{', '.join(SUFFIXES)}, also gzipped; the files with rows there are: {shown}"
        )
    for path in found:
        if path.suffix.lower() == ".gz" and path.with_suffix("") in found:
            raise DataError(
                f"{printable(str(source))} holds {printable(path.name)} unpacked as well, so that its rows would count "
                "twice; leave one of the two there"
            )
    return found


def left_out(source: Path, split: str) -> tuple[LeftOut, ...]:
    """What lies in a folder of files with rows and is not taken, by reason. Files of other splits are not worth a word.

    Raises:
        DataError: the folder cannot be read.
    """
    if not source.is_dir():
        return ()
    files = row_files(source)
    unused = [path.name for path in files if not _split_of(path) and path not in _of_split(files, split)]
    what = f"a file of no split: call it {split}-….csv, or leave it"
    return gathered([*no_row_files(source), *((what, name) for name in unused)])


def fingerprint(files: tuple[Path, ...]) -> int:
    """Changes with every file: its path, size and times."""
    return sum(file_key(str(path.resolve()), path.stat()) for path in files) % _KEYS


def asked_of(spec: ModelSpec | None) -> str:
    """A digest of what rows are checked for: columns, classes and their numbers. How numbers are scaled is no part."""
    if spec is None:
        return ""
    columns = spec.columns if spec.table is None else replace(spec.table, mean=(), std=())
    asked = (columns, spec.classes, spec.first_label)
    return hashlib.sha256(msgspec.json.encode(asked, order="deterministic")).hexdigest()


def row_files(folder: Path) -> list[Path]:
    """The files with rows in a folder, sorted.

    Raises:
        DataError: the folder cannot be read.
    """
    return sorted(folder / entry.name for entry in _entries(folder) if not _objection(entry))


def no_row_files(folder: Path) -> list[tuple[str, str]]:
    """What else lies there: why it is none, and its name.

    Raises:
        DataError: the folder cannot be read.
    """
    return [(reason, entry.name) for entry in _entries(folder) if (reason := _objection(entry))]


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise DataError(
            f"data directory {printable(str(folder))} cannot be read: {error.strerror}; correct the setting `data` or "
            "the permissions"
        ) from None


def _objection(entry: os.DirEntry[str]) -> str:
    """Why something is not a file with rows; empty if it is one, by its name."""
    reason = hidden(entry.name)
    if reason:
        return reason
    if is_folder(entry):
        return "a folder: only files beside it are read"
    reason = not_a_file(entry)
    if reason or is_row_file(Path(entry.name)):
        return reason
    suffix = Path(entry.name).suffix.lower()
    if suffix in _SPREADSHEETS:
        return "a spreadsheet: save it as CSV"
    if suffix in ARCHIVES:
        return UNPACK
    return f"not a file with rows ({suffix or 'without a suffix'}){_NAMED}"


def _of_split(files: list[Path], split: str) -> tuple[Path, ...]:
    found = tuple(path for path in files if _split_of(path) == split)
    if not found and split == "train" and len(files) == 1 and not _split_of(files[0]):
        return tuple(files)
    return found


def _has_folders(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".") for entry in entries)


def _split_of(path: Path) -> str:
    """ "train" of `training-03.csv`; empty where the name says nothing."""
    word = re.split(r"[-_. ]", path.name.lower(), maxsplit=1)[0]
    return next((split for split, words in SPLITS.items() if word.rstrip("0123456789") in words), "")
