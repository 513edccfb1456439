"""`fedepth columns`: the section [table] of a job file out of a file's columns, which a job file takes as it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedepth.cli import app
from fedepth.data.columns import look_at_columns, table_section
from fedepth.errors import DataError
from fedepth.job import load_config, model_spec
from fedepth.task import Category, TableSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROWS = (
    'id,"a ""b""",code,colour,buys,note,empty\n'
    + "".join(
        f"x{place},{place},{place % 3},{'rg'[place % 2]},{'ny'[place % 2]},text {place},\n" for place in range(60)
    )
    + "x60,NA,1,,n,,\n"
    + "damaged\n"
)


def write(folder: Path, text: str = ROWS) -> Path:
    path = folder / "rows.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_section_is_what_a_job_file_takes(tmp_path: Path) -> None:
    columns, damaged, examples = look_at_columns([write(tmp_path)])
    assert (damaged, len(examples)) == (1, 1)
    section = table_section(columns, "buys", ["code"])
    assert '# left out: "id" has more than 50 values that are no numbers, such as "x0"' in section
    assert '# left out: "empty" has no values' in section
    text = f'[job]\nname = "j"\n{section}'.replace("[model]", '[model]\nname = "table-mlp"')
    (tmp_path / "job.toml").write_text(text, encoding="utf-8")
    spec = model_spec(load_config(tmp_path / "job.toml"))
    assert spec.classes == ("n", "y")
    mean, std = 29.5, (59 * 61 / 12) ** 0.5  # of 0 to 59: the mean, and the root of (60² - 1) / 12
    assert spec.table is not None
    assert spec.table == TableSpec(
        "buys", ('a "b"',), (mean,), spec.table.std, (Category("code", ("0", "1", "2")), Category("colour", ("g", "r")))
    )
    assert spec.table.std == pytest.approx((std,))


def test_names_of_any_kind_are_valid_toml(tmp_path: Path) -> None:
    path = write(tmp_path, '"é😀","\\",y,"\x7f\t"\n1,p q,a,"""x"""\n2,[z],b,\x85\n')
    read = tomllib.loads(table_section(look_at_columns([path])[0], "y"))
    assert read["table"]["numeric"] == ["é😀"]
    assert read["table"]["categorical"] == {"\\": ["[z]", "p q"], "\x7f": ['"x"']}


@pytest.mark.parametrize(
    ("rows", "label", "words"),
    [
        ("a,b\n1,2\n", "y", "there is no column 'y'; there are 'a', 'b'"),
        ("y,b\n" + "".join(f"{place},1\n" for place in range(51)), "y", "has more than 50 values: it is not a class"),
        ("y,b\n,1\n", "y", "the column 'y' has no values: it is not a class"),
        ("y,b\n" + "z" * 201 + ",1\n", "y", "has values of more than 200 characters: it is not a class"),
        ("y,b\n", "y", "no row can be looked at: there are none"),
        ("y,b\n1,2,3\n4\n", "y", "all of them, 2, are damaged, such as: "),
        ("y,b,b\n1,1,2\n", "y", "has the column 'b' more than once"),
    ],
)
def test_what_cannot_be_a_section(tmp_path: Path, rows: str, label: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        table_section(look_at_columns([write(tmp_path, rows)])[0], label)
    assert words in str(caught.value)


def test_the_command(tmp_path: Path) -> None:
    path = write(tmp_path)
    done = CliRunner().invoke(app, ["columns", str(path), "--label", "buys"])
    assert done.exit_code == 0
    assert done.stdout == table_section(look_at_columns([path])[0], "buys")
    assert "1 row is damaged and left out, such as: " in done.stderr
    told = json.loads(CliRunner().invoke(app, ["columns", str(path), "--label", "buys", "--json"]).stdout)
    assert [column["name"] for column in told["columns"]] == ["id", 'a "b"', "code", "colour", "buys", "note", "empty"]
    assert told["columns"][1]["missing"] == 1 and told["columns"][1]["mean"] == 29.5
    assert told["section"].startswith("[model]\nclasses = ")


def test_several_files_have_the_same_columns(tmp_path: Path) -> None:
    first = write(tmp_path, "y,x\na,1\nb,2\n")
    second = tmp_path / "more.csv"
    second.write_text("x;y\n6;a\n")
    section = tomllib.loads(table_section(look_at_columns([first, second])[0], "y"))
    assert section["table"]["mean"] == [3.0]
    second.write_text("z\n6\n")
    with pytest.raises(DataError, match=r"more.csv has no column 'y', 'x'; it has 'z'"):
        look_at_columns([first, second])


def test_the_number_of_a_row_has_no_name_and_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, ",x,,y\n0,5,a,n\n1,6,b,m\n")
    section = table_section(look_at_columns([path])[0], "y")
    assert tomllib.loads(section)["table"] == {"label": "y", "numeric": ["x"], "mean": [5.5], "std": [0.5]}
    assert '# left out: "" has no name' in section


