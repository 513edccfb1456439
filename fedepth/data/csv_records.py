"""CSV files as records, in a stream: what is read at once is one record, of at most MOST_RECORD characters.

Python's csv module splits them, strictly (RFC 4180): text behind a closing quotation mark is a mistake, and is not
guessed at. A record that is damaged costs no other one: reading goes on with the line behind its first.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TextIO

from fedepth.data.labels import listed, normalised
from fedepth.errors import DataError
from fedepth.printable import quoted

MOST_RECORD = 1 << 20  # characters, all its lines together
_DELIMITERS = ",;\t|"
_SEPARATOR = re.compile(r"sep=(.)[\r\n]*", re.IGNORECASE)  # what Excel writes and reads in front of the header
_NOT_TEXT = re.compile("[\udc80-\udcff]")  # how errors="surrogateescape" keeps bytes that are not UTF-8
_LINE_SHOWN = 60


class Line(NamedTuple):
    """One record.

    Attributes:
        number: of its first line, counted from 1.
        fields: as many as the header names; empty where `problem` says why there are none.
    """

    number: int
    fields: Sequence[str]
    problem: str = ""


class CsvRecords:
    """The records behind the header of a CSV file. Iterate over it once.

    Attributes:
        header: the names of the columns, without white space around them.
    """

    def __init__(self, file: TextIO, name: str, wanted: Sequence[str]) -> None:
        """Reads the header.

        Args:
            file: opened with newline="" and errors="surrogateescape".
            name: of the file, for messages.
            wanted: columns by which the delimiter is told; may be empty.

        Raises:
            DataError: there is none.
        """
        csv.field_size_limit(max(csv.field_size_limit(), MOST_RECORD))  # of this process; MOST_RECORD is the bound
        self._name = name
        self._lines = _Lines(file)
        try:
            line = self._lines.not_blank()
            separator = _SEPARATOR.fullmatch(line)
            line = self._lines.not_blank() if separator else line
        except _Damaged as error:
            raise DataError(f"{name}, line {self._lines.first}: {error}; the first line names the columns") from None
        if not line:
            raise DataError(f"{name} is empty; the first line names the columns, every other one is a sample")
        if self._lines.objection:
            raise DataError(f"{name}, line {self._lines.first}: {self._lines.objection}; save the file as UTF-8")
        self._delimiter, self.header = self._columns(line, separator[1] if separator else "", wanted)

    def __iter__(self) -> Iterator[Line]:
        """The records; blank lines, also of spaces, are none."""
        lines = self._lines
        while True:
            lines.begin()
            try:
                for fields in csv.reader(lines, delimiter=self._delimiter, strict=True):
                    problem = lines.objection or self._objection(fields)
                    number = lines.first
                    lines.begin()
                    if fields and (len(fields) > 1 or fields[0].strip() or len(self.header) == 1):
                        yield Line(number, () if problem else fields, problem)
                return
            except (csv.Error, _Damaged) as error:
                yield Line(lines.first, (), lines.objection or _reason(error))
                lines.back()  # few lines more than once: behind a mark that is not closed are none that open another

    def _objection(self, fields: Sequence[str]) -> str:
        if len(fields) in (0, len(self.header)):
            return ""
        count = "1 field" if len(fields) == 1 else f"{len(fields)} fields"
        return f"has {count}, the first line names {len(self.header)} columns"

    def _columns(self, line: str, separator: str, wanted: Sequence[str]) -> tuple[str, list[str]]:
        """The delimiter and the names: by the columns that are wanted, or else by how many there are."""
        found: dict[str, list[str]] = {}
        for delimiter in separator or _DELIMITERS:
            try:
                fields = next(csv.reader([line], delimiter=delimiter, strict=True))
            except (csv.Error, TypeError):  # TypeError: a delimiter that there cannot be
                continue
            found[delimiter] = [normalised(field.strip()) for field in fields]
        if not found:
            raise DataError(
                f"{self._name}, line {self._lines.first}: its quotation marks are not closed on this line, which names "
                f"the columns: {quoted(line.strip(), _LINE_SHOWN)}"
            )
        fitting = [each for each in found if set(wanted) <= set(found[each])] if wanted else []
        delimiter = fitting[0] if fitting else max(found, key=lambda each: len(found[each]))
        return delimiter, found[delimiter]


def places(header: Sequence[str], wanted: Sequence[str], name: str, suggest: str = "") -> list[int]:
    """Where the wanted columns stand.

    Args:
        suggest: what else may be wrong, for the message.

    Raises:
        DataError: a wanted column is missing, or there twice.
    """
    at: dict[str, list[int]] = {}
    for place, column in enumerate(header):
        at.setdefault(column, []).append(place)
    missing = [column for column in wanted if column not in at]
    if missing:
        near = {each.casefold(): each for each in at}
        meant = [f"{quoted(near[each.casefold()])} differs in case" for each in missing if each.casefold() in near]
        raise DataError(
            f"{name} has no column {listed(missing)}; it has {listed(list(at))}"
            + (f": {', '.join(meant[:3])}" if meant else suggest)
        )
    twice = [column for column in wanted if len(at[column]) > 1]
    if twice:
        raise DataError(f"{name} has the column {listed(twice)} more than once; rename or remove the others")
    return [at[column][0] for column in wanted]


class _Damaged(Exception):
    """A record that is no longer read."""


class _Lines:
    """The lines of a file, for csv.reader, which asks for as many as a record has; those are remembered.

    Attributes:
        objection: what is wrong with a line of the record; "" if nothing is.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._number = 0
        self._again: deque[tuple[int, str]] = deque()
        self._taken: list[tuple[int, str]] = []
        self._size = 0
        self.objection = ""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self._again:
            number, line = self._again.popleft()
        else:
            line = self._file.readline(MOST_RECORD + 1)
            if not line:
                raise StopIteration
            self._number += 1
            number = self._number
            if len(line) > MOST_RECORD and line[-1] not in "\r\n":
                self._skip_line()
                self._taken.append((number, ""))
                raise _Damaged(f"has more than {MOST_RECORD} characters")
        self._taken.append((number, line))
        self._size += len(line)
        if self._size > MOST_RECORD:
            raise _Damaged(f"its quotation mark is not closed within {MOST_RECORD} characters")
        if not line.isascii() and (wrong := _NOT_TEXT.search(line)):
            self.objection = self.objection or not_utf8(ord(wrong[0]) - 0xDC00)
        elif "\0" in line:
            self.objection = self.objection or "holds the character NUL"
        return line

    @property
    def first(self) -> int:
        """The number of the record's first line."""
        return self._taken[0][0] if self._taken else self._number

    def begin(self) -> None:
        """A new record begins with the next line."""
        self._taken.clear()
        self._size, self.objection = 0, ""

    def back(self) -> None:
        """The next record begins with the second line of this one."""
        self._again.extendleft(reversed(self._taken[1:]))
        self.begin()

    def not_blank(self) -> str:
        """The next line that is not blank; "" at the end of the file."""
        while True:
            self.begin()
            line = next(self, "")
            if line.strip() or not line:
                return line

    def _skip_line(self) -> None:
        while (rest := self._file.readline(MOST_RECORD)) and rest[-1] not in "\r\n":
            pass


def not_utf8(byte: int) -> str:
    """What to say of a byte that is not UTF-8."""
    meant = bytes([byte]).decode("cp1252", "replace")
    guess = f" (in files of Windows and in Latin-1 it is {quoted(meant)})" if meant.isprintable() else ""
    return f"byte 0x{byte:02x} is not UTF-8{guess}"


def _reason(error: Exception) -> str:
    text = str(error)
    if "expected after" in text:
        return 'text stands behind a closing quotation mark; one within a text is written twice, as ""'
    if "unexpected end" in text:
        return "its quotation mark is not closed"
    return text if isinstance(error, _Damaged) else f"cannot be read: {text}"
