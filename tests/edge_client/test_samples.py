"""What an agent does about its data: damaged files, classes that it lacks, data that changes while it waits."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_client.data_check.client import check_files
from edge_client.data_check.process import answer
from edge_client.data_check.protocol import Checked, CheckFailed, CheckRequest
from edge_client.transport import Answer, Rejected
from fedepth.data.damage import load_damage
from fedepth.errors import ChildError, DataError
from fedepth.task import DeviceReport, Outcome
from tests.edge_client.bench import OK, Bench, FakeTransport, MakeTask
from tests.edge_client.conftest import PICTURE

DAMAGED_INSIDE = {"do": "fail", "outcome": "data", "damaged": True}


def rot(path: Path) -> None:
    """Damages a picture where only decoding finds it."""
    path.write_bytes(PICTURE.replace(bytes.fromhex("789c63"), bytes.fromhex("000000")))


def test_a_file_that_training_finds_damaged_is_left_out_and_the_task_goes_on(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    rot(bench.data / "train/a/0.png")
    transport.answers = [make_task()]
    bench.run(transport, DAMAGED_INSIDE, OK, most_damaged=0.2)
    first, second = bench.requests
    assert (first["damage"], len(second["damage"])) == ([], 1)
    assert transport.failures == []
    assert len(transport.delivered) == 1
    assert [report.sample_count for report in transport.reports] == [6, 5]
    assert "checking the data" in [progress.activity for progress in transport.progress]
    (line,) = bench.said("damaged")
    assert "a/0.png cannot be read as an image" in line["file"]


def test_too_many_of_them_end_the_task_with_their_share(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    rot(bench.data / "train/a/0.png")
    transport.answers = [make_task()]
    bench.run(transport, DAMAGED_INSIDE)
    (failure,) = transport.failures
    assert failure.outcome is Outcome.DATA
    assert "1 of 6 image files are damaged (17%), and most_damaged allows 5%" in failure.message


def test_a_trainer_that_meets_damage_where_there_is_none_is_not_asked_for_ever(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    transport.answers = [make_task()]
    bench.run(transport, DAMAGED_INSIDE)
    (failure,) = transport.failures
    assert (failure.outcome, failure.message) == (Outcome.DATA, "said data")
    assert len(bench.requests) == 3


def test_classes_that_the_device_lacks_are_said_once_for_a_job(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    task = make_task()
    model = replace(task.model, classes=("a", "b", "c"))
    transport.answers = [replace(task, model=model), replace(task, task_id="t2", model=model)]
    bench.run(transport, OK)
    (line,) = bench.said("this device has no samples of some classes of the job")
    assert (line["job"], line["lacking"], line["classes"]) == ("job", "'c'", 3)
    assert transport.reports[0].class_names == ("a", "b")


def test_folders_of_other_classes_are_named_with_what_was_meant(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    (bench.data / "train/a").rename(bench.data / "train/A")
    transport.answers = [make_task()]
    bench.run(transport, OK)
    (failure,) = transport.failures
    assert failure.outcome is Outcome.DATA
    assert "folder 'A' - did you mean class 'a'?" in failure.message


def test_a_class_called_as_a_split_is_reported_and_trained_on(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    for name, new in (("train/a", "a"), ("train/b", "test")):
        (bench.data / name).rename(bench.data / new)
    (bench.data / "train").rmdir()
    task = make_task()
    transport.answers = [replace(task, model=replace(task.model, classes=("a", "test")))]
    bench.run(transport, OK)
    report = transport.reports[0]
    assert (report.sample_count, report.class_names) == (4, ("a",))
    assert (report.folder_names, report.folder_counts) == (("a", "test"), (4, 2))
    (asked,) = bench.requests
    assert asked["most_samples"] == 6
    (line,) = bench.said("training data for this job")
    assert (line["samples"], line["classes"]) == (6, 2)


def changing(transport: FakeTransport, path: Path, seen: list[Answer]) -> FakeTransport:
    """A coordinator that refuses, and data that is added to after the first refusal."""

    class Changing(FakeTransport):
        async def next_task(self, report: DeviceReport, wait_s: float) -> Answer:
            if len(self.reports) == 1:
                path.write_bytes(PICTURE)
            return await super().next_task(report, wait_s)

    return Changing(transport.weights, list(seen))


def test_data_that_changes_ends_the_pause_of_a_rejected_device(bench: Bench, transport: FakeTransport) -> None:
    asking = changing(transport, bench.data / "train/b/new.png", [Rejected("no", 3600.0), Rejected("no", 3600.0)])
    bench.run(asking, OK)
    assert [report.sample_count for report in asking.reports] == [6, 6, 7]
    assert sum(bench.clock.pauses[:60]) == 3600.0
    assert len(bench.said("the training samples have changed; asking again")) == 1
    assert bench.clock.time < 3600.0 + 120.0


def test_a_task_that_failed_for_want_of_data_is_tried_again_when_there_is_other_data(
    bench: Bench, transport: FakeTransport, make_task: MakeTask
) -> None:
    task = make_task()
    asking = changing(transport, bench.data / "train/b/new.png", [task] * 3)
    bench.run(asking, {"do": "fail", "outcome": "data"}, OK)
    assert len(bench.requests) == 2
    assert len(asking.delivered) == 1
    assert len(bench.said("the training samples have changed; asking again")) == 1


# --- the child that looks at the files


def request(tmp_path: Path, data: Path, **fields: Any) -> CheckRequest:
    return CheckRequest(str(data), str(tmp_path / "state/data-check"), **fields)


def test_a_check_in_a_process_of_its_own_leaves_a_record(tmp_path: Path, data: Path) -> None:
    rot(data / "train/a/0.png")
    asked = request(tmp_path, data, decode=True)
    found = asyncio.run(check_files(asked, lambda files: None))
    assert found == load_damage(Path(asked.record))
    assert (len(found.damaged), found.decoded) == (1, True)
    with pytest.raises(DataError, match="absent does not exist"):
        asyncio.run(check_files(request(tmp_path, tmp_path / "absent"), lambda files: None))


def test_a_check_answers_with_what_it_could_not_record(tmp_path: Path, data: Path) -> None:
    (tmp_path / "state").write_bytes(b"not a folder")
    (data / "train/a/0.png").write_bytes(b"damaged")
    told: list[int] = []
    found = answer(request(tmp_path, data), told.append)
    assert isinstance(found, Checked)
    assert found.damage is not None
    assert len(found.damage.damaged) == 1
    assert told == [1, 2, 3, 4, 5, 6]
    assert isinstance(answer(request(tmp_path, tmp_path / "absent"), told.append), CheckFailed)


def test_a_check_that_dies_is_told(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_client.data_check.client.module_argv", lambda module: ["false"])
    with pytest.raises(ChildError, match=r"data check .* ended with status 1"):
        asyncio.run(check_files(request(tmp_path, data), lambda files: None))
