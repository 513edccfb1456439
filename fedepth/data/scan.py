"""What a data directory holds: its layout, and how many samples of each class. Standard library only.

Two layouts are understood. "idx": pairs such as `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, gzipped or
not, under the names that people have (`train-images.idx3-ubyte`, `emnist-letters-train-images-idx3-ubyte`), in the
directory or up to two levels down (`MNIST/raw`); the test split's names have `t10k` or `test` instead. "folders":
`CLASS/**/*.jpg` below the directory or its `train` folder; the test split lies in a folder `test` or `val`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from fedepth.data.folders import LeftOut, Picture, Walk, file_key, hidden
from fedepth.data.idx import IdxFile
from fedepth.data.labels import labels_outside, normalised, unknown_names
from fedepth.data.splits import SPLITS, called_as_split, images_by_class, read_as
from fedepth.errors import DataError
from fedepth.printable import printable, visible
from fedepth.task import MOST_CLASSES

_IDX_SPLITS = {"train": ("train",), "test": ("t10k", "test")}
_IDX_NAME = re.compile(
    r"(?:(?P<set>.+)[-_.])?(?P<split>train|t10k|test)[-_.](?P<kind>images|labels)[-_.]idx[1-4](?:[-_.][a-z0-9]+)?"
    r"(?P<zipped>\.gz)?",
    re.IGNORECASE,
)
_IDX_LEVELS = 2
_SPLIT_WORDS = re.compile("|".join(("t10k", *sorted((w for names in SPLITS.values() for w in names), key=len)[::-1])))
_NAMES_SHOWN = 10
_KEYS = 1 << 64
T = TypeVar("T")


@dataclass(frozen=True)
class DataSummary:
    """What a scan found.

    Attributes:
        sample_count: labelled images.
        class_counts: how many of each class, in label order.
        layout: "idx" or "folders".
        classes: the names behind `class_counts`: the job's, or else the folders' names or label values.
        left_out: what lies there and is not taken.
        damaged: of it, how many image files are empty or damaged.
        notes: what else a person should know: where IDX files were found, which folders count as one class.
        fingerprint: changes with every file that is taken, or would be for a job with other classes.
        damaged_keys: of the files that `damaged` counts.
        folders: where the job is not known and some folder is called as a split, images by folder, as
            `fedepth.data.splits.images_by_class` takes them.
    """

    sample_count: int
    class_counts: tuple[int, ...]
    layout: str
    classes: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()
    damaged: int = 0
    notes: tuple[str, ...] = field(default=(), compare=False)
    fingerprint: int = field(default=0, compare=False)
    damaged_keys: frozenset[int] = field(default=frozenset(), compare=False)
    folders: Mapping[str, int] = field(default_factory=dict)

    def count_for(self, classes: Sequence[str]) -> int:
        """The labelled images, for a job with these classes."""
        if not self.folders:
            return self.sample_count
        return sum(images_by_class([*self.folders], [*self.folders.values()], classes).values())


class IdxPair(NamedTuple):
    """The two files of an IDX data set."""

    images: Path
    labels: Path


def scan(
    directory: Path,
    classes: Sequence[str] | None,
    split: str = "train",
    *,
    first_label: int = 0,
    damage: frozenset[int] = frozenset(),
) -> DataSummary:
    """Counts the samples in a directory, without opening an image.

    Args:
        directory: see the module.
        classes: the job's class names in label order; None takes what is there.
        split: "train" or "test".
        first_label: of IDX labels, the one that stands for the first class. With `classes` None counts begin with
            label 0, whatever it says.
        damage: keys of files that are known to be damaged (fedepth.data.damage).

    Raises:
        DataError: the directory is missing, holds no images, holds labels outside `classes`, or is damaged.
    """
    pair = find_idx(directory, split)
    if pair is not None:
        return _scan_idx(directory, split, pair, classes, first_label)
    fingerprint = 0

    def keyed(pictures: Iterable[Picture]) -> Iterator[Picture]:
        nonlocal fingerprint
        for picture in pictures:  # none of them is kept
            fingerprint = (fingerprint + picture.key) % _KEYS
            yield picture

    def count(pictures: Iterator[Picture]) -> dict[str, int]:
        return Counter(picture.name for picture in keyed(pictures))

    further = further_folders(directory, split, damage) if classes is None else None
    try:
        found, walk = _by_class(directory, classes, split, damage, count, 0)
    except NoImagesError as error:
        if further is None:
            raise
        found, walk = {}, error.walk
    folders = {} if further is None else _by_folder(directory, split, walk, found, keyed(further))
    if not found and not any(folders.values()):
        raise NoImagesError(walk)
    return DataSummary(
        sample_count=sum(found.values()),
        class_counts=tuple(found.values()),
        layout="folders",
        classes=tuple(found),
        left_out=walk.left_out,
        damaged=len(walk.damaged),
        notes=(*_merged(walk), *_open_questions(folders)),
        fingerprint=fingerprint,
        damaged_keys=frozenset(walk.damaged),
        folders=folders,
    )


def _by_folder(
    directory: Path, split: str, walk: Walk, found: Mapping[str, int], further: Iterable[Picture]
) -> dict[str, int]:
    """Images by folder, where a folder's name leaves open whether it is a split (`DataSummary.folders`)."""
    inside = "" if walk.root == directory else f"{walk.root.name}/"
    counts: Counter[str] = Counter()
    for top, inner in _folders(directory).items():
        if called_as_split(top, split):
            counts.update({f"{top}/{normalised(name)}": 0 for name in (*inner, "")})
    counts.update({inside + name: count for name, count in found.items()})
    if inside:
        counts[inside] += walk.loose
    for picture in further:
        top, *rest = picture.path.split("/")
        inner_name = rest[0] if len(rest) > 1 else ""
        counts[f"{top}/{normalised(inner_name)}" if called_as_split(top, split) else normalised(top)] += 1
    return dict(counts)


