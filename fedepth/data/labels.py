"""What a data set calls its classes, compared with what a job calls them. Standard library only.

Names are compared after Unicode normalisation (NFC): macOS and Linux write an "é" differently. Nothing else is
taken for equal, but what comes close is suggested.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from fedepth.data.damage import RowError
from fedepth.printable import printable, shortened, visible

_NAMES_SHOWN = 10
_MOST_COMPARED = 1000  # pairs of a name and a class; comparing takes a while, and a device may send any names
_NAME_SHOWN = 60
_MOST_TOLD = 2000  # characters, fewer than a message to a device may have
_NEAR = 0.6  # difflib's own measure of what is similar
_NUMBER = re.compile(r"(-?\d{1,9})(\.0+)?")
_WITH_POINT = re.compile(r"(-?\d+)\.0+")


def normalised(name: str) -> str:
    """The name as it is compared."""
    return unicodedata.normalize("NFC", name)


def as_whole(text: str) -> str:
    """ "1" of "1.0", which programs make of a whole number in a column with gaps; any other text as it is."""
    number = _WITH_POINT.fullmatch(text)
    return text if number is None else number[1]


def unknown_names(names: Iterable[str], classes: Sequence[str]) -> str:
    """What is wrong with folders whose names are not classes of the job, in a few words each; empty if all are.

    Args:
        names: of folders.
        classes: of the job, in label order.
    """
    known = {normalised(name) for name in classes}
    unknown = [name for name in names if normalised(name) not in known]
    if not unknown:
        return ""
    near = [
        (name, _nearest(name, classes, _MOST_COMPARED // number))
        for number, name in enumerate(unknown[:_NAMES_SHOWN], 1)
    ]
    told = [
        f"folder {visible(name, _NAME_SHOWN)}"
        + (f" - did you mean class {visible(match, _NAME_SHOWN)}{_difference(name, match)}?" if match else "")
        for name, match in near
    ]
    more = f" and {len(unknown) - len(near)} more" if len(unknown) > len(near) else ""
    count = "1 folder that is not a class" if len(unknown) == 1 else f"{len(unknown)} folders that are not classes"
    return shortened(f"{count} of the job ({listed(classes)}): {'; '.join(told)}{more}", _MOST_TOLD)


def listed(names: Sequence[str]) -> str:
    """The first names, quoted, and how many more there are."""
    shown = ", ".join(visible(name, _NAME_SHOWN) for name in names[:_NAMES_SHOWN])
    return f"{shown} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else shown


def lacking(classes: Sequence[str], counts: Sequence[int]) -> tuple[str, ...]:
    """The classes without a sample; `counts` are in label order."""
    return tuple(name for name, count in zip(classes, counts, strict=True) if not count)


def by_class(names: Sequence[str], counts: Sequence[int], classes: Sequence[str], first_label: int) -> tuple[int, ...]:
    """Samples by class of the job, of what a device has counted.

    Args:
        names: of its folders, or none where `counts` are by label value from 0 on.
        counts: by those; all of them belong to classes of the job.
        classes: of the job, in label order.
        first_label: the label of the first class.
    """
    if not names:
        of_classes = tuple(counts[first_label : first_label + len(classes)])
        return of_classes + (0,) * (len(classes) - len(of_classes))
    counted = dict(zip(map(normalised, names), counts, strict=True))
    return tuple(counted.get(normalised(name), 0) for name in classes)


def labels_outside(labels: Sequence[int], classes: Sequence[str], first_label: int) -> str:
    """What is wrong with label values that stand for no class; empty if all do.

    Args:
        labels: those that occur, rising.
    """
    last = first_label + len(classes) - 1
    outside = [label for label in labels if not first_label <= label <= last]
    if not outside:
        return ""
    shown = ", ".join(map(str, outside[:_NAMES_SHOWN]))
    more = f" and {len(outside) - _NAMES_SHOWN} more" if len(outside) > _NAMES_SHOWN else ""
    message = (
        f"has labels {shown}{more}; the job has the {len(classes)} classes {listed(classes)}, that is labels "
        f"{first_label} to {last}"
    )
    lowest, highest = labels[0], labels[-1]
    if lowest != first_label and lowest >= 0 and highest - lowest < len(classes):
        message += (
            f"; the labels here start at {lowest}: if {lowest} stands for {visible(classes[0], _NAME_SHOWN)}, set "
            f"[model] first_label = {lowest} in the job file"
        )
    return message


class RowLabels:
    """From the labels of rows to places in the job's classes.

    A label is a class by its name. Where no class is called as a number, and where they are just numbered, a number is
    one as well, counted from `first_label`.
    """

    def __init__(self, classes: Sequence[str], first_label: int) -> None:
        self._classes = classes
        self._first_label = first_label
        numbered = [*classes] == [str(place) for place in range(len(classes))]
        self._places = {} if numbered else {normalised(name).strip(): place for place, name in enumerate(classes)}
        self._takes_numbers = numbered or not any(map(_NUMBER.fullmatch, classes))

    def place(self, label: str) -> int:
        """The place of a label's class.

        Raises:
            RowError: it stands for none of them.
        """
        place = self._places.get(label)
        if place is None:
            self._places[label] = place = self._found(normalised(label).strip())
        return place

    def _found(self, label: str) -> int:
        place = self._places.get(label, self._places.get(as_whole(label)))
        if place is not None:
            return place
        if not label:
            raise RowError("has no label")
        number = _NUMBER.fullmatch(label) if self._takes_numbers else None
        if number is not None:
            place = int(number[1]) - self._first_label
            if 0 <= place < len(self._classes):
                return place
            last = self._first_label + len(self._classes) - 1
            raise RowError(
                f"has the label {label}; the job has {len(self._classes)} classes, labels {self._first_label} to {last}"
            )
        near = _nearest(label[:_NAME_SHOWN], self._classes, _MOST_COMPARED)
        meant = f" - did you mean {visible(near, _NAME_SHOWN)}?" if near else ""
        what = f"has the label {visible(label, _NAME_SHOWN)}, which is not a class of the job"
        raise RowError(f"{what} ({listed(self._classes)}){meant}")


@lru_cache(maxsize=1)  # twenty thousand of them take a tenth of a second
def _loose(classes: tuple[str, ...]) -> Mapping[str, str]:
    """The classes, by what `_nearest` compares of them."""
    return {_loosely(each): each for each in reversed(classes)}


def _nearest(name: str, classes: Sequence[str], most: int) -> str:
    """The class that a folder was probably meant for; empty if none is like it. More classes than `most` are not
    compared letter by letter."""
    loose = _loose(tuple(classes))
    if _loosely(name) in loose:
        return loose[_loosely(name)]
    if len(loose) > most:
        return ""
    import difflib  # where something is wrong, and never in an idle agent

    near = difflib.get_close_matches(_loosely(name), loose, n=1, cutoff=_NEAR)
    return loose[near[0]] if near else ""


def _loosely(name: str) -> str:
    """Without what is easily overlooked: case, width, blanks, separators, and what cannot be seen."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return "".join(character for character in folded if character.isalnum())


def _difference(name: str, match: str) -> str:
    """Names the first letters that differ where they look alike: a Latin and a Cyrillic "a"."""
    for one, other in zip(normalised(name), normalised(match), strict=False):
        if one != other:
            if not (one.isalpha() and other.isalpha()) or _script(one) == _script(other):
                return ""
            return f" (there {_code_point(other)} in place of {_code_point(one)})"
    return ""


def _script(letter: str) -> str:
    """ "LATIN" of an "é", as its name begins."""
    return unicodedata.name(letter, "").partition(" ")[0]


def _code_point(character: str) -> str:
    return f"U+{ord(character):04X} {unicodedata.name(character, '') or printable(character)}"
