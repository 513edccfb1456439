"""Real processes on port 0: a small federation on the digits."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.lab import Lab, LabDevice, lab
from fedepth.data.idx import write_idx
from fedepth.data.read import open_images
from fedepth.task import ModelSpec

SPEC = ModelSpec("digits-cnn", tuple("0123456789"), (1, 32, 32), (0.3,), (0.35,))
MIB = 1 << 20

JOB = """\
[job]
name = "test"
rounds = {rounds}
devices_per_round = {devices}
quorum = {quorum}
round_deadline_s = {deadline}
gather_s = 0.2
lease_s = 20
seed = 3
policy = "paper"

[model]
name = "{model}"
classes = 10
input_shape = [1, 32, 32]
mean = [0.3]
std = [0.35]

[training]
batch = 32
local_epochs = {epochs}
learning_rate = 0.05

[test]
data = "digits"
"""


@dataclass
class Rig:
    """A lab with a job file and one shard of 96 images per device."""

    lab: Lab
    folder: Path

    def job(self, name: str = "job.toml", **changes: Any) -> Path:
        fields = {"rounds": 1, "devices": 2, "quorum": 2, "deadline": 60, "epochs": 1, "model": "digits-cnn"}
        path = self.folder / name
        path.write_text(JOB.format(**{**fields, **changes}))
        return path

    def shard(self, number: int, count: int = 96) -> Path:
        digits = open_images("digits", SPEC, "train")
        chosen = np.arange(number * count, (number + 1) * count) % len(digits)
        data = self.folder / f"data-{number}"
        data.mkdir(exist_ok=True)
        write_idx(data / "train-images-idx3-ubyte", np.ascontiguousarray(digits.read(chosen)[:, 0]))
        write_idx(data / "train-labels-idx1-ubyte", digits.labels[chosen].astype("uint8"))
        return data

    def agent(self, number: int, *options: str, cap: int = 0) -> LabDevice:
        device = LabDevice(f"device-{number}", self.shard(number), cap)
        self.lab.start_agent(device, "--threads", "1", *options)
        return device

    def log(self, name: str) -> list[dict[str, Any]]:
        """The structured log of a process so far."""
        path = self.lab.log(name)
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.startswith("{")]

    def wait(self, name: str, found: Callable[[dict[str, Any]], bool], timeout_s: float = 300) -> dict[str, Any]:
        """The first log line of process `name` for which `found` holds; fails after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for line in self.log(name):
                if found(line):
                    return line
            time.sleep(0.05)
        raise AssertionError(f"{name} never said it:\n{self.lab.log(name).read_text()[-3000:]}")

    def event(self, name: str, event: str, timeout_s: float = 300, **fields: Any) -> dict[str, Any]:
        """The first log line of an event with these fields."""
        return self.wait(
            name,
            lambda line: line.get("event") == event and all(line.get(k) == v for k, v in fields.items()),
            timeout_s,
        )

    def end(self, name: str, timeout_s: float = 300) -> int:
        """Waits for a process to end by itself; its exit status."""
        return self.lab.processes[name].wait(timeout_s)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with lab(tmp_path) as running:
        yield Rig(running, tmp_path)