def _open_questions(folders: Mapping[str, int]) -> tuple[str, ...]:
    """Of folders that a job may make classes of: those that hold images, and no folders."""
    flat = {name.rstrip("/"): count for name, count in folders.items() if count and called_as_split(name.rstrip("/"))}
    return tuple(
        f"folder {visible(name)} with {count} images counts for a job that has such a class; to others it is a split"
        for name, count in flat.items()
        if sum(each.startswith(f"{name}/") for each in folders) < 2
    )


def find_idx(directory: Path, split: str) -> IdxPair | None:
    """The IDX files (images, labels) of a split; None if the directory has another layout.

    Raises:
        DataError: the directory is missing or cannot be read, there is no such split, one of the two files is missing,
            or there are several such sets.
    """
    _check_directory(directory, split)
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
    if folder != directory and (picture := _picture_beside(directory, split, pair)):
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


def _picture_beside(directory: Path, split: str, pair: IdxPair) -> str:
    """An image in a class folder outside the folder of an IDX set, relative to the directory; empty if none is."""
    parts = pair.images.parent.relative_to(directory).parts
    reading = read_as(_folders(directory), None, split)
    if (parts and reading.root == parts[0]) or (split == "test" and not reading.root):
        return ""
    picture = next(iter(Walk(directory / reading.root, reading.reserved | {*parts[:1]})), None)
    return str(Path(reading.root, picture.path)) if picture else ""


def _examples(sets: Mapping[_Place, dict[str, Path]]) -> list[str]:
    return [str(next(iter(files.values()))) for files in sets.values()]


def find_folders(
    directory: Path, classes: Sequence[str] | None, split: str, damage: frozenset[int] = frozenset()
) -> dict[str, list[Path]]:
    """The image files of a split by class, in label order, sorted by path; a class without images has none.

    Raises:
        DataError: there are no images, or folders with images that are not classes of the job.
    """

    def collect(pictures: Iterator[Picture]) -> dict[str, list[str]]:
        files: dict[str, list[str]] = {}
        for picture in pictures:
            files.setdefault(picture.name, []).append(picture.path)
        return files

    none: list[str] = []
    found, walk = _by_class(directory, classes, split, damage, collect, none)
    return {name: [walk.root / path for path in sorted(paths)] for name, paths in found.items()}


