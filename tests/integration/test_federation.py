"""Whole federations: real coordinator, agents and trainers over loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import onnx
import pytest

from benchmarks.lab import program, status_bytes

MIB = 1 << 20


def record(rig: Any) -> dict[str, Any]:
    """What the coordinator's record says, as a user would ask for it."""
    argv = [program("fedepth-coordinator"), "record", "--state", str(rig.lab.coordinator_state), "--json"]
    loaded: dict[str, Any] = json.loads(subprocess.run(argv, check=True, capture_output=True, timeout=300).stdout)
    return loaded


def mapped_files(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def children(pid: int) -> list[int]:
    """Child processes of a process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(stat.rpartition(")")[2].split()[1]) == pid:
            found.append(int(folder.name))
    return found


def test_two_unequal_devices_train_a_model_that_leaves_as_onnx(rig: Any) -> None:
    rig.start_coordinator(rig.job(rounds=2, test=True), "--exit-when-done")
    rig.agent(0, "--exit-when-done", cap=11 * MIB)
    rig.agent(1, "--exit-when-done")
    rig.event("coordinator", "round_closed", round=1)
    server = rig.lab.processes["coordinator"].pid
    agents = [rig.lab.processes[f"device-{number}"].pid for number in (0, 1)]
    for pid in (server, *agents):
        assert "libtorch" not in mapped_files(pid)
    for pid in agents:
        idle = status_bytes(pid, "VmRSS")
        assert idle <= 60 * MIB, idle / MIB
    exported = rig.event("coordinator", "exported")
    assert [rig.end(name) for name in ("coordinator", "device-0", "device-1")] == [0, 0, 0]

    model = onnx.load(exported["path"])
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["job"] == "test" and metadata["round"] == "2"
    assert exported["parity_max_abs"] <= 1e-4
    said = [line["event"] for line in rig.log("device-0")]
    assert said.index("a finished block is with the coordinator") < said.index("task trained")
    given = {line["device"]: line for line in rig.log("coordinator") if line.get("event") == "task_given"}
    assert given["device-1"]["blocks"] == "0-5"
    assert "|" in given["device-0"]["blocks"]  # its cap made it split
    text = json.dumps(record(rig))
    assert "measured_peak_bytes" in text and "predicted_peak_bytes" in text


CUSTOM = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout2d(0.1),
        nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )
"""


def libraries_of(pid: int) -> set[str]:
    """Names of the shared libraries that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {Path(line.split()[-1]).name for line in lines if "/" in line}


def test_devices_train_models_whose_code_only_the_coordinator_has(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, without = rig.folder / "code", rig.folder / "without"
    for library in ("timm", "torchvision"):
        (without / library).mkdir(parents=True)
        (without / library / "__init__.py").write_text(f'raise ImportError("{library} is not installed here")')
    code.mkdir()
    (code / "only_here.py").write_text(CUSTOM)
    job = rig.job(devices=1, quorum=1, model="only_here:build", epochs=2, test=True)
    # At 0.05 logits may reach hundreds, of which float32 has too few digits left to compare exports by.
    job.write_text(job.read_text().replace("learning_rate = 0.05", "learning_rate = 0.005"))
    with monkeypatch.context() as only:
        only.setenv("PYTHONPATH", str(code))
        rig.lab.start_coordinator(job, "--exit-when-done")
    with monkeypatch.context() as device:
        device.setenv("PYTHONPATH", str(without))
        rig.agent(0, "--exit-when-done")
    rig.event("device-0", "stage started")
    (trainer,) = children(rig.lab.processes["device-0"].pid)
    assert not any("torchvision" in name or name == "_C.so" for name in libraries_of(trainer))
    exported = rig.event("coordinator", "exported")
    assert [rig.end(process) for process in ("coordinator", "device-0")] == [0, 0]
    assert Path(exported["path"]).stat().st_size > 0  # it is there only if it gives what the model gives


def test_a_device_that_dies_does_not_hold_the_round(rig: Any) -> None:
    rig.start_coordinator(rig.job(quorum=1, deadline=12), "--exit-when-done")
    rig.agent(0, images=30 * 96)
    rig.agent(1, images=30 * 96)
    rig.event("coordinator", "task_given", device="device-0")
    rig.event("device-0", "trainer started")
    victim = rig.lab.processes["device-0"]
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    closed = rig.event("coordinator", "round_closed", round=1)
    assert closed["round"] == 1
    accepted = [line["device"] for line in rig.log("coordinator") if line.get("event") == "update_accepted"]
    assert accepted == ["device-1"]


def test_an_agent_survives_its_trainer_and_still_delivers(rig: Any) -> None:
    rig.start_coordinator(rig.job(devices=1, quorum=1), "--exit-when-done")
    rig.agent(0, images=40 * 96)
    rig.event("device-0", "stage started")
    (trainer,) = children(rig.lab.processes["device-0"].pid)
    os.kill(trainer, signal.SIGKILL)
    rig.event("coordinator", "update_accepted", device="device-0")
    assert rig.lab.processes["device-0"].poll() is None
    assert "signal 9" in rig.lab.log("device-0").read_text()


def test_the_coordinator_goes_on_where_it_stopped(rig: Any) -> None:
    job = rig.job(rounds=3, devices=1, quorum=1)
    rig.start_coordinator(job)
    rig.agent(0, "--exit-when-done", images=20 * 96)
    rig.event("coordinator", "task_given", round=2)
    first = rig.lab.processes["coordinator"]
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 0
    port = rig.lab.address.rpartition(":")[2]
    rig.lab.log("coordinator").rename(rig.folder / "first.log")
    rig.lab.start_coordinator(job, "--port", port, "--exit-when-done")
    assert rig.end("coordinator") == 0
    rounds = [line["round"] for line in rig.log("coordinator") if line.get("event") == "round_closed"]
    assert rounds == [2, 3]
    assert rig.end("device-0") == 0


def test_an_update_waits_in_the_outbox_until_the_coordinator_is_back(rig: Any) -> None:
    job = rig.job(devices=1, quorum=1)
    rig.start_coordinator(job)
    rig.agent(0, images=60 * 96)
    rig.event("device-0", "stage started")
    first = rig.lab.processes["coordinator"]
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    outbox = rig.folder / "device-0" / "outbox"
    rig.wait("device-0", lambda _: any(outbox.glob("[!.]*")))
    port = rig.lab.address.rpartition(":")[2]
    rig.lab.log("coordinator").rename(rig.folder / "first.log")
    rig.lab.start_coordinator(job, "--port", port)
    rig.event("coordinator", "update_accepted", device="device-0")
    rig.event("device-0", "update accepted")
    rig.wait("device-0", lambda _: not any(outbox.glob("[!.]*")))


def test_a_budget_that_no_plan_fits_is_told_with_its_numbers(rig: Any) -> None:
    rig.start_coordinator(rig.job(devices=1, quorum=1))
    rig.agent(0, cap=5 * MIB)
    line = rig.wait("device-0", lambda line: "the smallest plan needs" in json.dumps(line))
    assert re.search(r"the smallest plan needs \d+\.\d MiB, but only 5\.0 MiB is free", json.dumps(line))
    assert rig.lab.processes["device-0"].poll() is None


def test_an_agent_without_memory_to_measure_itself_says_so_and_stays(
    rig: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-record-yet"))
    config = tmp_path / "agent.toml"
    config.write_text('[memory]\nreserve = "1000GiB"\n')
    rig.start_coordinator(rig.job(devices=1, quorum=1))
    rig.agent(0, "--config", str(config))
    told = rig.event("device-0", "calibration failed; planning with default figures")
    assert re.search(r"\d+\.\d MiB of free memory in addition to the trainer, but only 0 B is free", told["error"])
    rig.wait("device-0", lambda line: "the smallest plan needs" in json.dumps(line))
    assert rig.lab.processes["device-0"].poll() is None
    assert not list(tmp_path.rglob("calibration-*.json"))


def test_labels_outside_the_job_are_told_and_the_agent_stays(rig: Any) -> None:
    job = rig.job(devices=1, quorum=1)
    job.write_text(job.read_text().replace("classes = 10", 'classes = ["zero", "one"]'))
    rig.start_coordinator(job)
    rig.agent(0)
    line = rig.wait(
        "device-0", lambda line: line.get("level") in ("error", "warning") and "classes" in json.dumps(line)
    )
    assert "10" in json.dumps(line)
    assert rig.lab.processes["device-0"].poll() is None


@pytest.mark.parametrize("missing", [True, False])
def test_a_data_directory_that_is_missing_or_empty_is_told(rig: Any, missing: bool) -> None:
    data = rig.folder / "nothing"
    if not missing:
        data.mkdir()
    state = rig.lab.certificates.enroll("device", rig.folder / "state")
    argv = [program("fedepth-client"), "run", "--coordinator", "127.0.0.1:1", "--data", str(data)]
    ended = subprocess.run([*argv, "--state", str(state)], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 1
    assert str(data) in ended.stderr and "Traceback" not in ended.stderr


def test_an_unreachable_coordinator_is_told_at_once_and_retried(rig: Any) -> None:
    rig.lab.address = "127.0.0.1:9"
    rig.agent(0)
    rig.wait(
        "device-0",
        lambda line: "127.0.0.1:9" in json.dumps(line) and line.get("level") in ("warning", "error"),
    )
    process = rig.lab.processes["device-0"]
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_a_port_in_use_is_told(rig: Any) -> None:
    address = rig.start_coordinator(rig.job())
    port = address.rpartition(":")[2]
    argv = [program("fedepth-coordinator"), "serve", "--config", str(rig.job()), "--port", port, "--insecure"]
    ended = subprocess.run(
        [*argv, "--state", str(rig.folder / "other")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 1
    assert port in ended.stderr and "Traceback" not in ended.stderr


def test_a_misspelt_key_is_named(rig: Any) -> None:
    job = rig.job()
    job.write_text(job.read_text().replace("learning_rate", "learning_rat"))
    argv = [program("fedepth-coordinator"), "serve", "--config", str(job), "--state", str(rig.folder / "s")]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 1
    assert "learning_rat" in ended.stderr and "did you mean learning_rate?" in ended.stderr