def test_a_whole_number_is_one_value_with_and_without_a_point(tmp_path: Path) -> None:
    path = write(tmp_path, "x,y\n1,1.0\n1.0,0\n2,1\n,0.0\n")
    read = tomllib.loads(table_section(look_at_columns([path])[0], "y", ["x"]))
    assert read["model"]["classes"] == ["0", "1"]
    assert read["table"]["categorical"] == {"x": ["1", "2"]}


JSON_LINES = """
{"x": NaN, "tags": ["a"]}
{"y": "m", "x": 3, "tags": null, "colour": "red", "mixed": 1}
{"y": "n", "x": 5, "tags": {}, "mixed": [1]}
{"y": "n", "late": "z"}
"""


def test_rows_of_json_may_lack_columns_that_others_have(tmp_path: Path) -> None:
    path = write(tmp_path, JSON_LINES)
    columns, damaged, examples = look_at_columns([path])
    assert damaged == 1 and "line 4: the column 'mixed' holds several values" in examples[0]
    section = table_section(columns, "y")
    read = tomllib.loads(section)
    assert read["model"]["classes"] == ["m", "n"]
    assert read["table"]["numeric"] == ["x", "mixed"]
    assert read["table"]["categorical"] == {"colour": ["red"], "late": ["z"]}
    assert '# left out: "tags" holds several values in a row' in section
    with pytest.raises(DataError, match="the column 'tags' holds several values in a row: it is not a class"):
        table_section(columns, "tags")


def test_files_of_json_have_the_columns_of_all(tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text('{"y": "o", "w": 7}\n')
    columns, _, _ = look_at_columns([write(tmp_path, '{"y": "m", "x": 3}\n'), more])
    assert [(column.name, column.numbers, column.missing) for column in columns] == [
        ("y", 0, 0),
        ("x", 1, 1),
        ("w", 1, 1),
    ]


def test_labels_that_are_written_as_missing_are_told(tmp_path: Path) -> None:
    section = table_section(look_at_columns([write(tmp_path, "x,y\n1,none\n2,mild\n3,none\n4,NA\n5,\n")])[0], "y")
    assert tomllib.loads(section)["model"]["classes"] == ["mild"]
    assert (
        '# rows without a label: 4, also where it is "none" (2), "NA" (1): add what is a class to the list\n' in section
    )


def test_values_that_are_equal_once_normalised_are_one(tmp_path: Path) -> None:
    path = write(tmp_path, "x,y\ne\u0301,o\u0301\n\u00e9,\u00f3\na,b\n")
    read = tomllib.loads(table_section(look_at_columns([path])[0], "y"))
    assert read["model"]["classes"] == ["b", "\u00f3"]
    assert read["table"]["categorical"] == {"x": ["a", "\u00e9"]}


def test_a_column_of_lists_in_a_parquet_file_is_left_out(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"y": ["m", "n"], "tags": [[1], [2]], "x": [1, 3]}), tmp_path / "f.parquet")
    section = table_section(look_at_columns([tmp_path / "f.parquet"])[0], "y")
    assert tomllib.loads(section)["table"] == {"label": "y", "numeric": ["x"], "mean": [2.0], "std": [1.0]}
    assert '# left out: "tags" holds several values in a row' in section
