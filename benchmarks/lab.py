"""A federation on one machine: one coordinator and several agents, as real processes over loopback.

Every process is started here and ended here, by its pid, also on Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.certificates import LabCertificates
from fedepth.errors import ChildError
from fedepth.sizes import format_size

START_TIMEOUT_S = 300.0  # importing torch from a cold, slow disk takes a minute
END_GRACE_S = 30.0


@dataclass(frozen=True)
class LabDevice:
    """One agent to start.

    Attributes:
        cap_bytes: what training may add on it; 0 for no cap.
    """

    name: str
    data: Path
    cap_bytes: int


@dataclass
class Lab:
    """The running processes. `folder` holds every state directory and log."""

    folder: Path
    address: str = ""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def coordinator_state(self) -> Path:
        return self.folder / "coordinator"

    @property
    def certificates(self) -> LabCertificates:
        """Of this lab alone."""
        return LabCertificates(self.folder / "certificates")

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def start(self, name: str, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        """Starts one program with its output in a log file, in a session of its own."""
        path = self.log(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as log:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self.processes[name] = process
        return process

    def start_coordinator(self, job: Path, *options: str) -> str:
        """Starts the coordinator on a free port and waits until it listens; returns its address."""
        port_file = self.folder / "port"
        port_file.unlink(missing_ok=True)
        process = self.start(
            "coordinator",
            [
                program("fedepth-coordinator"),
                "serve",
                "--config",
                str(job),
                "--state",
                str(self.coordinator_state),
                "--port",
                "0",
                "--port-file",
                str(port_file),
                *(() if "--insecure" in options else self.certificates.serve_options()),
                "--json-logs",
                *options,
            ],
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (port_file.exists() and port_file.read_text().strip()):
            if process.poll() is not None:
                raise ChildError(
                    f"the coordinator ended with status {process.returncode} before it listened:\n"
                    + self.log("coordinator").read_text()[-2000:],
                    returncode=process.returncode,
                )
            if time.monotonic() > deadline:
                raise ChildError(f"the coordinator did not listen within {START_TIMEOUT_S:.0f} s")
            time.sleep(0.05)
        self.address = f"127.0.0.1:{port_file.read_text().strip()}"
        return self.address

    def start_agent(self, device: LabDevice, *options: str) -> subprocess.Popen[bytes]:
        cap = ["--budget-cap", str(device.cap_bytes)] if device.cap_bytes else []
        return self.start(
            device.name,
            [
                program("fedepth-client"),
                "run",
                "--coordinator",
                self.address,
                "--data",
                str(device.data),
                "--state",
                str(self.certificates.enroll(device.name, self.folder / device.name)),
                "--name",
                device.name,
                "--json-logs",
                *cap,
                *options,
            ],
        )

    def stop(self) -> None:
        """Asks every process to end, then makes it."""
        running = [process for process in self.processes.values() if process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + END_GRACE_S
        for process in running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def lab(folder: Path) -> Iterator[Lab]:
    """A lab whose processes are gone afterwards, whatever happened. SIGTERM counts as Ctrl-C."""

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not break into the clean-up
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, interrupt)
    running = Lab(folder)
    try:
        yield running
    finally:
        running.stop()
        signal.signal(signal.SIGTERM, before)


def program(name: str) -> str:
    """Path of an installed program."""
    return str(Path(sysconfig.get_path("scripts")) / name)


def status_bytes(pid: int, field: str) -> int:
    """A field of a process's status, such as "VmRSS", in bytes; 0 for one that has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def describe_cap(cap_bytes: int) -> str:
    return format_size(cap_bytes) if cap_bytes else "no cap"
