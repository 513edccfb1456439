"""Federations of real processes that train by other methods than the shared head alone."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.lab import program
from fedepth.weights import load_numpy

MIB = 1 << 20
CHANCE = 0.1


def stages_in(value: Any) -> Iterator[dict[str, Any]]:
    """All stages that a record tells of."""
    if isinstance(value, dict):
        if "measured_peak_bytes" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from stages_in(each)


def first_and_last_weights(state: Path) -> list[dict[str, Any]]:
    files = sorted((state / "weights").glob("round-*.safetensors"))
    return [load_numpy(files[0]), load_numpy(files[-1])]


SETTINGS = """\
[training]
heads = "auxiliary"
distil = "global"
distil_weight = 0.5
distil_temperature = 2.0
"""


def test_a_federation_learns_stays_inside_its_budget_and_exports(rig: Any) -> None:
    job = rig.job(rounds=3, epochs=4, test=True)
    job.write_text(job.read_text().replace("[training]", SETTINGS.strip()))
    rig.lab.start_coordinator(job, "--exit-when-done")
    rig.agent(0, "--exit-when-done", cap=11 * MIB)
    rig.agent(1, "--exit-when-done")
    exported = rig.event("coordinator", "exported")
    assert [rig.end(name) for name in ("coordinator", "device-0", "device-1")] == [0, 0, 0]

    accuracies = [line["accuracy"] for line in rig.log("coordinator") if line.get("event") == "evaluated"]
    assert accuracies[-1] > 2 * CHANCE, accuracies
    given = {line["device"]: line["blocks"] for line in rig.log("coordinator") if line.get("event") == "task_given"}
    assert "|" in given["device-0"]  # its cap made it split
    argv = [program("fedepth-coordinator"), "record", "--state", str(rig.lab.coordinator_state), "--json"]
    told = json.loads(subprocess.run(argv, check=True, capture_output=True, timeout=300).stdout)
    stages = list(stages_in(told))
    assert len(stages) >= 9  # of three rounds, with one device that splits
    assert all(0 < stage["measured_peak_bytes"] <= stage["budget_bytes"] for stage in stages)
    model = onnx.load(exported["path"])
    assert exported["parity_max_abs"] <= 1e-4

    before, after = first_and_last_weights(rig.lab.coordinator_state)
    heads = {name for name in after if name.startswith("auxiliary.")}
    assert before.keys() == after.keys()
    assert not any("auxiliary" in each.name for each in model.graph.initializer)
    ends = {int(block.rpartition("-")[2]) for block in given["device-0"].split(" | ")} - {5}
    assert {int(name.split(".")[1]) for name in heads} == set(range(5))
    moved = {int(name.split(".")[1]) for name in heads if not np.array_equal(before[name], after[name])}
    assert moved == ends  # what nobody trained keeps its value
