"""The rows of files as samples: checked and counted, or kept in a compact form that training reads. numpy.

Both go through the same rows in the same way, so that what an agent counts is what its trainer trains on. No file is
ever in memory: rows are read one by one, and kept in a nameless file on the disk.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from fedepth.data.column_sums import RunningSums
from fedepth.data.damage import RowCheck, RowError, save_row_check
from fedepth.data.labels import RowLabels
from fedepth.data.records import as_text, read_records
from fedepth.data.row_files import asked_of, find_rows, fingerprint
from fedepth.data.tables import row_encoder
from fedepth.data.text import joined, open_tokenizer
from fedepth.errors import DataError
from fedepth.layout import DTYPES
from fedepth.printable import printable
from fedepth.task import ModelSpec

EXAMPLES = 20  # of damaged rows that are named
_SHOWN = 3
_BUFFERED_BYTES = 1 << 20

Sample = npt.NDArray[Any]


@dataclass
class DamagedRows:
    """What was left out while rows were read.

    Attributes:
        examples: the first of them, each with its place and the reason.
    """

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, path: Path, line: int, problem: str) -> None:
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(printable(f"{path}, line {line}: {problem}"))

    @property
    def messages(self) -> Mapping[int, str]:
        return dict(enumerate(self.examples))


class Rows:
    """Samples in a nameless file, in the form in which a model's input is made of them.

    Attributes:
        labels: the label of every row; shape (n,).
        damaged: what was left out.
    """

    def __init__(
        self, files: Sequence[Path], spec: ModelSpec, scratch: Path | None = None, tokenizer: str = ""
    ) -> None:
        """Reads all rows of the files.

        Args:
            scratch: an existing folder on a disk; without one, the system's folder for temporary files, which may lie
                in memory.
            tokenizer: contents of the job's tokenizer file, where it has one.

        Raises:
            DataError: a file cannot be read, or has not the job's columns.
            OSError: the disk is full.
        """
        self.damaged = DamagedRows()
        self._shape = spec.sample_shape
        self._dtype = np.dtype(DTYPES[spec.sample_type])
        self._bytes = spec.sample_bytes
        file = cast(BinaryIO, tempfile.TemporaryFile(dir=scratch, buffering=_BUFFERED_BYTES))  # noqa: SIM115 - kept open
        self._file = file
        weakref.finalize(self, file.close)
        encode = sample_encoder(spec, tokenizer)
        labels = array("H")  # classes fit: MOST_CLASSES
        try:
            for path in files:
                for label, values in _labelled(path, spec, self.damaged, encode):
                    labels.append(label)
                    file.write(values.tobytes())
            file.flush()
        except BaseException:
            file.close()
            raise
        self.labels = np.array(labels, np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: npt.NDArray[Any]) -> Sample:
        """The rows at `indices` (shape (k,)), as a fresh array (k, *sample_shape)."""
        if len(indices) and int(indices[-1] - indices[0]) == len(indices) - 1 and np.all(np.diff(indices) == 1):
            data = self._pread(len(indices), int(indices[0]))
        else:
            data = b"".join(self._pread(1, index) for index in indices.tolist())
        return np.frombuffer(data, self._dtype).reshape(-1, *self._shape).copy()

    def _pread(self, count: int, start: int) -> bytes:
        if not 0 <= start <= len(self) - count:
            raise IndexError(f"row {start} of {len(self)}")
        data = os.pread(self._file.fileno(), count * self._bytes, start * self._bytes)
        if len(data) != count * self._bytes:
            raise DataError(f"the rows that were kept end within row {start + count}; check the disk, and start again")
        return data


def damaged_only(rows: Rows) -> str:
    """For a message about rows of which none can be used: why; empty if there are none at all."""
    found = rows.damaged
    if not found.count:
        return ""
    what = "its only row is" if found.count == 1 else f"all {found.count} rows are"
    return f": {what} damaged, such as: {'; '.join(found.examples[:_SHOWN])}"


def sample_encoder(spec: ModelSpec, tokenizer: str = "") -> Callable[[Sequence[Any]], Sample]:
    """From the values of a row, in the order of its columns, to a sample as it is stored.

    The function raises RowError.

    Args:
        tokenizer: contents of the job's tokenizer file, where it has one.

    Raises:
        DataError: the tokenizer cannot be used.
    """
    dtype, shape = np.dtype(DTYPES[spec.sample_type]), spec.sample_shape
    if spec.table is not None:
        numbers = row_encoder(spec.table)
        return lambda values: np.array(numbers(values), dtype)
    assert spec.text is not None, "only rows are encoded"
    tokens = open_tokenizer(spec.text, shape[0], tokenizer)

    def encode(values: Sequence[Any]) -> Sample:
        ids = tokens(_text_of(values))
        row = np.zeros(shape, dtype)
        row[: len(ids)] = ids
        return row

    return encode


def check_rows(
    source: Path,
    record: Path,
    spec: ModelSpec | None = None,
    split: str = "train",
    *,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> RowCheck:
    """Goes through all rows, and records what it finds.

    Args:
        record: see fedepth.data.damage.
        spec: says which columns count, and which classes there are; without it, rows are only split into fields.
        on_progress: is told after every row how many were gone through.

    Raises:
        DataError: a file cannot be read, or has not the job's columns.
    """
    files = find_rows(source, split)
    before = fingerprint(files)
    damaged = DamagedRows()
    counts: Counter[int] = Counter()
    table = spec.table if spec is not None else None
    sums = RunningSums(len(table.numeric)) if table is not None else None
    for path in files:
        for label, values in _labelled(path, spec, damaged, _checker(spec)):
            counts[label] += 1
            if sums is not None:
                sums.add(values)
            on_progress(counts.total() + damaged.count)
    found = RowCheck(
        fingerprint=before,
        asked=asked_of(spec),
        count=counts.total(),
        class_counts=tuple(counts[place] for place in range(len(spec.classes))) if spec else (),
        damaged=damaged.count,
        examples=tuple(damaged.examples),
        sums=sums.total(asked_of(spec)) if sums is not None else None,
    )
    try:
        save_row_check(record, found)
    except OSError as error:
        return replace(found, unsaved=f"{error.filename or record}: {error.strerror or error}")
    return found


def _checker(spec: ModelSpec | None) -> Callable[[Sequence[Any]], Any]:
    """What finds out whether a row can be used, without making a sample of it."""
    if spec is None:
        return len
    return row_encoder(spec.table) if spec.table is not None else _text_of


def _text_of(values: Sequence[Any]) -> str:
    text = joined([as_text(value) for value in values])
    if not text:
        raise RowError("has no text")
    return text


def _labelled(
    path: Path, spec: ModelSpec | None, damaged: DamagedRows, encode: Callable[[Sequence[Any]], Any]
) -> Iterator[tuple[int, Any]]:
    """The sound rows of a file with the places of their classes; without a job all are of class 0."""
    asked = spec.columns if spec is not None else None
    columns = (asked.label, *asked.columns) if asked is not None else ()
    labels = RowLabels(spec.classes, spec.first_label) if spec is not None else None
    for line, values, problem in read_records(path, columns):
        if problem:
            damaged.add(path, line, problem)
            continue
        try:
            found = encode(values[1:])
            label = labels.place(as_text(values[0])) if labels is not None else 0
        except RowError as error:
            damaged.add(path, line, str(error))
        else:
            yield label, found
