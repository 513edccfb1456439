"""Looks for damaged image files before anything is trained on them. numpy and PIL: in a process of its own.

A file is opened and its end looked at, which is cheap (benchmarks.data_check). Where its end says that something is
missing, or its format has no end, it is decoded. Damage in the middle of a file is found when it is decoded for the
first time; then all files are (`decode`).
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from fedepth.data.damage import Damage, load_damage, load_sound, save_damage
from fedepth.data.decode import check_image, decode_image
from fedepth.data.scan import further_folders, walk_folders
from fedepth.errors import DataError

_TAIL_BYTES = 16
_SMALL = (3, 8, 8)


def check_data(
    directory: Path, record: Path, *, decode: bool = False, on_progress: Callable[[int], None] = lambda files: None
) -> Damage:
    """Checks the image files of the training split that were not checked before, and records what it finds.

    Args:
        record: see fedepth.data.damage.
        decode: decode them, also those that were only looked at before. Once done, it is done at every later check.
        on_progress: is told after every file how many were gone through.

    Raises:
        DataError: the directory cannot be read.
    """
    before = load_damage(record)
    decode = decode or before.decoded
    known: array[int] = load_sound(record) if before.decoded or not decode else array("Q")
    sound: array[int] = array("Q")
    damaged: dict[int, str] = {}
    for number, (path, key) in enumerate(_files(directory), 1):
        # What was damaged is tried once more: a disk or a share may have failed for a moment only.
        again = key in before.damaged
        if _holds(known, key) or _is_sound(path, key, decode or again, damaged):
            sound.append(key)
        on_progress(number)
    sound = array("Q", sorted(sound))
    found = Damage(damaged, sum(sound) % (1 << 64), decode)
    try:
        save_damage(record, found, sound)
    except OSError as error:
        return replace(found, unsaved=f"{error.filename or record}: {error.strerror or error}")
    return found


def _files(directory: Path) -> Iterator[tuple[Path, int]]:
    """The image files that some job's training may take, with their keys."""
    for walk in (walk_folders(directory, None, "train"), further_folders(directory, "train")):
        if walk is not None:
            for picture in walk:
                yield walk.root / picture.path, picture.key


def _is_sound(path: Path, key: int, decode: bool, damaged: dict[int, str]) -> bool:
    try:
        check_image(path)
        if decode or not _ends_well(path):
            decode_image(path, _SMALL)
    except DataError as error:
        damaged[key] = str(error)
        return False
    return True


def _ends_well(path: Path) -> bool:
    """Whether the last bytes are those of a whole file. False where they may be and may not."""
    with open(path, "rb") as file:
        head = file.read(_TAIL_BYTES)
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - _TAIL_BYTES))
        tail = file.read()
    if head.startswith(b"\xff\xd8"):
        return tail.endswith(b"\xff\xd9")
    if head.startswith(b"\x89PNG"):
        return tail.endswith(b"IEND\xae\x42\x60\x82")
    if head.startswith(b"GIF8"):
        return tail.endswith(b";")
    if head.startswith(b"RIFF"):
        return int.from_bytes(head[4:8], "little") + 8 <= size
    if head.startswith(b"BM"):
        return int.from_bytes(head[2:6], "little") == size
    return False


def _holds(keys: array[int], key: int) -> bool:
    place = bisect_left(keys, key)
    return place < len(keys) and keys[place] == key
