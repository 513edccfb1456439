"""What an agent does about files with rows: counted before any job, by class with one; what does not fit is said."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from edge_client.data_check.client import check_rows
from edge_client.data_check.protocol import RowRequest
from edge_client.transport import Rejected
from fedepth.data.damage import load_row_check
from fedepth.errors import DataError
from fedepth.task import InputType, ModelSpec, Outcome, Task, TextSpec
from tests.edge_client.bench import OK, Bench, FakeTransport, MakeTask

TEXTS = ModelSpec("texts", ("a", "b"), (4,), (), (), InputType.TOKENS, text=TextSpec("label", ("text",), 100))
ROWS = "label,text\n" + "a,one\n" * 30 + "b,two\n" * 10


@pytest.fixture
def rows(bench: Bench, tmp_path: Path) -> Path:
    """The bench's data, a file."""
    bench.data = tmp_path / "rows.csv"
    bench.data.write_text(ROWS)
    return bench.data


def of_rows(task: Task, model: ModelSpec = TEXTS) -> Task:
    return replace(task, model=model)


def test_rows_are_counted_before_a_job_says_what_they_are(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, rows: Path
) -> None:
    transport.answers = [of_rows(make_task())]
    bench.run(transport, OK)
    assert transport.failures == []
    before, after = transport.reports
    assert (before.sample_count, before.class_counts, before.class_names) == (40, (), ())
    assert (after.sample_count, after.class_counts, after.class_names) == (40, (30, 10), ("a", "b"))
    (request,) = bench.requests
    assert request["data"] == str(rows)


def test_what_else_lies_in_a_folder_of_rows_is_told_before_there_is_a_job(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, tmp_path: Path
) -> None:
    bench.data = tmp_path / "folder"
    (bench.data / "sub").mkdir(parents=True)
    for name in ("train.csv", "test.csv", "january.csv", ".train.csv", "train.xlsx", "train.zip", "sub/train.csv"):
        (bench.data / name).write_text(ROWS)
    os.mkfifo(bench.data / "train-2.csv")
    (bench.data / "train-3.csv").symlink_to("nothing")
    transport.answers = [of_rows(make_task())]
    bench.run(transport, OK)
    first, _ = bench.said("training data")
    assert (first["samples"], first["left_out"]) == (40, 7)
    told = {line["reason"]: (line["number"], line["such_as"]) for line in bench.said("left out of the training data")}
    assert told == {
        "a file of no split: call it train-….csv, or leave it": (1, "january.csv"),
        "a folder: only files beside it are read": (1, "sub"),
        "a pipe": (1, "train-2.csv"),
        "a spreadsheet: save it as CSV": (1, "train.xlsx"),
        "an archive: unpack it": (1, "train.zip"),
        "hidden": (1, ".train.csv"),
        "link to nothing": (1, "train-3.csv"),
    }


def test_damaged_rows_are_named_and_left_out(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, rows: Path
) -> None:
    rows.write_text(ROWS + "a\n" + "c,three\n")
    transport.answers = [of_rows(make_task())]
    bench.run(transport, OK)
    assert [report.sample_count for report in transport.reports] == [41, 40]
    told = [line["row"] for line in bench.said("damaged")]
    assert told == [
        f"{rows}, line 42: has 1 field, the first line names 2 columns",
        f"{rows}, line 42: has 1 field, the first line names 2 columns",
        f"{rows}, line 43: has the label 'c', which is not a class of the job ('a', 'b')",
    ]


def test_too_many_damaged_rows_end_the_task(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, rows: Path
) -> None:
    rows.write_text(ROWS + "c,three\n" * 5)
    transport.answers = [of_rows(make_task())]
    bench.run(transport)
    (failure,) = transport.failures
    assert failure.outcome is Outcome.DATA
    assert "5 of 45 rows are damaged (11%), and most_damaged allows 5%" in failure.message
    transport.answers = [of_rows(make_task(task_id="t1"))]
    bench.run(transport, OK, most_damaged=0.2)
    assert len(transport.delivered) == 1


def test_a_file_without_the_columns_of_the_job(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, rows: Path
) -> None:
    rows.write_text(ROWS.replace("text", "message"))
    transport.answers = [of_rows(make_task())]
    bench.run(transport)
    (failure,) = transport.failures
    assert failure.outcome is Outcome.DATA
    assert f"{rows} has no column 'text'; it has 'label', 'message'" in failure.message


def test_rows_for_a_job_with_images_and_the_other_way_round(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, rows: Path, data: Path
) -> None:
    transport.answers = [make_task()]
    bench.run(transport)
    bench.data = data
    transport.answers = [of_rows(make_task())]
    bench.run(transport)
    first, second = (failure.message for failure in transport.failures)
    assert f"{rows} is a file of rows, and toy takes other inputs" in first
    assert f"rows of files with the columns 'label' (the class) and 'text'; {data} holds none" in second


def test_a_table_beside_folders_of_images_is_no_data_of_a_job_with_images(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, data: Path
) -> None:
    (data / "labels.csv").write_text(ROWS)
    transport.answers = [make_task()]
    bench.run(transport, OK)
    assert [report.class_counts for report in transport.reports] == [(4, 2), (4, 2)]
    (data / "labels.csv").rename(data / "train.csv")
    transport.answers = [of_rows(make_task()), make_task("t2")]
    bench.run(transport, OK, OK)
    assert [report.sample_count for report in transport.reports[2:]] == [40, 40, 6]


def test_nothing_to_train_on_is_said_at_the_start(bench: Bench, transport: FakeTransport, rows: Path) -> None:
    for text, words in (
        ("", "is empty"),
        ("label,text\n", "holds no row to train on"),
        ("PK\x03\x04", "save the sheet as CSV"),
    ):
        rows.write_text(text)
        with pytest.raises(DataError, match=words):
            bench.run(transport)


def test_rows_are_checked_again_only_where_something_changed(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, rows: Path
) -> None:
    checked: list[str] = []

    async def counting(request: RowRequest, on_progress: object) -> object:
        checked.append("by class" if request.model else "fields")
        return await check_rows(request, lambda rows: None)

    transport.answers = [of_rows(make_task())]
    agent = bench.agent(transport, [OK])
    agent._samples._check_rows = counting  # type: ignore[assignment]
    asyncio.run(asyncio.wait_for(agent.run(), 60))
    assert checked == ["fields", "by class"]
    assert load_row_check(bench.state / "data-check") is not None


def test_the_classes_of_a_job_that_is_gone_are_forgotten(
    bench: Bench, transport: FakeTransport, make_task: MakeTask, rows: Path
) -> None:
    other = replace(TEXTS, classes=("b", "a"))
    transport.answers = [of_rows(make_task()), Rejected("other classes", 10.0), of_rows(make_task("t2"), other)]
    bench.run(transport, OK, OK)
    assert [report.class_names for report in transport.reports] == [(), ("a", "b"), (), ("b", "a")]
    assert transport.reports[-1].class_counts == (10, 30)


def test_a_check_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.csv does not exist"):
        asyncio.run(check_rows(RowRequest(str(tmp_path / "rows.csv"), str(tmp_path / "record")), lambda rows: None))
