"""What of a data set is known to be damaged, kept between starts. Standard library and msgspec.

Of image files there are two: `NAME` in JSON says what is damaged, and is all that an agent and its trainer need;
`NAME.sound` has the keys of the files that were found to be sound, 8 bytes each, so that the next check opens only
those that are new or changed. Of rows in files there is `NAME.rows`: whoever reads them leaves out the same.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from fedepth.data.column_sums import ColumnSums
from fedepth.errors import DataError
from fedepth.files import NOT_JSON, read_regular, write_atomically

MOST_DAMAGED = 0.05
MOST_BYTES = 1 << 28  # of either file: the keys of 33 million files
_SHOWN = 3


@dataclass(frozen=True)
class Damage:
    """What the last check of a data directory found.

    Attributes:
        damaged: what is wrong with a file, by its key (fedepth.data.folders).
        fingerprint: of the sound files; None if nothing was checked yet.
        decoded: every file was decoded, not only looked at.
        unsaved: why this could not be recorded; empty if it was.
    """

    damaged: Mapping[int, str] = field(default_factory=dict)
    fingerprint: int | None = None
    decoded: bool = False
    unsaved: str = ""

    @property
    def keys(self) -> frozenset[int]:
        """Of the damaged files."""
        return frozenset(self.damaged)


@dataclass(frozen=True)
class RowCheck:
    """What the last check of files with rows found.

    Attributes:
        fingerprint: of the files.
        asked: digest of what rows were checked for; "" where no job has said yet which columns count.
        count: rows that are taken.
        class_counts: of them, in label order; empty without a job.
        damaged: rows that are left out.
        examples: what is wrong with the first of these.
        sums: of the numeric columns, where rows of a table were checked for a job.
        unsaved: why this could not be recorded; empty if it was.
    """

    fingerprint: int = 0
    asked: str = ""
    count: int = 0
    class_counts: tuple[int, ...] = ()
    damaged: int = 0
    examples: tuple[str, ...] = ()
    sums: ColumnSums | None = None
    unsaved: str = ""


class RowError(ValueError):
    """A row that cannot be used. The message says why, without its place."""


def load_row_check(path: Path) -> RowCheck | None:
    """The record beside `path`; None if there is none that can be read, since it can be made again."""
    try:
        return msgspec.json.decode(read_regular(_rows_path(path), MOST_BYTES), type=RowCheck)
    except (OSError, *NOT_JSON):
        return None


def save_row_check(path: Path, check: RowCheck) -> None:
    """Replaces the record.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(_rows_path(path), msgspec.json.encode(check))


def load_damage(path: Path) -> Damage:
    """The record at `path`; an empty one if there is none that can be read, since it can be made again."""
    try:
        return msgspec.json.decode(read_regular(path, MOST_BYTES), type=Damage)
    except (OSError, *NOT_JSON):
        return Damage()


def save_damage(path: Path, damage: Damage, sound: array[int]) -> None:
    """Replaces the record.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    swapped = array("Q", sound)
    if sys.byteorder == "big":
        swapped.byteswap()
    write_atomically(_sound_path(path), swapped.tobytes())
    write_atomically(path, msgspec.json.encode(damage))


def load_sound(path: Path) -> array[int]:
    """The keys of the sound files, rising; none if they cannot be read."""
    sound: array[int] = array("Q")
    try:
        sound.frombytes(read_regular(_sound_path(path), MOST_BYTES))
    except (OSError, ValueError):
        return array("Q")
    if sys.byteorder == "big":
        sound.byteswap()
    return sound


def check_share(
    taken: int, damaged: int, most: float, messages: Mapping[int, str], setting: str, what: str = "image files"
) -> None:
    """Whether the data can be used without what is damaged of it.

    Args:
        most: the largest share of damaged files, 0 to 1.
        messages: what is wrong with each, as far as it is known.
        setting: what a person sets it with.
        what: is counted.

    Raises:
        DataError: more of them are damaged.
    """
    if not damaged or damaged <= most * (taken + damaged):
        return
    examples = "; ".join([*messages.values()][:_SHOWN]) or "they are empty"
    raise DataError(
        f"{damaged} of {taken + damaged} {what} are damaged ({damaged / (taken + damaged):.0%}), and {setting} "
        f"allows {most:.0%}: repair or remove them, or raise it; such as: {examples}"
    )


def _sound_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sound")


def _rows_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.rows")