def _by_class(
    directory: Path,
    classes: Sequence[str] | None,
    split: str,
    damage: frozenset[int],
    take: Callable[[Iterator[Picture]], dict[str, T]],
    nothing: T,
) -> tuple[dict[str, T], Walk]:
    """What `take` makes of the images by class folder, in label order; of a class without images `nothing`."""
    walk = walk_folders(directory, classes, split, damage)
    try:
        taken = take(iter(walk))
    except OSError as error:
        raise DataError(
            f"data directory {printable(str(walk.root))} cannot be read: {error.strerror}; correct the setting `data` "
            "or the permissions"
        ) from None
    if classes is not None:
        unknown = unknown_names(sorted(name for name in taken if name), classes)
        if unknown:
            raise DataError(f"{printable(str(walk.root))} has {unknown}; rename what is misspelt, move the rest away")
    if not taken:
        raise NoImagesError(walk)
    names = [normalised(name) for name in classes] if classes is not None else sorted(taken)
    called = classes if classes is not None else names
    return {label: taken.get(name, nothing) for label, name in zip(called, names, strict=True)}, walk


def walk_folders(
    directory: Path, classes: Sequence[str] | None, split: str, damage: frozenset[int] = frozenset()
) -> Walk:
    """The walk over the class folders of a split.

    Raises:
        DataError: the directory is missing or cannot be read, or there is no such split.
    """
    _check_directory(directory, split)
    folders = _folders(directory)
    reading = read_as(folders, classes, split)
    if split == "test" and not reading.root:
        raise DataError(
            f"{printable(str(directory))} holds no test split: no folder test or val, no t10k-images-idx3-ubyte"
        )
    if not reading.root:
        walk = Walk(directory, reading.reserved, damage)
        for name in sorted(reading.reserved) if classes is not None else ():
            if called_as_split(name, split):
                walk.leave_out("", f"{name}/", "called as a split, without folders of classes in it")
        return walk
    walk = Walk(directory / reading.root, frozenset(), damage, f"{reading.root}/")
    others = {name for other, names in SPLITS.items() if other != split for name in names}
    for name in folders:
        if name != reading.root and name.lower() not in others:
            walk.leave_out("", f"{name}/", f"beside the folder {visible(reading.root)}, which is read")
    return walk


def further_folders(directory: Path, split: str, damage: frozenset[int] = frozenset()) -> Walk | None:
    """The walk over the folders that a job's classes may make classes of, where `walk_folders` without classes does not
    read them; None where the names of folders leave nothing open.

    Raises:
        DataError: the directory is missing or cannot be read, or there is no such split.
    """
    _check_directory(directory, split)
    folders = _folders(directory)
    if not any(map(called_as_split, folders)):
        return None
    reading = read_as(folders, None, split)
    read = {reading.root} if reading.root else folders.keys() - reading.reserved
    return Walk(directory, frozenset(read), damage)


class NoImagesError(DataError):
    """A walk found nothing to take. It knows what it left out."""

    def __init__(self, walk: Walk) -> None:
        super().__init__(_no_images(walk))
        self.walk = walk


def _no_images(walk: Walk) -> str:
    message = (
        f"{printable(str(walk.root))} holds no images: expected are folders, one for each class, with files "
        "such as *.jpg and *.png, or train-images-idx3-ubyte and train-labels-idx1-ubyte"
    )
    rows = [f"{row.count} × {row.reason}, such as {printable(row.example)}" for row in walk.left_out[:_NAMES_SHOWN]]
    return f"{message}; it does hold {'; '.join(rows)}" if rows else message


