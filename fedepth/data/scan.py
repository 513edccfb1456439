"""What a data directory holds: its layout, and how many samples of each class. Standard library only.

Two layouts are understood. "idx": `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, gzipped or not;
the test split's names begin with `t10k` or `test`. "folders": `CLASS/*.jpg` below the directory or its
`train` folder; the test split lies in a folder `test` or `val`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fedepth.data.idx import IdxFile
from fedepth.errors import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
_IDX_PREFIXES = {"train": ("train",), "test": ("t10k", "test")}
_FOLDERS = {"train": ("train",), "test": ("test", "val")}
_NAMES_SHOWN = 10
T = TypeVar("T")


@dataclass(frozen=True)
class DataSummary:
    """What a scan found.

    Attributes:
        sample_count: labelled images.
        class_counts: how many of each class, in label order.
        layout: "idx" or "folders".
        classes: the names behind `class_counts`: the job's, or else the folders' names or label values.
    """

    sample_count: int
    class_counts: tuple[int, ...]
    layout: str
    classes: tuple[str, ...]


def scan(directory: Path, classes: Sequence[str] | None, split: str = "train") -> DataSummary:
    """Counts the samples in a directory, without decoding an image.

    Args:
        directory: see the module.
        classes: the job's class names in label order; None takes what is there.
        split: "train" or "test".

    Raises:
        DataError: the directory is missing, holds no images, holds labels outside `classes`, or is damaged.
    """
    idx = find_idx(directory, split)
    if idx is not None:
        return _scan_idx(*idx, classes)
    found = _by_class(directory, classes, split, lambda files: sum(1 for _ in files))  # none of them is kept
    return DataSummary(
        sample_count=sum(found.values()),
        class_counts=tuple(found.values()),
        layout="folders",
        classes=tuple(found),
    )


def find_idx(directory: Path, split: str) -> tuple[Path, Path] | None:
    """The IDX files (images, labels) of a split; None if the directory has another layout.

    Raises:
        DataError: the directory is missing, there is no such split, or one of the two files is missing.
    """
    _check_directory(directory, split)
    for prefix in _IDX_PREFIXES[split]:
        images = _first_file(directory, f"{prefix}-images-idx3-ubyte")
        labels = _first_file(directory, f"{prefix}-labels-idx1-ubyte")
        if images and labels:
            return images, labels
        if images or labels:
            missing = "labels-idx1" if images else "images-idx3"
            raise DataError(f"{directory} holds {(images or labels)} but no {prefix}-{missing}-ubyte[.gz]")
    return None


def find_folders(directory: Path, classes: Sequence[str] | None, split: str) -> dict[str, list[Path]]:
    """The image files of a split by class, in label order, sorted by name; a class without images has none.

    Raises:
        DataError: there are no images, or folders with images that are not classes of the job.
    """
    return _by_class(directory, classes, split, sorted)


def _by_class(
    directory: Path, classes: Sequence[str] | None, split: str, take: Callable[[Iterator[Path]], T]
) -> dict[str, T]:
    """What `take` makes of the image files of every class, in label order; of a class without images too."""
    _check_directory(directory, split)
    root = _split_root(directory, classes or (), split)
    reserved = {name for names in _FOLDERS.values() for name in names} if root == directory else set()
    reserved -= set(classes or ())
    found = {name: take(iter(())) for name in classes or ()}
    unknown: list[str] = []
    for folder in sorted(root.iterdir()):
        if not folder.is_dir() or folder.name.startswith(".") or folder.name in reserved:
            continue
        files = take(file for file in folder.iterdir() if _is_image(file))
        if not files:
            continue
        if classes is not None and folder.name not in found:
            unknown.append(folder.name)
        found[folder.name] = files
    if unknown:
        raise DataError(
            f"{root} has folders {_listed(unknown)} that are not classes of the job ({_listed(classes or ())}); "
            "rename them or move them away"
        )
    if not any(found.values()):
        raise DataError(
            f"{root} holds no images: expected are folders, one for each class, with files "
            f"*{', *'.join(sorted(IMAGE_SUFFIXES))}, or train-images-idx3-ubyte and train-labels-idx1-ubyte"
        )
    return found


def check_pair(images: IdxFile, labels: IdxFile) -> None:
    """Raises DataError if the counts of images and labels differ, or if there are none."""
    if len(images) != len(labels):
        raise DataError(
            f"{images.path} holds {len(images)} images, {labels.path} {len(labels)} labels; "
            "they belong to different data sets"
        )
    if not len(images):
        raise DataError(f"{images.path} holds no images")


def check_labels(path: Path, labels: Sequence[int], classes: Sequence[str]) -> None:
    """Raises DataError if a label value is not an index into `classes`."""
    outside = [str(label) for label in labels if label >= len(classes)]
    if outside:
        raise DataError(
            f"{path} has labels {_listed(outside)}; the job has the {len(classes)} classes "
            f"{_listed(classes)}, that is labels 0 to {len(classes) - 1}"
        )


def _scan_idx(images_path: Path, labels_path: Path, classes: Sequence[str] | None) -> DataSummary:
    labels = IdxFile(labels_path, 1)
    check_pair(IdxFile(images_path, 3), labels)
    counts: Counter[int] = Counter()
    for piece in labels.pieces():
        counts.update(piece)
    names = tuple(classes) if classes is not None else tuple(map(str, range(max(counts) + 1)))
    check_labels(labels_path, sorted(counts), names)
    return DataSummary(
        sample_count=len(labels),
        class_counts=tuple(counts[label] for label in range(len(names))),
        layout="idx",
        classes=names,
    )


def _check_directory(directory: Path, split: str) -> None:
    if split not in _FOLDERS:
        raise DataError(f"there is no split {split!r}; splits are {', '.join(_FOLDERS)}")
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise DataError(f"data directory {directory} {what}; correct the setting `data`")


def _split_root(directory: Path, classes: Sequence[str], split: str) -> Path:
    for name in _FOLDERS[split]:
        if name not in classes and (directory / name).is_dir():
            return directory / name
    if split == "test":
        raise DataError(f"{directory} holds no test split: no folder test or val, no t10k-images-idx3-ubyte")
    return directory


def _first_file(directory: Path, name: str) -> Path | None:
    return next((path for path in (directory / name, directory / f"{name}.gz") if path.is_file()), None)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{shown} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else shown
