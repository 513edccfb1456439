"""The command line: help, messages of errors, and the record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli import describe
from coordinator.store.records import Store
from fedepth.job import model_spec


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from coordinator.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", ["serve", "status", "export", "watch", "record"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    told = run(command, "--help")
    assert told.returncode == 0
    assert f"Example: fedepth-coordinator {command} --" in told.stdout


def test_errors_are_one_message_and_status_1(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('[job]\nname = "x"\nruonds = 1\n', encoding="utf-8")
    told = run("serve", "--config", str(tmp_path / "job.toml"), "--state", str(tmp_path / "state"))
    assert told.returncode == 1
    assert told.stderr.splitlines() == [
        "fedepth-coordinator: job.toml: [job] ruonds: no such setting; did you mean rounds?"
    ]


def test_status_of_nobody_says_where_it_looked() -> None:
    told = run("status", "--coordinator", "127.0.0.1:1")
    assert told.returncode == 1
    assert "no answer from a coordinator at 127.0.0.1:1" in told.stderr
    assert "Traceback" not in told.stderr


def test_record_shows_rounds_and_stages(tmp_path: Path, kit: Any) -> None:
    store = Store.open(tmp_path, "demo", model_spec(kit.config()))
    for number in (0, 1):
        partial = tmp_path / "weights" / "new.partial"
        partial.write_bytes(b"x")
        store.record_round(store.seal_weights(partial, number, number, 20))
    store.set_evaluation(1, 0.875, 0.25)
    store.see_device(kit.report("a"))
    task = kit.task()
    store.record_task(task)
    store.record_update(kit.result(task, {0: b"x"}))
    # The store stays open: the record can be read beside a running coordinator.
    told = run("record", "--state", str(tmp_path), "--json")
    store.close()
    record = json.loads(told.stdout)
    assert [each["accuracy"] for each in record["rounds"]] == [-1.0, 0.875]
    stages = record["updates"][0]["result"]["stages"]
    peaks = [(each["predicted_peak_bytes"], each["measured_peak_bytes"]) for each in stages]
    assert peaks == [(4000, 3900)] * 2
    table = run("record", "--state", str(tmp_path)).stdout
    assert "87.50%" in table
    assert "board a" in table


def test_an_event_is_told_in_lines() -> None:
    event = {
        "event": "update_accepted",
        "time": 1.0,
        "device": "pi",
        "stages": [
            {
                "first": 0,
                "last": 1,
                "predicted_peak_bytes": 1 << 20,
                "measured_peak_bytes": 1 << 19,
                "budget_bytes": 1 << 21,
            }
        ],
    }
    lines = describe(event).splitlines()
    assert lines[0].split() == ["update_accepted", "device=pi"]
    assert lines[1].strip() == "units 0-1: predicted 1.0 MiB, measured 512.0 KiB, budget 2.0 MiB"
