"""The rows of a file, one after the other, whatever its format: CSV, JSON lines or Parquet, the first two also gzipped.

What a file holds decides how it is read, not its name. A row that is damaged comes with the reason; a file that cannot
be read at all is a DataError. Files of any size are read in little memory. Standard library and msgspec; Parquet needs
pyarrow.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import msgspec

from fedepth.data.csv_records import MOST_RECORD, CsvRecords, not_utf8, places
from fedepth.data.labels import listed, normalised
from fedepth.errors import DataError
from fedepth.files import NOT_JSON, WrongFileError, open_regular
from fedepth.printable import printable
from fedepth.sizes import format_size

_HEAD_BYTES = 512
_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_UTF8_MARK = b"\xef\xbb\xbf"
_OTHERS = (
    (b"PK\x03\x04", "is a spreadsheet or a ZIP file; save the sheet as CSV"),
    (b"\xd0\xcf\x11\xe0", "is an old spreadsheet; save it as CSV"),
    (b"SQLite format 3\0", "is a SQLite database; export its table as CSV"),
    (b"%PDF", "is a PDF document; save its table as CSV"),
    (_GZIP, "is compressed twice; unpack it once"),
    (b"\x89PNG", "is an image"),
    (b"\xff\xd8\xff", "is an image"),
    (b"\xff\xfe\0\0", "is saved as UTF-32; save it as UTF-8"),
)
_JSON_OBJECT = re.compile(rb'\s*\{\s*["}]')
_BATCH_ROWS = 256
MOST_GROUP_BYTES = 256 << 20  # of one row group of a Parquet file, which is decompressed as a whole


class Record(NamedTuple):
    """One row.

    Attributes:
        line: where it begins; in a Parquet file the number of the row. Counted from 1.
        values: of the columns asked for, in their order: text, numbers, booleans, or None. Empty where `problem` is
            not.
        problem: why it cannot be read.
    """

    line: int
    values: Sequence[Any]
    problem: str = ""


def read_records(path: Path, columns: Sequence[str] = ()) -> Iterator[Record]:
    """The rows of a file.

    Args:
        columns: those that are wanted, normalised (NFC); without any, rows are looked at for damage alone.

    Raises:
        DataError: it is missing, of another kind, or damaged as a whole; or a CSV or Parquet file has not these
            columns.
        OSError: it cannot be read.
    """
    name = printable(str(path))
    with _in_a_sentence(name), open_regular(path) as file:
        head = file.read(_HEAD_BYTES)
        file.seek(0)
        if head.startswith(_PARQUET):
            yield from _parquet(path, name, columns)
            return
        if not head:
            raise DataError(f"{name} is empty")
        plain: IO[bytes] = file
        if head.startswith(_GZIP):
            plain = cast(IO[bytes], gzip.GzipFile(fileobj=file))
            head = plain.read(_HEAD_BYTES)
            plain.seek(0)
        yield from _text(plain, name, head, columns)


class Header(NamedTuple):
    """The columns of a file.

    Attributes:
        names: normalised (NFC); of JSON lines those that any of the rows has, in the order in which they occur.
        nested: those that hold several values in a row, and never a text or a number; they cannot be read.
        may_lack: whether a row, or another file, may be without some of them, as those of JSON lines.
    """

    names: list[str]
    nested: frozenset[str] = frozenset()
    may_lack: bool = False


def read_header(path: Path) -> Header:
    """The columns of a file. For those of JSON lines, all of it is read.

    Raises:
        DataError: see `read_records`.
    """
    name = printable(str(path))
    with _in_a_sentence(name), open_regular(path) as file:
        head = file.read(_HEAD_BYTES)
        file.seek(0)
        if head.startswith(_PARQUET):
            return _parquet_header(path, name)
        plain = cast(IO[bytes], gzip.GzipFile(fileobj=file) if head.startswith(_GZIP) else file)
        if head.startswith(_GZIP):
            head = plain.read(_HEAD_BYTES)
            plain.seek(0)
        _refuse_others(head, name)
        if _is_json_lines(head):
            return _json_header(plain)
        with _decoded(plain, head) as decoded:
            return Header(CsvRecords(decoded, name, ()).header)


@contextmanager
def _in_a_sentence(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{name} does not exist") from None
    except IsADirectoryError:
        raise DataError(f"{name} is a folder; name the files in it") from None
    except WrongFileError as error:
        raise DataError(f"{name} {error.strerror}") from None
    except PermissionError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}; correct its permissions") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name} is damaged: {str(error).rstrip('.')}; fetch or compress it again") from None


def as_text(value: Any) -> str:
    """A value as a CSV file would have it: nothing and NaN as "", true and false so, whole numbers without a point."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isnan(value):
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53:
        return str(int(value))
    return str(value)


