"""What a data directory holds: its layout, and how many samples of each class. Standard library only.

Two layouts are understood. "idx": IDX files, see fedepth.data.idx_sets. "folders": `CLASS/**/*.jpg` below the directory
or its `train` folder; the test split lies in a folder `test` or `val`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from fedepth.data import row_files
from fedepth.data.directories import check_directory, folder_names, folders_in
from fedepth.data.folders import LeftOut, Picture, Walk, file_key
from fedepth.data.idx import IdxFile
from fedepth.data.idx_sets import IdxPair, find_idx, picture_beside
from fedepth.data.labels import labels_outside, normalised, unknown_names
from fedepth.data.splits import SPLITS, called_as_split, images_by_class, read_as
from fedepth.errors import DataError
from fedepth.printable import printable, visible
from fedepth.task import MOST_CLASSES, MOST_NAMES_BYTES, ModelSpec

_NAMES_SHOWN = 10
_KEYS = 1 << 64
_NAME_COSTS = 8  # bytes of a message, beside the name
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


def left_out(source: Path, spec: ModelSpec, split: str) -> tuple[LeftOut, ...]:
    """What lies in the data of a job and is not taken of a split.

    Raises:
        DataError: the data cannot be read.
    """
    if spec.columns is not None:
        return row_files.left_out(source, split)
    return () if find_idx(source, split) is not None else scan(source, spec.classes, split).left_out


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
    if classes is None:
        _check_can_be_classes(walk.root, [*found], [*folders])
    if not found and not any(folders.values()):
        raise NoImagesError(walk)
    return DataSummary(
        sample_count=sum(found.values()),
        class_counts=tuple(found.values()),
        layout="folders",
        classes=tuple(found),
        left_out=walk.left_out,
        damaged=len(walk.damaged),
        notes=(*_merged(walk), *_open_questions(directory, folders), *_one_level_up(walk, found)),
        fingerprint=fingerprint,
        damaged_keys=frozenset(walk.damaged),
        folders=folders,
    )


def _check_can_be_classes(root: Path, names: Sequence[str], further: Sequence[str]) -> None:
    """Raises DataError if no job can have so many classes; nor could they be told to a coordinator."""
    count = max(len(names), len(further))
    size = sum(len(printable(name).encode()) + _NAME_COSTS for name in (*names, *further))
    if count > MOST_CLASSES or size > MOST_NAMES_BYTES:
        example = visible((*names, *further)[0])
        raise DataError(
            f"{printable(str(root))} has {count} folders with images, such as {example}, and each would be a class; a "
            f"job has at most {MOST_CLASSES}, with names of {MOST_NAMES_BYTES >> 10} KiB together: name "
            "the folder in which the folders of classes lie with the setting `data`"
        )


def _by_folder(
    directory: Path, split: str, walk: Walk, found: Mapping[str, int], further: Iterable[Picture]
) -> dict[str, int]:
    """Images by folder, where a folder's name leaves open whether it is a split (`DataSummary.folders`)."""
    inside = "" if walk.root == directory else f"{walk.root.name}/"
    counts: Counter[str] = Counter()
    for top, inner in folders_in(directory).items():
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


def _open_questions(directory: Path, folders: Mapping[str, int]) -> tuple[str, ...]:
    """Of folders that a job may make classes of: those that hold images, and no folders."""
    flat = [name for name, inner in folders_in(directory).items() if called_as_split(name) and not inner]
    counts = {name: folders.get(name, 0) + folders.get(f"{name}/", 0) for name in flat} if folders else {}
    return tuple(
        f"folder {visible(name)} (images: {count}) counts for a job that has such a class; to others it is a split"
        for name, count in counts.items()
        if count
    )


def _one_level_up(walk: Walk, found: Mapping[str, int]) -> tuple[str, ...]:
    """Where all images lie in folders of one folder, these may be what is meant by classes."""
    if len(walk.names) != 1 or not found:
        return ()
    name = next(iter(walk.names.values()))[0]
    inner = folder_names(walk.root / name)
    if len(inner) < 2:
        return ()
    return (
        f"folder {visible(name)} counts as one class; if the folders in it are classes, such as {visible(inner[0])}, "
        f"name {printable(str(walk.root / name))} with the setting `data`",
    )


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
            raise DataError(
                f"{printable(str(walk.root))} has {unknown}; rename what is misspelt, move the rest away"
                f"{_deeper(walk, classes)}"
            )
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
    check_directory(directory, split)
    folders = folders_in(directory)
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
    check_directory(directory, split)
    folders = folders_in(directory)
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
    if walk.loose:
        message += "; labels are read from the names of folders, not from a file or from names of images"
    rows = [str(row) for row in walk.left_out[:_NAMES_SHOWN]]
    return f"{message}; it does hold {'; '.join(rows)}" if rows else message


def _deeper(walk: Walk, classes: Sequence[str]) -> str:
    """Names a folder that holds folders of the job's classes, if there is one."""
    known = {normalised(name) for name in classes}
    for name in (each for called in walk.names.values() for each in called):
        inner = folder_names(walk.root / name)
        if any(normalised(each) in known or called_as_split(each) for each in inner):
            return f", or name {printable(str(walk.root / name))}, in which folders of classes lie"
    return ""


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
    picture = picture_beside(directory, split, pair)
    beside = (f"images in folders beside these files, such as {picture}, are not read",) if picture else ()
    return DataSummary(
        sample_count=len(labels),
        class_counts=tuple(counts[first_label + place] for place in range(len(names))),
        layout="idx",
        classes=names,
        notes=(f"reading {pair.images} and {pair.labels.name}", *beside),
        fingerprint=sum(file_key(str(path), path.stat()) for path in pair) % _KEYS,
    )
