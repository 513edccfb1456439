"""The command line: help, messages of errors, and the record."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli import _event, _tables, describe, read_record
from coordinator.store.records import RoundRecord, Store
from fedepth.errors import ProtocolError
from fedepth.job import load_config, model_spec
from fedepth.job_changes import settings_of


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from coordinator.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", ["serve", "status", "export", "watch", "record", "backup", "rollback"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    told = run(command, "--help")
    assert told.returncode == 0
    assert f"Example: fedepth-coordinator {command} --" in told.stdout


@pytest.mark.parametrize("command", ["serve", "export", "record", "backup", "rollback"])
def test_commands_that_take_a_state_take_a_database_and_files(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDEPTH_DATABASE", "postgresql://user:secret@host/db")
    told = run(command, "--help").stdout
    assert "--database" in told
    assert "--files" in told
    assert "FEDEPTH_DATABASE" in told
    assert "FEDEPTH_FILES" in told
    assert "secret" not in told


def test_the_database_may_be_named_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDEPTH_DATABASE", "postgresql://user:secret@127.0.0.1:1/db")
    told = run("record", "--state", str(tmp_path))
    assert told.returncode == 1
    assert told.stderr.startswith("fedepth-coordinator: postgresql://127.0.0.1/db cannot be used now: ")
    assert "secret" not in told.stderr
    assert "Traceback" not in told.stderr


def test_errors_are_one_message_and_status_1(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('[job]\nname = "x"\nruonds = 1\n', encoding="utf-8")
    told = run("serve", "--config", str(tmp_path / "job.toml"), "--state", str(tmp_path / "state"), "--port", "0")
    assert told.returncode == 1
    assert told.stderr.splitlines() == [
        "fedepth-coordinator: job.toml: [job] ruonds: no such setting; did you mean rounds? (line 3, column 1: "
        "'ruonds = 1')"
    ]


def test_the_last_port_leaves_none_to_enrol_at(tmp_path: Path) -> None:
    command = ("serve", "--config", str(tmp_path / "job.toml"), "--state", str(tmp_path), "--port", "65535")
    told = run(*command)
    assert (told.returncode, told.stderr) == (
        1,
        "fedepth-coordinator: no port comes after --port 65535 at which devices could enrol; give --enroll-port\n",
    )
    for option in ("--no-enroll", "--insecure", "--enroll-port=0"):
        assert "job.toml" in run(*command, option).stderr  # goes on, and looks for the job


@pytest.mark.parametrize("option", ["--no-enroll", "--insecure"])
def test_a_port_at_which_nobody_could_enrol_is_refused(tmp_path: Path, option: str) -> None:
    told = run("serve", "--config", "job.toml", "--state", str(tmp_path), option, "--enroll-port", "1")
    assert told.returncode == 1
    assert told.stderr.startswith(f"fedepth-coordinator: --enroll-port: with {option} nobody can enrol; leave one of")


def test_status_of_nobody_says_where_it_looked() -> None:
    told = run("status", "--coordinator", "127.0.0.1:1", "--insecure")
    assert told.returncode == 1
    assert "no answer from a coordinator at 127.0.0.1:1" in told.stderr
    assert "Traceback" not in told.stderr


def test_record_shows_rounds_and_stages(tmp_path: Path, kit: Any) -> None:
    store = Store.open(tmp_path, "demo", model_spec(kit.config()))
    for number in (0, 1):
        partial = tmp_path / "weights" / "new.partial"
        partial.write_bytes(b"x")
        sealed = store.seal_weights(partial, number)
        store.record_round(RoundRecord(number, sealed.digest, sealed.size_bytes, 0.0, number, 20))
    store.set_evaluation(1, 0.875, 0.25)
    store.see_device(kit.report("a"))
    task = kit.task()
    store.record_task(task)
    store.files.spool(task.task_id, 1).mkdir()
    (store.files.spool(task.task_id, 1) / "part-0000.safetensors").write_bytes(b"x")
    store.record_update(kit.result(task, {0: b"x"}), None)
    # The store stays open: the record can be read beside a running coordinator.
    told = run("record", "--state", str(tmp_path), "--json")
    store.close()
    record = json.loads(told.stdout)
    assert [each["accuracy"] for each in record["rounds"]] == [None, 0.875]
    stages = record["updates"][0]["result"]["stages"]
    peaks = [(each["predicted_peak_bytes"], each["measured_peak_bytes"]) for each in stages]
    assert peaks == [(4000, 3900)] * 2
    table = run("record", "--state", str(tmp_path)).stdout
    assert "87.50%" in table
    assert "board a" in table


def test_an_export_of_another_jobs_file_is_refused(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text(
        '[job]\nname = "demo"\nrounds = 1\ndevices_per_round = 1\n'
        '[model]\nname = "digits-cnn"\nclasses = 10\ninput_shape = [1, 8, 8]\n'
        "[training]\nbatch = 8\nlocal_epochs = 1\nlearning_rate = 0.1\n"
    )
    config = load_config(job)
    store = Store.open(tmp_path / "state", "demo", model_spec(config), settings=settings_of(config))
    partial = tmp_path / "state" / "weights" / "new.partial"
    partial.write_bytes(b"x")
    sealed = store.seal_weights(partial, 0)
    store.record_round(RoundRecord(0, sealed.digest, sealed.size_bytes, 0.0, 0, 0))
    store.close()
    export = ("export", "--state", str(tmp_path / "state"), "--config", str(job), "--output")
    for old, new in (
        ("classes = 10", "classes = 9"),
        ("[1, 8, 8]", "[1, 8, 8]\nmean = [0.5]"),
        ("digits-cnn", "vit-tiny"),
    ):
        text = job.read_text()
        job.write_text(text.replace(old, new))
        told = run(*export, str(tmp_path / "m.onnx"))
        assert (told.returncode, "which a job keeps: put the old value" in told.stderr) == (1, True), told.stderr
        job.write_text(text)
    for name in (".", "labels.txt"):
        told = run(*export, str(tmp_path / name))
        assert (told.returncode, "is not the name of an ONNX file" in told.stderr) == (1, True), told.stderr


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
    stages = [
        {"models": 2, "first": 0, "last": 1, "predicted_peak_bytes": 1, "measured_peak_bytes": 1, "budget_bytes": 1}
    ]
    assert describe({**event, "stages": stages}).endswith("budget 1 B, 2 models")


HOSTILE = "[red]a\x1b[2J\nb\u202e"
SAFE = r"[red]a\x1b[2J\nb\u202e"


def test_names_in_an_event_neither_break_the_line_nor_steer_the_terminal() -> None:
    line = describe({"event": "device_seen\x1b[2J", "device": HOSTILE, "devices": [HOSTILE], HOSTILE: 1})
    assert line.isprintable()
    assert f"device={SAFE} " in line


def test_names_in_the_record_are_no_markup(tmp_path: Path, kit: Any) -> None:
    store = Store.open(tmp_path, "demo", model_spec(kit.config()))
    partial = tmp_path / "weights" / "new.partial"
    partial.write_bytes(b"x")
    sealed = store.seal_weights(partial, 0)
    store.record_round(RoundRecord(0, sealed.digest, sealed.size_bytes, 0.0, 0, 0))
    store.see_device(replace(kit.report("a"), name=HOSTILE))
    task = kit.task()
    store.record_task(task)
    store.files.spool(task.task_id, 1).mkdir()
    (store.files.spool(task.task_id, 1) / "part-0000.safetensors").write_bytes(b"x")
    store.record_update(kit.result(task, {0: b"x"}), None)
    stages = _tables(read_record(tmp_path))[1]
    store.close()
    assert [str(cell) for cell in stages.columns[1].cells] == [SAFE] * 2


@pytest.mark.parametrize(
    "line",
    ["", "{", "[1]", '{"stages": 3}', '{"stages": [{}]}', '{"stages": [{"first": null}]}', "[" * 100_000, "1" * 5000],
)
def test_an_event_that_cannot_be_shown_is_a_message(line: str) -> None:
    with pytest.raises(ProtocolError, match="sent an event that cannot be shown"):
        _event(line)
