"""A device with surplus memory distils from a model of its own, over rounds and restarts."""

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

MIB = 1 << 20


def kept(rig: Any, name: str) -> dict[int, str]:
    """The digest of the one peer of a device, by round."""
    found = {}
    for path in (rig.folder / name / "peers").glob("*/*/*"):
        slot, digest = number_and_digest(path.name) or (0, "")
        assert slot == 1
        assert file_digest(path) == digest
        found[int(path.parent.name)] = digest
    return found


def test_a_peer_goes_on_over_rounds_and_a_kill_and_never_leaves_its_device(rig: Any) -> None:
    job = rig.job(rounds=3, epochs=3)
    job.write_text(job.read_text().replace("batch = 32", "batch = 32\nmutual = 2"))
    rig.lab.start_coordinator(job, "--exit-when-done")
    rig.agent(1, "--exit-when-done", cap=13 * MIB)  # enough for one model
    rig.agent(0, "--exit-when-done")
    rig.event("device-0", "peer kept", round=1)
    rig.event("coordinator", "task_given", device="device-0", round=2)
    victim = rig.lab.processes["device-0"]
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    rig.agent(0, "--exit-when-done")
    assert [rig.end(name) for name in ("coordinator", "device-0", "device-1")] == [0, 0, 0]

    said = rig.log("device-0")
    ended = {line["round"]: line["sha256"] for line in said if line["event"] == "peer kept"}
    begun = {line["of_round"]: line["sha256"] for line in said if line["event"] == "a peer goes on"}
    assert ended.keys() == {1, 2, 3}
    assert begun == {number: ended[number] for number in (1, 2)}
    assert len(set(ended.values())) == 3
    assert kept(rig, "device-0") == {number: ended[number] for number in (2, 3)}
    assert not (rig.folder / "device-1" / "peers").exists()

    argv = [program("fedepth-coordinator"), "record", "--state", str(rig.lab.coordinator_state), "--json"]
    record = json.loads(subprocess.run(argv, check=True, capture_output=True, timeout=300).stdout)
    models: dict[str, set[int]] = {"device-0": set(), "device-1": set()}
    for update in record["updates"]:
        result = update["result"]
        (sizes,) = {sum(part["size_bytes"] for part in result["parts"])}
        assert sizes < 1.1 * weights_bytes(rig)
        for stage in result["stages"]:
            models[update["device"]].add(stage["models"])
            assert 0 < stage["measured_peak_bytes"] <= stage["budget_bytes"]
            if stage["models"] == 2:
                assert stage["measured_peak_bytes"] <= 1.15 * stage["predicted_peak_bytes"]
    assert models == {"device-0": {2}, "device-1": {1}}


def weights_bytes(rig: Any) -> int:
    path: Path = next((rig.lab.coordinator_state / "weights").glob("round-*.safetensors"))
    open_weights(path)
    return path.stat().st_size