def _text(file: IO[bytes], name: str, head: bytes, columns: Sequence[str]) -> Iterator[Record]:
    _refuse_others(head, name)
    if _is_json_lines(head):
        yield from _json_lines(file, columns)
        return
    try:
        with _decoded(file, head) as decoded:
            records = CsvRecords(decoded, name, columns)
            at = places(records.header, columns, name)
            for number, fields, problem in records:
                yield Record(number, [fields[place] for place in at] if not problem else (), problem)
    except UnicodeDecodeError as error:  # of UTF-16; what is not UTF-8 costs a row
        raise DataError(f"{name} is saved as UTF-16 and damaged: {error.reason}; save it as UTF-8") from None


def _refuse_others(head: bytes, name: str) -> None:
    if head and not head.strip(b"\0"):
        raise DataError(
            f"{name} begins with nothing but zeros, as a file that was being written when the power went; copy it "
            "there again"
        )
    for signature, what in _OTHERS:
        if head.startswith(signature):
            raise DataError(f"{name} {what}")
    if head.startswith(_UTF16) and head[2:].replace(b"\0", b"").lstrip().startswith((b"{", b"[")):
        raise DataError(f"{name} is JSON saved as UTF-16; save it as UTF-8")
    if not head.startswith(_UTF16) and 3 * head.count(0) > len(head):
        raise DataError(f"{name} is saved as UTF-16 without a byte-order mark; save it as UTF-8")
    if head.removeprefix(_UTF8_MARK).lstrip().startswith(b"["):
        beginning = head.removeprefix(_UTF8_MARK).lstrip()[1:].lstrip()
        if beginning.startswith((b"{", b"[")) or not beginning:
            raise DataError(f"{name} is one list of JSON; write one object on each line, without brackets around them")
    if head.lstrip()[:1] == b"<":
        raise DataError(f"{name} is XML or a web page; save the table as CSV")


def _is_json_lines(head: bytes) -> bool:
    return _JSON_OBJECT.match(head.removeprefix(_UTF8_MARK)) is not None


def _decoded(file: IO[bytes], head: bytes) -> io.TextIOWrapper:
    if head.startswith(_UTF16):
        return io.TextIOWrapper(file, encoding="utf-16", newline="")
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _json_lines(file: IO[bytes], columns: Sequence[str]) -> Iterator[Record]:
    for number, row, problem in _objects(file):
        yield _of_json(number, row, columns) if not problem else Record(number, (), problem)


def _json_header(file: IO[bytes]) -> Header:
    names: dict[str, None] = {}
    nested: set[str] = set()
    plain: set[str] = set()
    for _, row, _ in _objects(file):
        for key, value in row.items():
            name = normalised(key.strip())
            names[name] = None
            if value is not None:
                (nested if isinstance(value, (dict, list)) else plain).add(name)
    return Header([*names], frozenset(nested - plain), may_lack=True)