def _merged(walk: Walk) -> tuple[str, ...]:
    return tuple(
        f"folders {' and '.join(called)} count as one class: their names differ only in how Unicode writes them"
        for called in walk.names.values()
        if len(called) > 1
    )


def check_pair(images: IdxFile, labels: IdxFile) -> None:
    """Raises DataError if the counts of images and labels differ, or if there are none."""
    if len(images) != len(labels):
        raise DataError(
            f"{images.path} holds {len(images)} images, {labels.path} {len(labels)} labels; "
            "they belong to different data sets"
        )
    if not len(images):
        raise DataError(f"{images.path} holds no images")


def check_labels(path: Path, labels: Sequence[int], classes: Sequence[str], first_label: int = 0) -> None:
    """Raises DataError if a label value, of those that occur, stands for none of `classes`."""
    objection = labels_outside(labels, classes, first_label)
    if objection:
        raise DataError(f"{path} {objection}")


def _scan_idx(
    directory: Path, split: str, pair: IdxPair, classes: Sequence[str] | None, first_label: int
) -> DataSummary:
    labels = IdxFile(pair.labels, 1, any_integers=True)
    check_pair(IdxFile(pair.images, None), labels)
    counts = Counter(labels.values())
    lowest, highest = min(counts), max(counts)
    if lowest < 0 or highest > MOST_CLASSES:
        raise DataError(
            f"{pair.labels} has labels from {lowest} to {highest}; labels count classes, from 0 to at most "
            f"{MOST_CLASSES}"
        )
    if classes is None:
        first_label, names = 0, tuple(map(str, range(highest + 1)))
    else:
        names = tuple(classes)
    check_labels(pair.labels, sorted(counts), names, first_label)
    picture = _picture_beside(directory, split, pair)
    beside = (f"images in folders beside these files, such as {picture}, are not read",) if picture else ()
    return DataSummary(
        sample_count=len(labels),
        class_counts=tuple(counts[first_label + place] for place in range(len(names))),
        layout="idx",
        classes=names,
        notes=(f"reading {pair.images} and {pair.labels.name}", *beside),
        fingerprint=sum(file_key(str(path), path.stat()) for path in pair) % _KEYS,
    )


def _check_directory(directory: Path, split: str) -> None:
    if split not in SPLITS:
        raise DataError(f"there is no split {split!r}; splits are {', '.join(SPLITS)}")
    try:
        is_folder, exists = directory.is_dir(), directory.exists()
        if is_folder:
            os.scandir(directory).close()
    except OSError as error:
        raise DataError(
            f"data directory {printable(str(directory))} cannot be read: {error.strerror}; correct the setting `data` "
            "or the permissions"
        ) from None
    if not is_folder:
        what = "is not a directory" if exists else "does not exist"
        raise DataError(f"data directory {printable(str(directory))} {what}; correct the setting `data`")


def _folders(directory: Path) -> dict[str, list[str]]:
    """The folders in a directory, and of those that are called as splits the folders in each; no hidden ones."""
    return {name: _folder_names(directory / name) if called_as_split(name) else [] for name in _folder_names(directory)}


def _folder_names(directory: Path) -> list[str]:
    """Without hidden ones; none in a directory that cannot be read, which the walk names."""
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.name for entry in entries if not hidden(entry.name) and _is_folder(entry))
    except OSError:
        return []


def _near_folders(directory: Path) -> list[Path]:
    """The directory, and the folders up to two levels down, without links and hidden ones."""
    level, found = [directory], [directory]
    for _ in range(_IDX_LEVELS):
        below: list[Path] = []
        for folder in level:
            try:
                with os.scandir(folder) as entries:
                    inner = sorted(
                        entry.name for entry in entries if _is_folder(entry) and not entry.name.startswith(".")
                    )
            except OSError:
                continue  # the walk over class folders names it
            below += [folder / name for name in inner]
        found += below
        level = below
    return [folder for folder in found if os.access(folder, os.R_OK | os.X_OK)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:_NAMES_SHOWN])
    return f"{shown} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else shown
