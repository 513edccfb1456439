"""What all federations of a run share: the shim, the devices' data, and a state directory with the model prepared."""

from __future__ import annotations

import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.certificates import LabCertificates
from benchmarks.faults.injection import compile_shim
from benchmarks.lab import program
from coordinator.cli import read_record
from edge_client.config import TrainerConfig
from edge_client.identity import remember
from edge_client.measure import calibration
from fedepth.costs import Calibration
from fedepth.data.idx import write_idx
from fedepth.data.read import open_images
from fedepth.errors import ChildError
from fedepth.task import ModelSpec

SPEC = ModelSpec("digits-cnn", tuple("0123456789"), (1, 32, 32), (0.3,), (0.35,))
TRAINER = TrainerConfig(threads=1, allocator="glibc")
SHARDS = 4
SHARD_IMAGES = 64
TEST_IMAGES = 60
PREPARE_S = 180.0
JOB = """\
[job]
name = "faults"
rounds = {rounds}
devices_per_round = 3
quorum = {quorum}
round_deadline_s = {deadline}
gather_s = 0.2
lease_s = 4
seed = 3
policy = "paper"

[model]
name = "digits-cnn"
classes = 10
input_shape = [1, 32, 32]
mean = [0.3]
std = [0.35]

[training]
batch = 32
local_epochs = {epochs}
learning_rate = {rate}
schedule = "constant"

[test]
data = "{test}"

[export]
every = {export}
{extra}
"""


@dataclass(frozen=True)
class Workplace:
    """Made once for a run.

    Attributes:
        template: a state directory whose model is prepared, and in which nothing has been trained.
    """

    folder: Path
    shim: Path
    shards: tuple[Path, ...]
    test_data: Path
    template: Path


def make_workplace(folder: Path) -> Workplace:
    """Compiles the shim, writes the data, and lets a coordinator prepare the model.

    Raises:
        FedepthError: there is no compiler, or the coordinator does not serve.
    """
    shim = compile_shim(folder)
    _write_calibration(folder / "cache" / "fedepth-client")
    shards = tuple(_write_shard(folder, number) for number in range(SHARDS))
    test_data = folder / "test"
    _write_images(test_data, "t10k", "test", np.arange(TEST_IMAGES))
    template = folder / "template"
    job = folder / "template.toml"
    job.write_text(JOB.format(rounds=1, quorum=2, deadline=8, rate=0.05, epochs=1, export=0, extra="", test=test_data))
    _prepare(job, template, folder)
    read_record(template)  # loads what threads will need, before there are any
    return Workplace(folder, shim, shards, test_data, template)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write_calibration(folder: Path) -> None:
    """The record that agents look for, with default figures: to measure takes a minute, and no fake trainer can be."""
    folder.mkdir(parents=True)
    found = calibration.Calibrated(calibration._fingerprint(TRAINER), Calibration(), (), 0, 0.0)
    remember(calibration.record_file(folder, TRAINER), found)


def _prepare(job: Path, state: Path, folder: Path) -> None:
    port_file, log = folder / "template.port", folder / "template.log"
    argv = [program("fedepth-coordinator"), "serve", "--config", str(job), "--state", str(state), "--port", "0"]
    argv += LabCertificates(folder / "certificates").serve_options()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*argv, "--port-file", str(port_file)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        end = time.monotonic() + PREPARE_S
        while not port_file.exists():
            if process.poll() is not None or time.monotonic() > end:
                raise ChildError(f"the coordinator could not prepare its model:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
    finally:
        process.terminate()
        process.wait(60)


def _write_shard(folder: Path, number: int) -> Path:
    shard = folder / f"data-{number}"
    _write_images(shard, "train", "train", np.arange(number * SHARD_IMAGES, (number + 1) * SHARD_IMAGES))
    return shard


def _write_images(folder: Path, prefix: str, split: str, chosen: np.ndarray) -> None:
    folder.mkdir()
    digits = open_images("digits", SPEC, split)
    write_idx(folder / f"{prefix}-images-idx3-ubyte", np.ascontiguousarray(digits.read(chosen)[:, 0]))
    write_idx(folder / f"{prefix}-labels-idx1-ubyte", digits.labels[chosen].astype("uint8"))
