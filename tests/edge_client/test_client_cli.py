"""The program itself, as a process of its own."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import msgspec
import pytest
from fedepth_wire.tls import server_credentials
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationServicer, add_FederationServicer_to_server

from benchmarks.certificates import LabCertificates
from coordinator.security.certificates import Certificates
from edge_client.config import load
from edge_client.daemon import Start
from edge_client.identity import StateLock, remember
from edge_client.memory.budget import StartCost
from edge_client.trainer.client import torch_version

MIB = 1 << 20
CLIENT = [sys.executable, "-m", "edge_client.cli"]


def client(*argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLIENT, *map(str, argv)], capture_output=True, text=True, timeout=300, check=False)


class HoldingCoordinator(FederationServicer):
    """Holds every call for work, as a coordinator does that has none, until it is released."""

    def __init__(self) -> None:
        self.called, self.released = threading.Event(), threading.Event()

    def NextTask(self, request: pb.NextTaskRequest, context: grpc.ServicerContext) -> pb.NextTaskReply:  # type: ignore[override]
        self.called.set()
        self.released.wait(60)
        return pb.NextTaskReply(retry=pb.RetryLater(retry_after_ms=60_000))


@pytest.fixture
def holding(tmp_path: Path) -> Iterator[tuple[HoldingCoordinator, LabCertificates, int]]:
    """Over mutual TLS; with its port."""
    lab = LabCertificates(tmp_path / "certificates")
    lab.serve_options()
    server, servicer = grpc.server(ThreadPoolExecutor(2)), HoldingCoordinator()
    add_FederationServicer_to_server(servicer, server)
    credentials = server_credentials(Certificates(lab.folder).coordinator(), lambda: None)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield servicer, lab, port
    servicer.released.set()
    server.stop(0).wait()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_idle_agent_is_small_and_holds_no_torch(
    tmp_path: Path, data: Path, holding: tuple[HoldingCoordinator, LabCertificates, int]
) -> None:
    servicer, lab, port = holding
    state = lab.enroll("kitchen", tmp_path / "state")
    remember(state / "start.json", StartCost(torch_version(), 200 * MIB))
    argv = [*CLIENT, "run", "--coordinator", f"127.0.0.1:{port}", "--data", str(data), "--state", str(state)]
    with subprocess.Popen([*argv, "--json-logs"], stderr=subprocess.PIPE, text=True) as agent:
        assert agent.stderr is not None
        try:
            assert servicer.called.wait(300)  # by then it has scanned, measured and reported
            for line in agent.stderr:
                if "agent ready" in line:
                    break
            said = json.loads(line)
            status = Path(f"/proc/{agent.pid}/status").read_text()
            resident = next(int(row.split()[1]) << 10 for row in status.splitlines() if row.startswith("VmRSS"))
            maps = Path(f"/proc/{agent.pid}/maps").read_text()
            os.kill(agent.pid, signal.SIGTERM)
            rest = agent.stderr.read()
        except BaseException:
            agent.kill()  # or its end would be waited for
            raise
    assert said["coordinator"] == f"127.0.0.1:{port}"
    assert resident <= 55 * MIB
    for library in ("libtorch", "_multiarray_umath", "_imaging", "cryptography"):  # torch, numpy, PIL
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
    unknown = client("run", "--coordinator", "127.0.0.1:1", "--data", data, "--state", tmp_path / "state")
    assert taken.returncode == 1
    assert "in use by another agent" in taken.stderr
    assert unknown.returncode == 1
    assert "this device has no certificate" in unknown.stderr and "fedepth-coordinator enroll" in unknown.stderr


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
