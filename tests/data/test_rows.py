"""Rows of files: any text survives, damaged rows cost no other one, and what is counted is what is trained on."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedepth.data import csv_records
from fedepth.data.damage import RowError, load_row_check
from fedepth.data.labels import RowLabels
from fedepth.data.records import Record, as_text, read_header, read_records
from fedepth.data.row_files import find_rows, fingerprint, holds_rows
from fedepth.data.rows import Rows, check_rows
from fedepth.data.text import word_id
from fedepth.errors import DataError
from fedepth.task import Category, InputType, ModelSpec, TableSpec, TextSpec

has_pyarrow = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="needs the library pyarrow, of fedepth[parquet]"
)
TEXTS = ModelSpec("m", ("a", "b"), (4,), (), (), InputType.TOKENS, text=TextSpec("label", ("text",), 1000))
TABLE = ModelSpec(
    "m", ("a", "b"), (5,), (), (), table=TableSpec("label", ("x",), (1.0,), (2.0,), (Category("c", ("r", "g")),))
)
# What CSV files hold: no surrogates, which are no text, and no NUL, which Python's csv did not read before 3.11.
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=30)


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def read(path: Path, *columns: str) -> list[Record]:
    return list(read_records(path, columns))


def values(path: Path, *columns: str) -> list[list[Any]]:
    records = read(path, *columns)
    assert not any(record.problem for record in records), records
    return [list(record.values) for record in records]


def problems(path: Path, *columns: str) -> list[tuple[int, str]]:
    return [(record.line, record.problem) for record in read(path, *columns) if record.problem]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), max_size=8), st.sampled_from(",;\t|"), st.sampled_from(["\r\n", "\n"]))
def test_any_text_that_is_written_is_read(rows: list[tuple[str, str]], delimiter: str, end: str) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("label", "text"), *rows])
    text.seek(0)
    records = csv_records.CsvRecords(text, "f", ("label", "text"))
    assert [tuple(line.fields) for line in records] == rows


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), max_size=8))
def test_any_text_survives_json_lines(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    lines = [json.dumps({"text": text, "label": label}) + "\n" for label, text in rows]
    if not lines:
        return
    write(path, "".join(lines))
    assert values(path, "label", "text") == [list(row) for row in rows]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_make_reading_fail_in_another_way(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = write(tmp_path_factory.getbasetemp() / "bytes.csv", b"label,text\n" + data)
    lines = [record.line for record in read(path, "label", "text")]
    assert lines == sorted(lines)
    try:
        read(write(path, data), "label")
    except DataError as error:
        assert str(path) in str(error)


FORMS = {
    "plain": b"label,text\na,one\nb,two\n",
    "a byte-order mark": b"\xef\xbb\xbflabel,text\na,one\nb,two\n",
    "UTF-16": "label,text\na,one\nb,two\n".encode("utf-16"),
    "UTF-16 of the other order": b"\xfe\xff" + "label,text\na,one\nb,two\n".encode("utf-16-be"),
    "line ends of Windows": b"label,text\r\na,one\r\nb,two\r\n",
    "line ends of old Macs": b"label,text\ra,one\rb,two\r",
    "no end of the last line": b"label,text\na,one\nb,two",
    "semicolons": b"label;text\na;one\nb;two\n",
    "tabs": b"label\ttext\na\tone\nb\ttwo\n",
    "bars": b"label|text\na|one\nb|two\n",
    "Excel's own line": b"sep=;\r\nlabel;text\r\na;one\r\nb;two\r\n",
    "other columns and another order": b"id,text,label\n1,one,a\n2,two,b\n",
    "another column with commas": b'note;text;label\n"x, y, z";one;a\n;two;b\n',
    "blanks around the names": b" label , text \na,one\nb,two\n",
    "blank lines": b"\n\nlabel,text\n\na,one\n\n\nb,two\n\n",
    "all quoted": b'"label","text"\n"a","one"\n"b","two"\n',
    "gzipped": gzip.compress(b"label,text\na,one\nb,two\n"),
    "lines of spaces": b"label,text\n  \na,one\n\t\nb,two\n",
    "JSON lines": b'{"label": "a", "text": "one"}\n{"text": "two", "label": "b", "more": [1]}\n',
    "JSON lines with a mark": b'\xef\xbb\xbf{"label": "a", "text": "one"}\n\n{"text": "two", "label": "b"}',
    "JSON lines, gzipped": gzip.compress(b'{"label":"a","text":"one"}\n{"label":"b","text":"two"}\n'),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_one_file(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / "rows.txt", FORMS[form])
    assert values(path, "label", "text") == [["a", "one"], ["b", "two"]]
    assert {"label", "text"} <= {*read_header(path).names}


def test_python_writes_nan_where_json_has_no_number(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", '{"x": NaN, "y": 1}\n{"x": 2, "y": -Infinity}\n[NaN]\n')
    first, second, third = read(path, "x", "y")
    assert as_text(first.values[0]) == "" and first.values[1] == 1
    assert second.values == [2, float("-inf")]
    assert third.problem == "is not an object of JSON in one line: it is no object"


def test_quotation_marks_hold_delimiters_line_ends_and_themselves(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", 'label,text\na,"one, ""two""\r\nthree"\nb,5" and \'x\'\n')
    assert values(path, "label", "text") == [["a", 'one, "two"\r\nthree'], ["b", "5\" and 'x'"]]


DAMAGED = {
    "too few fields": ("label,text\na\nb,two\n", 2, "has 1 field, the first line names 2 columns"),
    "too many fields": ("label,text\na,one,1\nb,two\n", 2, "has 3 fields, the first line names 2 columns"),
    "a quotation mark that is not closed": ('label,text\na,"one\nb,two\n', 2, "its quotation mark is not closed"),
    "one that the next row closes": ('label,text\na,"one\nb,"two"\n', 2, "text stands behind a closing quotation mark"),
    "one within a text": ('label,text\na,"say "hi" now"\nb,two\n', 2, 'written twice, as ""'),
    "Latin-1": (
        b"label,text\na,caf\xe9\nb,two\n",
        2,
        "byte 0xe9 is not UTF-8 (in files of Windows and in Latin-1 it is",
    ),
    "a NUL": (b"label,text\na,o\0ne\nb,two\n", 2, "NUL"),
    "JSON that is cut off": ('{"label": "a", "te\n{"label": "b", "text": "two"}\n', 1, "is not an object of JSON"),
    "JSON that is no object": ('{"label": "b", "text": "two"}\n[1, 2]\n', 2, "is not an object of JSON"),
    "several values": ('{"label": ["a"], "text": "one"}\n{"label": "b", "text": "two"}\n', 1, "holds several values"),
    "JSON in Latin-1": (b'{"label": "b", "text": "two"}\n{"label": "a", "text": "\xe9"}\n', 2, "0xe9 is not UTF-8"),
    "JSON without end": ('{"label": "b", "text": "two"}\n{"a":' + "[" * 9999 + "\n", 2, "is not an object of JSON"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_row_is_told_and_costs_no_other(tmp_path: Path, case: str) -> None:
    data, line, words = DAMAGED[case]
    path = write(tmp_path / "rows.txt", data)
    ((at, problem),) = problems(path, "label", "text")
    assert at == line
    assert words in problem
    assert [list(record.values) for record in read(path, "label", "text") if not record.problem] == [["b", "two"]]


REFUSED = {
    "empty": (b"", "is empty"),
    "blank": (b"\n \n\n", "is empty"),
    "no such column": (b"Label,message\na,one\n", "has no column 'label', 'text'; it has 'Label', 'message': 'Label'"),
    "a column twice": (b"label,text,text\na,one,two\n", "has the column 'text' more than once"),
    "a header that is not closed": (b'"label,text\na,one\n', "quotation marks are not closed on this line"),
    "a header in Latin-1": (b"label,text,caf\xe9\na,one,1\n", "byte 0xe9 is not UTF-8"),
    "a spreadsheet": (b"PK\x03\x04" + bytes(40), "is a spreadsheet or a ZIP file; save the sheet as CSV"),
    "an old spreadsheet": (b"\xd0\xcf\x11\xe0" + bytes(40), "is an old spreadsheet"),
    "UTF-16 without a mark": ("label,text\na,one\n".encode("utf-16-le"), "UTF-16 without a byte-order mark"),
    "UTF-32": ("label,text\na,one\n".encode("utf-32"), "is saved as UTF-32; save it as UTF-8"),
    "UTF-16 that is damaged": ("label,text\n".encode("utf-16") + b"\x00\xdc\x41", "saved as UTF-16 and damaged"),
    "one list of JSON": (b'[{"label": "a", "text": "one"}]', "is one list of JSON"),
    "a web page": (b"<html></html>", "is XML or a web page"),
    "zeros of a power cut": (bytes(2000), "begins with nothing but zeros, as a file that was being written"),
    "gzip that is cut off": (gzip.compress(b"label,text\n" + b"a,one\n" * 999)[:40], "is damaged"),
    "gzipped twice": (gzip.compress(gzip.compress(b"label,text\na,one\n")), "is compressed twice; unpack it once"),
    "JSON lines in UTF-16": ('{"label": "a"}'.encode("utf-16"), "is JSON saved as UTF-16"),
    "gzip of something else": (gzip.compress(b"PK\x03\x04"), "is a spreadsheet"),
    "an image": (b"\x89PNG\r\n\x1a\n", "is an image"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_read_is_refused_in_a_sentence(tmp_path: Path, case: str) -> None:
    data, words = REFUSED[case]
    path = write(tmp_path / "rows.csv", data)
    with pytest.raises(DataError) as caught:
        read(path, "label", "text")
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    for path, words in (
        (tmp_path, "is a folder; name the files in it"),
        (tmp_path / "no.csv", "does not exist"),
        (tmp_path / "pipe.csv", "is not a regular file"),
    ):
        with pytest.raises(DataError, match=words):
            read(path, "label")
        with pytest.raises(DataError, match=words):
            read_header(path)


def test_a_record_without_end_costs_its_first_line_and_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_records, "MOST_RECORD", 100)
    path = write(
        tmp_path / "f.csv", "label,text\n" + 'a,"' + "x" * 20 + "\n" + "b,two\n" * 50 + "c," + "y" * 200 + "\nd,end\n"
    )
    found = read(path, "label", "text")
    assert [record.line for record in found if record.problem] == [2, 53]
    assert "not closed within 100 characters" in found[0].problem
    assert "more than 100 characters" in found[51].problem
    assert found[-1].values == ["d", "end"]


def test_thousands_of_columns(tmp_path: Path) -> None:
    names = [f"column {place}" for place in range(5000)]
    path = write(tmp_path / "f.csv", ",".join(names) + "\n" + ",".join(map(str, range(5000))) + "\n")
    assert values(path, "column 4999", "column 0") == [["4999", "0"]]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (True, "true"), (False, "false"), (3, "3"), (3.0, "3"), (2.5, "2.5"), ("x", "x"), (1e300, "1e+300"),
     (float("nan"), "")],
)  # fmt: skip
def test_values_as_a_csv_file_would_have_them(value: object, text: str) -> None:
    assert as_text(value) == text


@has_pyarrow
def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "f.parquet"
    table = pa.table(
        {"label": ["a", None], "n": pa.array([1, None], pa.int64()), "many": [[1], [2]], "b": [True, False]}
    )
    pq.write_table(table, path)
    assert values(path, "n", "label", "b") == [[1, "a", True], [None, None, False]]
    assert [record.line for record in read(path)] == [1, 2]
    assert read_header(path) == (["label", "n", "many", "b"], {"many"}, False)
    for columns, words in ((("no",), "has no column 'no'"), (("many",), "holds several values in a row")):
        with pytest.raises(DataError, match=words):
            read(path, *columns)
    data = path.read_bytes()
    with pytest.raises(DataError, match="is a damaged Parquet file"):
        read(write(path, data[: len(data) // 2]), "n")


@has_pyarrow
def test_parquet_with_text_as_bytes_and_with_times(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "f.parquet"
    table = pa.table(
        {
            "text": pa.array(["é".encode(), b"\xff", None], pa.binary()),
            "code": pa.array([b"ab", b"cd", b"ef"], pa.binary(2)).dictionary_encode(),
            "at": pa.array([1_700_000_000_000_000_001, 0, None], pa.timestamp("ns")),
            "zone": pa.array([1_700_000_000_000_000_001, 0, None], pa.timestamp("ns", "UTC")),
            "of_day": pa.array([1, 1_000, None], pa.time64("ns")),
            "took": pa.array([1, 1_000_000_000, None], pa.duration("ns")),
            "far": pa.array([10**15, 0, None], pa.date64()),
        }
    )
    pq.write_table(table, path)
    first, second, third = read(path, "text", "code", "at", "zone", "of_day", "took")
    assert [as_text(value) for value in first.values] == [
        "é", "ab", "2023-11-14 22:13:20", "2023-11-14 22:13:20+00:00", "00:00:00", "0:00:00",
    ]  # fmt: skip
    assert second.values == () and second.problem.startswith("byte 0xff is not UTF-8")
    assert [as_text(value) for value in third.values] == ["", "ef", "", "", "", ""]
    with pytest.raises(DataError, match="is damaged behind row 0: date value out of range"):
        read(path, "far")


def test_rows_of_text_are_ids_with_padding_behind(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", "label,text\nb,the cat\na,one two three four five\n,none\na,\nc,x\n")
    rows = Rows([path], TEXTS)
    ids = [word_id(word, 1000) for word in ("the", "cat", "one", "two", "three", "four")]
    assert rows.labels.tolist() == [1, 0]
    found = rows.read(np.array([1, 0]))
    assert found.dtype == np.uint16
    assert found.tolist() == [ids[2:], [*ids[:2], 0, 0]]
    assert rows.read(np.arange(2)).tolist() == found[::-1].tolist()
    assert rows.damaged.count == 3
    assert rows.damaged.examples == [
        f"{path}, line 4: has no label",
        f"{path}, line 5: has no text",
        f"{path}, line 6: has the label 'c', which is not a class of the job ('a', 'b')",
    ]
    with pytest.raises(IndexError):
        rows.read(np.array([2]))


def test_a_large_vocabulary_needs_wider_ids(tmp_path: Path) -> None:
    spec = ModelSpec("m", ("a",), (4,), (), (), InputType.TOKENS, text=TextSpec("label", ("text",), 70_000))
    rows = Rows([write(tmp_path / "f.csv", "label,text\na,w\n")], spec)
    assert rows.read(np.array([0])).dtype == np.int32
    assert (spec.sample_bytes, TEXTS.sample_bytes, TABLE.sample_bytes) == (16, 8, 16)


def test_rows_of_a_table_keep_what_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", 'c,x,label\nr,"3,5",a\nr,3.5,b\nblue,?,a\n')
    rows = Rows([path], TABLE)
    assert rows.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(rows.read(np.array([0, 1])), [[3.5, 0], [np.nan, 2]])
    assert rows.damaged.examples == [
        f"{path}, line 2: column 'x' is '3,5', which is not a number: write decimals with a point"
    ]


@pytest.mark.parametrize(
    ("classes", "first", "label", "place"),
    [
        (("a", "b"), 0, " b ", 1),
        (("a", "b"), 0, "1", 1),
        (("a", "b"), 1, "1", 0),
        (("a", "b"), 1, "1.0", 0),
        (("0", "1", "2"), 0, "2", 2),
        (("0", "1", "2"), 1, "3", 2),
        (("1", "2"), 0, "1", 0),
        (("é", "b"), 0, "e\u0301", 0),
    ],
)
def test_labels_are_names_or_numbers(
    tmp_path: Path, classes: tuple[str, ...], first: int, label: str, place: int
) -> None:
    spec = ModelSpec("m", classes, (4,), (), (), InputType.TOKENS, first_label=first, text=TEXTS.text)
    rows = Rows([write(tmp_path / "f.csv", f"label,text\n{label},x\n")], spec)
    assert rows.labels.tolist() == [place]


@pytest.mark.parametrize(
    ("classes", "label", "words"),
    [
        (("World", "Sports"), "world", "did you mean 'World'?"),
        (("a", "b"), "2", "has the label 2; the job has 2 classes, labels 0 to 1"),
        (("5", "6"), "1", "which is not a class of the job"),
        (("a", "b"), "-1", "labels 0 to 1"),
    ],
)
def test_labels_that_are_no_class(tmp_path: Path, classes: tuple[str, ...], label: str, words: str) -> None:
    spec = ModelSpec("m", classes, (4,), (), (), InputType.TOKENS, text=TEXTS.text)
    rows = Rows([write(tmp_path / "f.csv", f"label,text\n{label},x\n")], spec)
    assert words in rows.damaged.examples[0]


def test_what_is_counted_is_what_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", "label,text\nb,one\nb,\na,two\nb,three\nx\n")
    record = tmp_path / "state/check"
    structure = check_rows(path, record)
    assert (structure.count, structure.class_counts, structure.damaged) == (4, (), 1)
    found = check_rows(path, record, TEXTS)
    rows = Rows([path], TEXTS)
    assert (found.count, found.class_counts, found.damaged) == (len(rows), (1, 2), 2)
    assert list(found.examples) == rows.damaged.examples
    assert load_row_check(record) == found
    assert found.asked != structure.asked
    assert found.fingerprint == structure.fingerprint == fingerprint((path,))


def test_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("train.csv", "train-2.jsonl.gz", "test.csv", "notes.txt", ".hidden.csv"):
        (tmp_path / name).write_text("label,text\n")
    assert [path.name for path in find_rows(tmp_path, "train")] == ["train-2.jsonl.gz", "train.csv"]
    assert [path.name for path in find_rows(tmp_path, "test")] == ["test.csv"]
    assert holds_rows(tmp_path) and holds_rows(tmp_path / "train.csv")
    single = tmp_path / "one"
    single.mkdir()
    assert not holds_rows(single)
    beside = tmp_path / "images"
    (beside / "cat").mkdir(parents=True)
    (beside / "labels.csv").write_text("label,text\n")
    assert not holds_rows(beside)
    (beside / "train.csv").write_text("label,text\n")
    assert holds_rows(beside)
    (single / "people.csv").write_text("label,text\n")
    assert [path.name for path in find_rows(single, "train")] == ["people.csv"]
    with pytest.raises(DataError, match=r"holds no file for test: one is called as test.csv"):
        find_rows(single, "test")
    (single / "more.csv").write_text("label,text\n")
    with pytest.raises(DataError, match=r"the files with rows there are: more.csv, people.csv"):
        find_rows(single, "train")
    with pytest.raises(DataError, match="does not exist"):
        find_rows(tmp_path / "no.csv", "train")
    (tmp_path / "train.csv.gz").touch()
    with pytest.raises(DataError, match=r"holds train\.csv\.gz unpacked as well, so that its rows would count twice"):
        find_rows(tmp_path, "train")


def test_classes_that_are_called_as_numbers_are_found_with_a_point() -> None:
    labels = RowLabels(("1", "2", "7"), 0)
    assert [labels.place(label) for label in ("1", "2.0", " 7.00 ", "1.0")] == [0, 1, 2, 0]
    for label in ("0", "1.5", "01"):
        with pytest.raises(RowError, match="which is not a class of the job"):
            labels.place(label)
