"""Real processes on port 0: a small federation on the digits."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from benchmarks.lab import Lab, LabDevice, lab
from coordinator.global_model import prepare
from coordinator.model_worker.client import ModelWorker
from coordinator.store.records import Store
from fedepth.data.idx import write_idx
from fedepth.data.read import open_images
from fedepth.job import load_config, model_spec
from fedepth.job_changes import settings_of
from fedepth.task import ModelSpec
from tests.once import made_once

SPEC = ModelSpec("digits-cnn", tuple("0123456789"), (1, 32, 32), (0.3,), (0.35,))
MIB = 1 << 20
TEST_IMAGES = 64

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
"""
TEST = """
[test]
data = "test-data"
"""


class KeptModels:
    """The model worker, whose answer for a model is kept for all tests of a run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def request(self, do: str, *, graph: str, output: str, **fields: Any) -> dict[str, Any]:
        assert do == "prepare"
        asked = msgspec.json.encode({key: value for key, value in fields.items() if key != "folder"})
        kept = self._folder / hashlib.sha256(asked).hexdigest()
        with made_once(kept) as making:
            if making:
                making.mkdir(exist_ok=True)
                worker = ModelWorker()
                try:
                    answer = await worker.request(
                        do, graph=str(making / "graph"), output=str(making / "weights"), **fields
                    )
                finally:
                    await worker.stop()
                (making / "answer").write_bytes(msgspec.json.encode(answer))
        shutil.copy(kept / "graph", graph)
        shutil.copy(kept / "weights", output)
        found: dict[str, Any] = msgspec.json.decode((kept / "answer").read_bytes())
        return found

    async def stop(self) -> None: ...


@dataclass
class Rig:
    """A lab with a job file and a shard of images for each device.

    Attributes:
        models: where models that are prepared are kept.
        calibrate: measures this machine, unless that was done.
    """

    lab: Lab
    folder: Path
    models: Path
    calibrate: Callable[[], object]

    def job(self, name: str = "job.toml", *, test: bool = False, **changes: Any) -> Path:
        """Writes a job file. With `test`, rounds are evaluated, for which the coordinator loads torch."""
        fields = {"rounds": 1, "devices": 2, "quorum": 2, "deadline": 60, "epochs": 1, "model": "digits-cnn"}
        path = self.folder / name
        path.write_text(JOB.format(**{**fields, **changes}) + (TEST if test else ""))
        if test:
            self._write("test-data", "t10k", "test", np.arange(TEST_IMAGES))
        return path

    def start_coordinator(self, job: Path, *options: str) -> str:
        """Starts the coordinator of a job whose model is prepared, as after a stop before the first round."""
        config = load_config(job)
        state, spec = self.lab.coordinator_state, model_spec(config)
        store = Store.open(state, config.job.name, spec, settings=settings_of(config))
        try:
            asyncio.run(prepare(config, store, KeptModels(self.models)))
        finally:
            store.close()
        return self.lab.start_coordinator(job, *options)

    def shard(self, number: int, count: int = 96) -> Path:
        """Some of the digits, over and over if there are more of them than the digits."""
        return self._write(f"data-{number}", "train", "train", np.arange(number * count, (number + 1) * count))

    def _write(self, name: str, prefix: str, split: str, wanted: Any) -> Path:
        digits = open_images("digits", SPEC, split)
        chosen = wanted % len(digits)
        data = self.folder / name
        data.mkdir(exist_ok=True)
        write_idx(data / f"{prefix}-images-idx3-ubyte", np.ascontiguousarray(digits.read(chosen)[:, 0]))
        write_idx(data / f"{prefix}-labels-idx1-ubyte", digits.labels[chosen].astype("uint8"))
        return data

    def agent(self, number: int, *options: str, cap: int = 0, images: int = 96) -> LabDevice:
        self.calibrate()
        device = LabDevice(f"device-{number}", self.shard(number, images), cap)
        self.lab.start_agent(device, *options)
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
def rig(tmp_path: Path, shared: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    with lab(tmp_path) as running:
        yield Rig(running, tmp_path, shared / "models", lambda: request.getfixturevalue("calibration_told"))
