"""Updates that go up as int8, on real processes: what they leave out goes on over rounds and kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.lab import program
from fedepth.files import file_digest
from fedepth.kept_files import number_and_digest
from fedepth.weights import open_weights


def kept(rig: Any, name: str) -> dict[str, int]:
    """The bytes that a device keeps, by the round that left them."""
    found: dict[str, int] = {}
    for path in (rig.folder / name / "residuals").glob("*/*/*"):
        said = number_and_digest(path.name)
        assert said is not None and file_digest(path) == said[1]
        number = path.parent.name.partition("-")[0]
        found[number] = found.get(number, 0) + path.stat().st_size
    return found


def test_int8_over_rounds_a_killed_agent_and_a_killed_coordinator(rig: Any) -> None:
    job = rig.job(rounds=3, epochs=3)
    job.write_text(job.read_text() + '\n[transfer]\nencoding = "int8"\n')
    rig.lab.start_coordinator(job, "--exit-when-done")
    for number in (0, 1):
        rig.agent(number, "--exit-when-done")
    rig.event("device-0", "residual kept")
    rig.event("coordinator", "task_given", device="device-0", round=2)
    port = rig.lab.address.rpartition(":")[2]
    for name in ("device-0", "coordinator"):
        victim = rig.lab.processes[name]
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
    rig.lab.start_coordinator(job, "--port", port, "--exit-when-done")
    rig.agent(0, "--exit-when-done")
    assert [rig.end(name) for name in ("coordinator", "device-0", "device-1")] == [0, 0, 0]

    argv = [program("fedepth-coordinator"), "record", "--state", str(rig.lab.coordinator_state), "--json"]
    record = json.loads(subprocess.run(argv, check=True, capture_output=True, timeout=300).stdout)
    assert [each["published"] for each in record["rounds"]] == [True] * len(record["rounds"])
    assert len(record["updates"]) == 6
    whole = weights_bytes(rig)
    for update in record["updates"]:
        assert sum(part["size_bytes"] for part in update["result"]["parts"]) < 0.35 * whole
        for stage in update["result"]["stages"]:
            assert 0 < stage["measured_peak_bytes"] <= stage["budget_bytes"]
    for name in ("device-0", "device-1"):
        ((number, size),) = kept(rig, name).items()
        assert number == "00000003" and 0.8 * whole < size < 1.05 * whole
    begun = {}
    for line in rig.log("device-0"):
        if line["event"] == "residual kept":
            begun[line["of"].partition("-")[0]] = line["of"]
    assert sorted(begun) == ["00000001", "00000002", "00000003"]


def weights_bytes(rig: Any) -> int:
    path: Path = next((rig.lab.coordinator_state / "weights").glob("round-*.safetensors"))
    open_weights(path)
    return path.stat().st_size
