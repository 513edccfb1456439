"""A federation of the real coordinator and real agents, whose trainers do next to nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab import lab, status_bytes
from benchmarks.transport.rounds import STUCK_S, largest, observe
from fedepth.child import module_argv
from fedepth.data.idx import write_idx
from fedepth.errors import ChildError

IMAGES = 40
SETTLE_S = 3.0  # after the last round
JOB = """\
[job]
name = "transport"
rounds = {rounds}
devices_per_round = {clients}
quorum = {clients}
gather_s = 30
seed = 1

[model]
name = "torchvision:resnet18"
classes = 10
input_shape = [3, 32, 32]
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]

[training]
batch = 8
schedule = "constant"
"""


def run(folder: Path, clients: int, rounds: int, skip: int) -> dict[str, Any]:
    """Rounds of `clients` agents; figures as of `Rounds.figures`, with what one agent and one client take."""
    folder.mkdir(parents=True)
    data = folder / "data"
    data.mkdir()
    random = np.random.default_rng(1)
    write_idx(data / "train-images-idx4-ubyte", random.integers(0, 256, (IMAGES, 3, 32, 32), np.uint8))
    write_idx(data / "train-labels-idx1-ubyte", (np.arange(IMAGES) % 10).astype(np.uint8))
    job = folder / "job.toml"
    job.write_text(
        JOB.format(rounds=rounds + 1, clients=clients)
    )  # the job ends with an export, which is no part of a round
    names = [f"device-{number}" for number in range(clients)]
    with lab(folder) as running:
        address = running.start_coordinator(job)
        idle_coordinator = status_bytes(running.processes["coordinator"].pid, "VmRSS")
        for name in names:
            state = running.certificates.enroll(name, folder / name)
            argv = [*module_argv("benchmarks.transport.agent"), address, str(data), str(state), name]
            running.start(name, argv)
        pids = {name: process.pid for name, process in running.processes.items()}
        with running.log("coordinator").open("rb") as log:
            ended = 0

            def finished() -> int:
                nonlocal ended
                for name, process in running.processes.items():
                    if process.poll() is not None:
                        raise ChildError(f"{name} ended with status {process.returncode}; see {running.log(name)}")
                while (line := log.readline()).endswith(b"\n"):
                    ended += _is_end(line)
                log.seek(-len(line), os.SEEK_CUR)
                return ended

            seen = observe(rounds, finished, pids)
            idle = _idle_bytes([pids[name] for name in names], finished, rounds + 1)
            peak = status_bytes(pids["coordinator"], "VmHWM")
            weights = next((folder / "coordinator" / "weights").glob("round-*.safetensors")).stat().st_size
            return {
                **seen.figures(skip),
                "model_bytes": weights,
                "server_idle_bytes": idle_coordinator,
                "server_peak_bytes": peak,
                "agent_idle_bytes": idle,
                "agent_peak_bytes": max(status_bytes(pids[name], "VmHWM") for name in names),
                "device_peak_bytes": largest(seen.peaks, names),
            }


def _idle_bytes(pids: Sequence[int], finished: Callable[[], int], rounds: int) -> int:
    """What the largest of the agents holds that have nothing to do any more."""
    deadline = time.monotonic() + STUCK_S
    while finished() < rounds:
        if time.monotonic() > deadline:
            raise ChildError(f"the last of {rounds} rounds does not end")
        time.sleep(0.1)
    time.sleep(SETTLE_S)
    return max(status_bytes(pid, "VmRSS") for pid in pids)


def _is_end(line: bytes) -> bool:
    try:
        return bool(json.loads(line).get("event") == "round_closed")
    except ValueError:
        return False
