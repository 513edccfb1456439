"""The same rounds by Flower (github.com/adap/flower): SuperLink, a SuperNode for every client, an app that averages.

It runs in a virtual environment of its own, which needs `flwr` and `numpy`. Its updates are as large and as trivial;
links are not encrypted, nothing is kept, and there is no evaluation: whatever it may leave out, it does.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lab import Lab, lab
from benchmarks.transport.rounds import largest, observe
from fedepth.errors import ChildError

START_S = 120.0
PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "transport"
version = "1.0.0"
license = "Apache-2.0"
dependencies = ["flwr", "numpy"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "benchmark"

[tool.flwr.app.components]
serverapp = "app:server"
clientapp = "app:client"

[tool.flwr.app.config]
rounds = {rounds}
clients = {clients}
layers = 62
values = {values}
ends = "{ends}"
"""
APP = '''\
"""FedAvg over a model of some arrays; the client makes every number a little larger."""

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    arrays = message.content["arrays"].to_numpy_ndarrays()
    grown = [array * np.float32(1.0001) for array in arrays]
    content = RecordDict({"arrays": ArrayRecord(grown), "metrics": MetricRecord({"num-examples": 40})})
    return Message(content=content, reply_to=message)


class Observed(FedAvg):
    def aggregate_train(self, server_round, replies):
        found = super().aggregate_train(server_round, replies)
        with open(self.ends, "a") as file:
            file.write(f"{server_round}\\n")
        return found


@server.main()
def main(grid, context):
    config = context.run_config
    count, each = int(config["layers"]), int(config["values"]) // int(config["layers"])
    arrays = ArrayRecord([np.full(each, 0.01, np.float32) for _ in range(count)])
    clients = int(config["clients"])
    strategy = Observed(
        fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_evaluate_nodes=0,
        min_available_nodes=clients,
    )
    strategy.ends = config["ends"]
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=int(config["rounds"]))
'''


def run(folder: Path, clients: int, rounds: int, skip: int, *, programs: Path, model_bytes: int) -> dict[str, Any]:
    """Rounds of `clients` SuperNodes.

    Args:
        programs: the folder of Flower's programs, as VENV/bin.
        model_bytes: of one model, as float32.

    Raises:
        ChildError: a program ended, or no round.
    """
    folder.mkdir(parents=True)
    app, ends, home = folder / "app", folder / "ends", folder / "home"
    app.mkdir()
    home.mkdir()
    ends.touch()
    (app / "pyproject.toml").write_text(
        PROJECT.format(rounds=rounds + 1, clients=clients, values=model_bytes // 4, ends=ends)
    )
    (app / "app.py").write_text(APP)
    port = _free_port()  # for its fleet and for whoever submits
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = {**os.environ, "FLWR_HOME": str(home), "PATH": f"{programs}:{os.environ['PATH']}", "NO_COLOR": "1"}
    environment |= {"FLWR_TELEMETRY_ENABLED": "0"}
    with lab(folder) as running:
        _start(
            running, environment, "server",
            [
                str(programs / "flower-superlink"), "--insecure", "--disable-runtime-dependency-installation",
                "--host", "127.0.0.1", "--port", str(port),
            ],
        )  # fmt: skip
        _wait_for(running, "server", port)
        names = [f"client-{number}" for number in range(clients)]
        for name in names:
            node = [
                str(programs / "flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{port}", "--host",
                "127.0.0.1", "--port", str(_free_port()),
            ]  # fmt: skip
            _start(running, environment, name, node)
        with running.log("submit").open("ab") as log:
            argv = [str(programs / "flwr"), "run", str(app), "here"]
            subprocess.run(argv, env=environment, stdout=log, stderr=log, timeout=START_S, check=True)

        def finished() -> int:
            for name, process in running.processes.items():
                if process.poll() is not None:
                    raise ChildError(f"{name} ended with status {process.returncode}; see {running.log(name)}")
            return len(ends.read_text().splitlines())

        seen = observe(rounds, finished, {name: process.pid for name, process in running.processes.items()})
        return {
            **seen.figures(skip),
            "server_peak_bytes": largest(seen.peaks, ["server"]),
            "device_peak_bytes": largest(seen.peaks, names),
        }


def version(programs: Path) -> str:
    """Of Flower, as it says itself."""
    found = subprocess.run([str(programs / "flwr"), "--version"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def _start(running: Lab, environment: Mapping[str, str], name: str, argv: Sequence[str]) -> None:
    path = running.log(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as log:
        running.processes[name] = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=dict(environment)
        )


def _wait_for(running: Lab, name: str, port: int) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if running.processes[name].poll() is not None:
            break
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise ChildError(f"{name} does not listen on port {port}; see {running.log(name)}")


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def installed(venv: Path) -> Path:
    """The programs of Flower in a virtual environment, which is made if it is not there.

    Raises:
        ChildError: it cannot be installed.
    """
    programs = venv / "bin"
    if not (programs / "flower-superlink").exists():
        try:
            subprocess.run(["python3", "-m", "venv", str(venv)], check=True)
            subprocess.run([str(programs / "pip"), "install", "--quiet", "flwr", "numpy"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ChildError(f"Flower cannot be installed in {venv}: {error}") from None
    return programs
