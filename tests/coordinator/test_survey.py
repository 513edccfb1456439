"""Devices are asked what their rows have in the columns of a table, before the first task."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fedepth_wire.convert import from_message, to_message
from fedepth_wire.v1 import federation_pb2 as pb

from coordinator.store.records import Store
from coordinator.survey import PHASE, Survey
from fedepth.budget import Budget
from fedepth.data.column_sums import ColumnSums, Statistics
from fedepth.data.row_files import asked_of
from fedepth.errors import DataError, UnavailableError
from fedepth.job import load_config, model_spec
from fedepth.task import SETTINGS, DeviceReport, ModelSpec

JOB = """\
[job]
name = "table"
rounds = 2
devices_per_round = 2
gather_s = 0.1

[model]
name = "table-mlp"
classes = ["no", "yes"]

[table]
label = "class"
numeric = ["a", "b"]
"""
BUDGET = Budget(8 << 30, 8 << 30, (), 0, 0, 1.0, 0, 1 << 30)


@pytest.fixture
def config(tmp_path: Path) -> Any:
    (tmp_path / "job.toml").write_text(JOB)
    return load_config(tmp_path / "job.toml")


@pytest.fixture
def store(tmp_path: Path, config: Any) -> Any:
    opened = Store.open(tmp_path / "state", "table", model_spec(config))
    yield opened
    opened.close()


def report(device: str, columns: ColumnSums | None = None) -> DeviceReport:
    """As the coordinator gets it, through a message."""
    made = DeviceReport(device, device, BUDGET, 10, (4, 6), class_names=("no", "yes"), settings=SETTINGS)
    return from_message(to_message(replace(made, columns=columns), pb.DeviceReport), DeviceReport)


def sums(config: Any, mean: float, count: int = 10) -> ColumnSums:
    return ColumnSums(asked_of(model_spec(config)), (count, 5), (mean, 7.0), (0.0, 20.0))


def test_devices_are_asked_and_what_they_tell_holds_for_the_job(config: Any, store: Store) -> None:
    async def scene() -> None:
        survey = Survey(config, store)
        found = asyncio.ensure_future(survey.statistics())
        asked = survey.answer(report("b")).survey
        assert (asked.job, from_message(asked.model, ModelSpec)) == ("table", model_spec(config))
        assert survey.answer(report("b", sums(config, 2.0))).retry.reason.endswith("waiting for 1 more of 2 devices")
        assert survey.answer(report("b", sums(config, 4.0))).retry.reason.endswith("waiting for 1 more of 2 devices")
        assert survey.status()["phase"] == PHASE
        assert not found.done()
        survey.answer(report("a", sums(config, 2.0)))
        # (10 · 2 + 10 · 4) / 20 = 3, with squares of 20 · 1; and 7 with squares of 40 in 10 numbers.
        assert await found == Statistics((3.0, 7.0), (1.0, 2.0), 2)

    asyncio.run(scene())
    assert store.statistics() == Statistics((3.0, 7.0), (1.0, 2.0), 2)


def test_the_order_in_which_devices_come_changes_no_digit(config: Any, tmp_path: Path) -> None:
    found = []
    for order in (("a", "b", "c"), ("c", "a", "b")):
        store = Store.open(tmp_path / order[0], "table", model_spec(config))
        survey = Survey(config, store)
        for device in order:
            survey.answer(report(device, sums(config, {"a": 0.1, "b": 1e9, "c": -1e-7}[device])))
        found.append(asyncio.run(survey.statistics()))
        store.close()
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"counts": (11, 5)}, "tells 11 numbers in the column 'a', and has 10 samples"),
        ({"counts": (1,)}, "tells sums of 1 columns, the job has 2"),
        ({"means": (1e19, 0.0)}, "tells the mean 1e.19"),
        ({"squares": (1e40, 0.0)}, "squares 1e.40 of the column 'a'"),
    ],
)
def test_sums_that_cannot_be_are_rejected(config: Any, store: Store, changes: dict[str, Any], said: str) -> None:
    survey = Survey(config, store)
    answer = survey.answer(report("a", replace(sums(config, 2.0), **changes)))
    assert answer.WhichOneof("outcome") == "rejected"
    assert re.search(said, answer.rejected.message)
    assert survey.missing == 2


def test_sums_for_another_job_are_asked_for_again(config: Any, store: Store) -> None:
    answer = Survey(config, store).answer(report("a", replace(sums(config, 2.0), asked="0" * 64)))
    assert answer.WhichOneof("outcome") == "survey"


def test_a_column_in_which_nobody_has_a_number_ends_the_job(config: Any, store: Store) -> None:
    survey = Survey(config, store)
    for device in ("a", "b"):
        survey.answer(report(device, replace(sums(config, 2.0), counts=(10, 0), squares=(0.0, 0.0))))
    assert survey.missing == 0
    with pytest.raises(DataError, match="no device has a number in the column 'b'"):
        asyncio.run(survey.statistics())
    assert store.statistics() is None


def test_a_record_that_cannot_be_written_is_tried_again(
    config: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []
    record = store.record_statistics

    def failing(found: Statistics) -> None:
        tries.append(found)
        if len(tries) == 1:
            raise UnavailableError("the disk is full")
        record(found)

    monkeypatch.setattr(store, "record_statistics", failing)
    monkeypatch.setattr("coordinator.survey._BUSY_S", 0.0)
    survey = Survey(config, store)
    for device in ("a", "b"):
        survey.answer(report(device, sums(config, 2.0)))
    found = asyncio.run(survey.statistics())
    assert tries == [found, found]
    assert store.statistics() == found
