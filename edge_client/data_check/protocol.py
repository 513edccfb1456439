"""What the agent asks of a data check and what that answers, in lines of JSON (fedepth.child).

The check reads one request, writes `progress` now and then, and ends after `checked` or `failed`. Both sides load this
module, so it imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from fedepth.data.damage import Damage


@dataclass(frozen=True)
class CheckRequest:
    """Look at the image files below `directory`; what is damaged goes to `record` (fedepth.data.damage).

    Attributes:
        decode: decode every file, instead of looking at its beginning and its end.
    """

    directory: str
    record: str
    decode: bool = False


class _Event(msgspec.Struct, frozen=True, tag_field="event"):
    """Fields that a newer check adds are ignored."""


class CheckProgress(_Event, tag="progress", frozen=True):
    """So many files were gone through."""

    files: int


class Checked(_Event, tag="checked", frozen=True):
    """All files were looked at. `damage` is what was found if it could not be recorded, else it is in the record."""

    damage: Damage | None = None


class CheckFailed(_Event, tag="failed", frozen=True):
    """The directory cannot be read."""

    message: str


Event = CheckProgress | Checked | CheckFailed
