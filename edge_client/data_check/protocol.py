"""What the agent asks of a data check and what that answers, in lines of JSON (fedepth.child).

It looks at image files, or at the rows of files.

The check reads one request, writes `progress` now and then, and ends after `checked` or `failed`. Both sides load this
module, so it imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from fedepth.data.damage import Damage, RowCheck
from fedepth.task import ModelSpec


@dataclass(frozen=True)
class CheckRequest:
    """Look at the image files below `directory`; what is damaged goes to `record` (fedepth.data.damage).

    Attributes:
        decode: decode every file, instead of looking at its beginning and its end.
    """

    directory: str
    record: str
    decode: bool = False


@dataclass(frozen=True)
class RowRequest:
    """Go through the rows of the training files in `source`; what is found goes to `record`, too.

    Attributes:
        model: says which columns and classes count; None where no job has said so yet.
    """

    source: str
    record: str
    model: ModelSpec | None = None


class _Event(msgspec.Struct, frozen=True, tag_field="event"):
    """Fields that a newer check adds are ignored."""


class CheckProgress(_Event, tag="progress", frozen=True):
    """So many files, or rows, were gone through."""

    files: int


class Checked(_Event, tag="checked", frozen=True):
    """All files were looked at. `damage` is what was found if it could not be recorded, else it is in the record.

    `rows` is what was found of rows.
    """

    damage: Damage | None = None
    rows: RowCheck | None = None


class CheckFailed(_Event, tag="failed", frozen=True):
    """The directory cannot be read."""

    message: str


Event = CheckProgress | Checked | CheckFailed
