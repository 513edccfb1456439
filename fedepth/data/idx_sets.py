"""The IDX files of a data directory, under the names that people have. Standard library only.

Pairs such as `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, gzipped or not, or `train-images.idx3-ubyte`,
`emnist-letters-train-images-idx3-ubyte`, in the directory or up to two levels down (`MNIST/raw`); the names of a test
split have `t10k` or `test` instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fedepth.data.directories import check_directory, folders_in
from fedepth.data.folders import Walk, is_folder
from fedepth.data.splits import SPLITS, read_as
from fedepth.errors import DataError
from fedepth.printable import printable

_IDX_SPLITS = {"train": ("train",), "test": ("t10k", "test")}
_IDX_NAME = re.compile(
    r"(?:(?P<set>.+)[-_.])?(?P<split>train|t10k|test)[-_.](?P<kind>images|labels)[-_.]idx[1-4](?:[-_.][a-z0-9]+)?"
    r"(?P<zipped>\.gz)?",
    re.IGNORECASE,
)
_IDX_LEVELS = 2
_SPLIT_WORDS = re.compile("|".join(("t10k", *sorted((w for names in SPLITS.values() for w in names), key=len)[::-1])))
_NAMES_SHOWN = 10


class IdxPair(NamedTuple):
    """The two files of an IDX data set."""

    images: Path
    labels: Path


def find_idx(directory: Path, split: str) -> IdxPair | None:
    """The IDX files (images, labels) of a split; None if the directory has another layout.

    Raises:
        DataError: the directory is missing or cannot be read, there is no such split, one of the two files is missing,
            or there are several such sets.
    """
    check_directory(directory, split)
    sets = _idx_sets(directory)
    found = {place: files for place, files in sets.items() if place.split in _IDX_SPLITS[split]}
    if not found:
        return None
    if len(found) > 1:
        raise DataError(
            f"{printable(str(directory))} holds {len(found)} data sets for {split}: {_listed(_examples(found))}; "
            "move all but one away, or name the folder of one"
        )
    ((place, files),) = found.items()
    if len(files) == 1:
        ((kind, path),) = files.items()
        missing = "labels-idx1" if kind == "images" else "images-idx3"
        full = f"{place.prefix}-{place.split}" if place.prefix else place.split
        raise DataError(
            f"{printable(str(path.parent))} holds {printable(path.name)} but no {full}-{missing}-ubyte[.gz]"
        )
    pair = IdxPair(files["images"], files["labels"])
    _check_other_split(directory, split, place, sets)
    folder = pair.images.parent
    if folder != directory and (picture := picture_beside(directory, split, pair)):
        raise DataError(
            f"{printable(str(directory))} holds class folders with images, such as {printable(picture)}, and an IDX "
            f"data set in {printable(str(folder))}; name that folder to read the set, or move it away to read the "
            "images"
        )
    return pair


class _Place(NamedTuple):
    """Where an IDX set lies, and what it is called: "emnist-letters" and "train"."""

    folder: Path
    prefix: str
    split: str


def _idx_sets(directory: Path) -> dict[_Place, dict[str, Path]]:
    """The IDX files in and below a directory: of each set the paths of "images" and "labels"."""
    found: dict[_Place, dict[str, Path]] = {}
    for folder in _near_folders(directory):
        for entry in sorted(os.listdir(folder)):  # noqa: PTH208 - names, of which there may be a million
            name = _IDX_NAME.fullmatch(entry)
            path = folder / entry
            if name is None or not path.is_file():
                continue
            place = _Place(folder.resolve(), (name["set"] or "").lower(), name["split"].lower())
            files, kind = found.setdefault(place, {}), name["kind"].lower()
            if kind not in files or files[kind].suffix.lower() == ".gz":  # unpacked ones can be read at any place
                files[kind] = path
    return found


def _check_other_split(directory: Path, split: str, place: _Place, sets: Mapping[_Place, dict[str, Path]]) -> None:
    """Whether the one set of a split and those of the other may belong together: by name and, but for words such as
    "train", by folder.

    Raises:
        DataError: they are of different data sets.
    """

    def identity(other: _Place) -> tuple[str, str]:
        return _SPLIT_WORDS.sub("", str(other.folder).lower()).rstrip("/"), other.prefix

    others = {other: files for other, files in sets.items() if other.split not in _IDX_SPLITS[split]}
    if others and identity(place) not in map(identity, others):
        (other,) = SPLITS.keys() - {split}
        raise DataError(
            f"{printable(str(directory))} holds parts of different data sets: for {split} "
            f"{_listed(_examples({place: sets[place]}))}, for {other} {_listed(_examples(others))}; move what does not "
            "belong there away, or name the folder of one"
        )


def picture_beside(directory: Path, split: str, pair: IdxPair) -> str:
    """An image in a class folder outside the folder of an IDX set, relative to the directory; empty if none is."""
    parts = pair.images.parent.relative_to(directory).parts
    reading = read_as(folders_in(directory), None, split)
    if (parts and reading.root == parts[0]) or (split == "test" and not reading.root):
        return ""
    picture = next(iter(Walk(directory / reading.root, reading.reserved | {*parts[:1]})), None)
    return str(Path(reading.root, picture.path)) if picture else ""


def _examples(sets: Mapping[_Place, dict[str, Path]]) -> list[str]:
    return [str(next(iter(files.values()))) for files in sets.values()]


def _near_folders(directory: Path) -> list[Path]:
    """The directory, and the folders up to two levels down, without links and hidden ones."""
    level, found = [directory], [directory]
    for _ in range(_IDX_LEVELS):
        below: list[Path] = []
        for folder in level:
            try:
                with os.scandir(folder) as entries:
                    inner = sorted(
                        entry.name for entry in entries if is_folder(entry) and not entry.name.startswith(".")
                    )
            except OSError:
                continue  # the walk over class folders names it
            below += [folder / name for name in inner]
        found += below
        level = below
    return [folder for folder in found if os.access(folder, os.R_OK | os.X_OK)]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:_NAMES_SHOWN])
    return f"{shown} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else shown
