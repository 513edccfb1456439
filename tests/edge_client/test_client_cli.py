"""The program itself, as a process of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edge_client.config import load
from edge_client.daemon import Start
from edge_client.identity import StateLock, remember
from edge_client.memory.budget import StartCost
from edge_client.trainer.client import torch_version

MIB = 1 << 20
CLIENT = [sys.executable, "-m", "edge_client.cli"]


def client(*argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLIENT, *map(str, argv)], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_idle_agent_is_small_and_holds_no_torch(tmp_path: Path, data: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    remember(state / "start.json", StartCost(torch_version(), 200 * MIB))
    argv = [
        *CLIENT,
        "run",
        "--coordinator",
        "127.0.0.1:1",
        "--data",
        str(data),
        "--state",
        str(state),
        "--json-logs",
    ]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as agent:
        assert agent.stderr is not None
        for line in agent.stderr:  # by then it has scanned, measured, reported and called
            if "coordinator cannot be reached" in line:
                break
        said = json.loads(line)
        status = Path(f"/proc/{agent.pid}/status").read_text()
        resident = next(int(row.split()[1]) << 10 for row in status.splitlines() if row.startswith("VmRSS"))
        maps = Path(f"/proc/{agent.pid}/maps").read_text()
        os.kill(agent.pid, signal.SIGTERM)
        rest = agent.stderr.read()
    assert said["coordinator"] == "127.0.0.1:1"
    assert resident <= 60 * MIB
    for library in ("libtorch", "_multiarray_umath", "_imaging"):  # torch, numpy, PIL
        assert library not in maps
    assert agent.returncode == 0
    assert "stopped" in rest
    assert "Traceback" not in rest


def test_errors_are_one_line_and_status_1(tmp_path: Path, data: Path) -> None:
    missing = client("run", "--data", data)
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr.startswith("fedepth-client: coordinator is missing")
    assert missing.stderr.count("\n") == 1
    with StateLock(tmp_path / "state"):
        taken = client("run", "--coordinator", "127.0.0.1:1", "--data", data, "--state", tmp_path / "state")
    assert taken.returncode == 1
    assert "in use by another agent" in taken.stderr


def test_probe_tells_the_budget_once_the_start_is_known(tmp_path: Path) -> None:
    before = client("probe", "--json", "--state", tmp_path)
    assert json.loads(before.stdout)["budget"] is None
    assert "unknown until" in client("probe", "--state", tmp_path).stdout
    remember(tmp_path / "start.json", StartCost(torch_version(), MIB))
    after = json.loads(client("probe", "--json", "--state", tmp_path, "--budget-cap", "2MiB").stdout)
    assert after["budget"]["budget_bytes"] == 2 * MIB
    assert after["available_bytes"] == min(limit["available_bytes"] for limit in after["limits"])


def test_help_shows_an_example() -> None:
    assert "Example: fedepth-client run --coordinator" in client("run", "--help").stdout


def test_every_setting_reaches_the_agents_own_process() -> None:
    settings = {"coordinator": "h:1", "memory.cap": "11MiB", "trainer.enforce": False}
    start = Start(load(None, settings), exit_when_done=True, json_logs=True)
    assert msgspec.json.decode(msgspec.json.encode(start), type=Start) == start
    assert start.config.memory.cap_bytes == 11 * MIB