def _objects(file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Of every line that is not blank its number, and its object or what is wrong with it."""
    decoder = msgspec.json.Decoder(dict[str, Any])
    number = 0
    while line := file.readline(MOST_RECORD + 1):
        number += 1
        if len(line) > MOST_RECORD and not line.endswith(b"\n"):
            while (rest := file.readline(MOST_RECORD)) and not rest.endswith(b"\n"):
                pass
            yield number, {}, f"has more than {MOST_RECORD} bytes"
            continue
        line = line.removeprefix(_UTF8_MARK) if number == 1 else line
        if not line.strip():
            continue
        try:
            row = _with_nan(line) if b"NaN" in line or b"Infinity" in line else decoder.decode(line)
        except (*NOT_JSON, ValueError) as error:
            yield number, {}, _not_an_object(line, error)
        else:
            yield number, row, ""


def _with_nan(line: bytes) -> dict[str, Any]:
    """A line of what Python's json writes, which is not JSON where numbers are missing."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("it is no object")
    return row


def _not_an_object(line: bytes, error: Exception) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as where:
        return not_utf8(line[where.start])
    return f"is not an object of JSON in one line: {error}"


def _of_json(number: int, row: dict[str, Any], columns: Sequence[str]) -> Record:
    if any(column not in row for column in columns):
        row = {normalised(key.strip()): value for key, value in row.items()}
    values = [row.get(column) for column in columns]
    nested = [column for column, value in zip(columns, values, strict=True) if isinstance(value, (dict, list))]
    if nested:
        return Record(number, (), f"the column {listed(nested)} holds several values; a text or a number is read")
    return Record(number, values)


def _parquet_header(path: Path, name: str) -> Header:
    import pyarrow as pa

    fields = [(normalised(each.name.strip()), each.type) for each in _opened_parquet(path, name).schema_arrow]
    nested = frozenset(each for each, kind in fields if pa.types.is_nested(kind))
    return Header([each for each, _ in fields], nested)


def _parquet(path: Path, name: str, columns: Sequence[str]) -> Iterator[Record]:
    import pyarrow as pa

    file = _opened_parquet(path, name)
    called = {normalised(each.strip()): each for each in file.schema_arrow.names}
    places([normalised(each.strip()) for each in file.schema_arrow.names], columns, name)
    wanted = [called[column] for column in columns]
    nested = [each for each in wanted if pa.types.is_nested(file.schema_arrow.field(each).type)]
    if nested:
        raise DataError(
            f"{name}: the column {listed(nested)} holds several values in a row; texts and numbers are read"
        )
    groups = range(file.metadata.num_row_groups)
    largest = max((file.metadata.row_group(each).total_byte_size for each in groups), default=0)
    if largest > MOST_GROUP_BYTES:
        raise DataError(
            f"{name} has a row group of {format_size(largest)}, at most {format_size(MOST_GROUP_BYTES)} are read at "
            "once; write it with smaller ones (row_group_size)"
        )
    number = 0
    try:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted, use_threads=False):
            if not wanted:
                for _ in range(batch.num_rows):
                    number += 1
                    yield Record(number, ())
                continue
            lists = [_values(batch.column(batch.schema.get_field_index(each))) for each in wanted]
            for values in zip(*lists, strict=True):
                number += 1
                yield _without_bytes(number, values)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # ValueError: UnicodeDecodeError, dates
        raise DataError(
            f"{name} is damaged behind row {number}: {str(error).splitlines()[0].rstrip('.')}; write it again"
        ) from None


def _values(column: Any) -> list[Any]:
    """Of an Arrow array. Python's own types of time end at microseconds, which is enough for a category."""
    import pyarrow as pa

    kind = column.type
    if getattr(kind, "unit", "") == "ns":
        coarser = pa.duration("us") if pa.types.is_duration(kind) else pa.time64("us")
        coarser = pa.timestamp("us", kind.tz) if pa.types.is_timestamp(kind) else coarser
        column = column.cast(coarser, safe=False)
    found: list[Any] = column.to_pylist()
    return found


def _without_bytes(number: int, values: Sequence[Any]) -> Record:
    """A row whose bytes are text, as some programs write it."""
    if not any(isinstance(value, bytes) for value in values):
        return Record(number, values)
    try:
        return Record(number, [value.decode() if isinstance(value, bytes) else value for value in values])
    except UnicodeDecodeError as error:
        return Record(number, (), not_utf8(error.object[error.start]))


def _opened_parquet(path: Path, name: str) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(
            f"{name} is a Parquet file, which needs pyarrow: pip install 'fedepth[parquet]', or save it as CSV"
        ) from None
    try:
        return pq.ParquetFile(path, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name} is a damaged Parquet file: {str(error).splitlines()[0]}") from None
