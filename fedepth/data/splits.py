"""Which folders of a data directory are splits, and which are classes. Standard library only.

A class may be called as a split ("test"), and classes are known only with a job. So a device counts images by folder,
and what the counts mean is decided by this module once the job is known: on the device, and by the coordinator of what
the device reports.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fedepth.data.labels import normalised

SPLITS = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation")}
_NAMES = frozenset(name for names in SPLITS.values() for name in names)


@dataclass(frozen=True)
class Reading:
    """How a directory is read.

    Attributes:
        root: the folder in it that holds the class folders of the split; empty for the directory itself.
        reserved: further folders in it that are splits, and no classes.
    """

    root: str
    reserved: frozenset[str]


def called_as_split(name: str, split: str = "") -> bool:
    """Whether a folder of this name may be a split, or this one."""
    return name.lower() in (SPLITS[split] if split else _NAMES)


def read_as(folders: Mapping[str, Collection[str]], classes: Sequence[str] | None, split: str) -> Reading:
    """How a directory with these folders is read.

    A folder called as a split is one if folders lie in it. Where the job has a class of this name, folders of classes
    have to lie in it. A folder "train" without any is the split all the same where there is no other folder that could
    hold classes, and a folder "test" always, so that somebody is told what it lacks.

    Args:
        folders: in the directory, with the names of the folders in each; these matter only where it is called as a
            split.
        classes: of the job; None if it is not known.
        split: "train" or "test".
    """
    called = {normalised(name) for name in classes or ()}
    may_be_flat = split == "test" or all(called_as_split(name) for name in folders)
    found = {
        name.lower(): name
        for name in sorted(folders, key=str.swapcase, reverse=True)  # "train" before "Train"
        if called_as_split(name, split) and _is_split(name, folders[name], called, may_be_flat)
    }
    root = next((found[name] for name in SPLITS[split] if name in found), "")
    reserved = (name for name in folders if called_as_split(name) and normalised(name) not in called)
    return Reading(root, frozenset(reserved) - {root})


def _is_split(name: str, inner: Collection[str], called: set[str], may_be_flat: bool) -> bool:
    if normalised(name) in called:
        return any(normalised(each) in called for each in inner)
    return bool(inner) or may_be_flat


def images_by_class(names: Sequence[str], counts: Sequence[int], classes: Sequence[str]) -> dict[str, int]:
    """Images of the training split by class folder, from counts by folder.

    Args:
        names: of the folders. One that is called as this split has an entry for every folder in it ("train/cat"), and
            one for the images that lie in none ("train/").
        counts: of the images in each.
        classes: of the job.

    Returns:
        Normalised names of folders, which may be none of the classes, with their images; those without images are not
        in it.
    """
    folders: dict[str, set[str]] = {}
    for name in names:
        top, _, inner = name.partition("/")
        folders.setdefault(top, set()).update({inner} - {""})
    reading = read_as(folders, classes, "train")
    found: Counter[str] = Counter()
    for name, count in zip(names, counts, strict=True):
        top, _, inner = name.partition("/")
        if reading.root and top == reading.root and inner:
            found[normalised(inner)] += count
        elif not reading.root and top not in reading.reserved:
            found[normalised(top)] += count
    return dict(sorted((name, count) for name, count in found.items() if count))
