"""What the columns of a file hold, as the section [table] of a job file says it: `fedepth columns`.

One pass over the rows, in little memory: sums of numbers, and of other columns the first values.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedepth.data.damage import RowError
from fedepth.data.labels import as_whole, listed, normalised
from fedepth.data.records import Header, as_text, read_header, read_records
from fedepth.data.tables import MISSING, number_of
from fedepth.errors import DataError
from fedepth.printable import printable

MOST_VALUES = 50  # of a column with categories, and of the label
_LONGEST_VALUE = 200


@dataclass
class Column:
    """What was seen of one column.

    Attributes:
        missing: rows without a value.
        numbers: rows with a number.
        missing_as: how these are written, but for those that are empty; a label may be one of a class, such as "none".
        values: how often each value occurs, at most MOST_VALUES + 1 of them.
        other: a value that is no number; "" as long as there is none.
        nested: whether it holds several values in a row; it is not read.
    """

    name: str
    missing: int = 0
    missing_as: Counter[str] = field(default_factory=Counter)
    numbers: int = 0
    values: Counter[str] = field(default_factory=Counter)
    other: str = ""
    nested: bool = False
    _shift: float = 0.0  # a first value, by which sums stay small: they would lose what numbers far from 0 differ by
    _sum: float = 0.0
    _squares: float = 0.0

    def add(self, value: object) -> None:
        """Takes the value of one row."""
        text = normalised(as_whole(as_text(value).strip()))
        if text.casefold() in MISSING:
            self.missing += 1
            if text:
                self.missing_as[text] += 1
            return
        if text in self.values or len(self.values) <= MOST_VALUES:
            self.values[text[: _LONGEST_VALUE + 1]] += 1
        if self.other:
            return
        try:
            number = number_of(value)
        except RowError:
            self.other = text
            return
        if not self.numbers:
            self._shift = number
        self.numbers += 1
        self._sum += number - self._shift
        self._squares += (number - self._shift) ** 2

    @property
    def is_numeric(self) -> bool:
        return self.numbers > 0 and not self.other

    @property
    def is_categorical(self) -> bool:
        return 0 < len(self.values) <= MOST_VALUES and max(map(len, self.values)) <= _LONGEST_VALUE

    @property
    def mean(self) -> float:
        return self._shift + self._sum / self.numbers

    @property
    def std(self) -> float:
        """Of all numbers, in the sense of the whole population; 1 where all are equal."""
        variance = self._squares / self.numbers - (self._sum / self.numbers) ** 2
        return math.sqrt(variance) if variance > 0 else 1.0


def look_at_columns(files: Sequence[Path]) -> tuple[list[Column], int, list[str]]:
    """Every column of the files, how many rows are damaged, and what is wrong with the first of them.

    Raises:
        DataError: a file cannot be read, they have not the same columns, or they have no row that is not damaged.
    """
    columns = _columns([read_header(path) for path in files], printable(str(files[0])))
    looked_at = [column for column in columns if column.name and not column.nested]
    rows = damaged = 0
    examples: list[str] = []
    for path in files:
        for line, values, problem in read_records(path, [column.name for column in looked_at]):
            if problem:
                damaged += 1
                examples = examples or [printable(f"{path}, line {line}: {problem}")]
                continue
            rows += 1
            for column, value in zip(looked_at, values, strict=True):
                column.add(value)
    if not rows:
        why = f"all of them, {damaged}, are damaged, such as: {examples[0]}" if damaged else "there are none"
        raise DataError(f"{', '.join(printable(str(path)) for path in files)}: no row can be looked at: {why}")
    return columns, damaged, examples


def _columns(headers: Sequence[Header], name: str) -> list[Column]:
    """The columns of the first file, named `name`; where its rows may lack some, also of the others of its kind."""
    first, *others = headers
    named = [each for each in first.names if each]  # programs write the number of a row without one
    twice = [each for each, times in Counter(named).items() if times > 1]
    if twice:
        raise DataError(f"{name} has the column {listed(twice)} more than once; rename the others")
    names = dict.fromkeys(first.names)
    if first.may_lack:
        names.update(dict.fromkeys(each for header in others if header.may_lack for each in header.names))
    return [
        Column(each, nested=all(each in header.nested for header in headers if each in header.names)) for each in names
    ]


def table_section(columns: Sequence[Column], label: str, categorical: Collection[str] = ()) -> str:
    """The sections [model] and [table] of a job file, as far as they follow from the columns.

    Args:
        label: the column with the class.
        categorical: columns that count as categories although they hold numbers.

    Raises:
        DataError: there is no such column, or it has too many values to be the class.
    """
    by_name = {column.name: column for column in columns}
    wanted = [normalised(each.strip()) for each in (label, *categorical)]
    if missing := [each for each in wanted if each not in by_name]:
        raise DataError(f"there is no column {listed(missing)}; there are {listed([*by_name])}")
    classes = by_name[wanted[0]]
    if not classes.is_categorical:
        raise DataError(f"the column {listed([classes.name])} {_no_categories(classes)}: it is not a class")
    others = [column for column in columns if column is not classes]
    numeric = [each for each in others if each.is_numeric and each.name not in wanted]
    chosen = [each for each in others if each not in numeric and each.is_categorical]
    left_out = [each for each in others if each not in numeric and each not in chosen]
    lines = ["[model]", f"classes = {_list(_ordered(classes.values))}"]
    if classes.missing:
        # Rows of a device whose label is none of the classes are damaged.
        told = ", ".join(f"{_text(text)} ({count})" for text, count in classes.missing_as.most_common())
        told = f", also where it is {told}: add what is a class to the list" if told else ""
        lines.append(f"# rows without a label: {classes.missing}{told}")
    lines += ["", "[table]", f"label = {_text(classes.name)}"]
    if numeric:
        lines += [
            f"numeric = {_list([each.name for each in numeric])}",
            f"mean = [{', '.join(repr(each.mean) for each in numeric)}]",
            f"std = [{', '.join(repr(each.std) for each in numeric)}]",
        ]
    for each in left_out:
        why = _no_categories(each) if each.name else "has no name"
        shown = f", such as {_text(each.other[:60])}" if each.other else ""
        lines.append(f"# left out: {_text(each.name)} {why}{shown}")
    if chosen:
        lines += ["", "[table.categorical]"]
        lines += [f"{_text(each.name)} = {_list(_ordered(each.values))}" for each in chosen]
    return "\n".join(lines) + "\n"


def _no_categories(column: Column) -> str:
    """Why a column has none."""
    if column.nested:
        return "holds several values in a row"
    if not column.values:
        return "has no values"
    if len(column.values) > MOST_VALUES:
        return f"has more than {MOST_VALUES} values" + (" that are no numbers" if column.other else "")
    return f"has values of more than {_LONGEST_VALUE} characters"


def _ordered(values: Counter[str]) -> list[str]:
    """Numbers by size, all else by name."""
    try:
        return sorted(values, key=lambda each: (float(each), each))
    except ValueError:
        return sorted(values)


def _list(texts: Sequence[str]) -> str:
    return f"[{', '.join(map(_text, texts))}]"


def _text(text: str) -> str:
    """As a basic string of TOML: JSON's, but for the one control character that JSON leaves as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
