"""Ctrl-C on the demo ends every process that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARK = "STARTED_BY_THIS_TEST"  # a variable that all processes below the demo inherit


def started(mark: str) -> list[str]:
    """The command lines of running processes with a mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return [line for line in found if line]  # not what has ended and is waited for


def all_run(running: list[str]) -> bool:
    """Whether the coordinator, all six agents and a trainer of one of them run."""
    counts = {
        name: sum(name in line for line in running) for name in ("coordinator serve", "daemon", "trainer.process")
    }
    return counts["coordinator serve"] == 1 and counts["daemon"] == 6 and counts["trainer.process"] > 0


def test_ctrl_c_leaves_no_process_behind(tmp_path: Path, calibration_told: Path) -> None:
    log, mark = tmp_path / "demo.log", str(tmp_path)
    with open(log, "wb") as output:
        demo = subprocess.Popen(
            [sys.executable, "-u", "-m", "benchmarks.demo", "--folder", str(tmp_path / "run")],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env={**os.environ, MARK: mark},
        )
    try:
        deadline = time.monotonic() + 400
        while not all_run(running := started(mark)):
            assert demo.poll() is None and time.monotonic() < deadline, (running, log.read_text()[-2000:])
            time.sleep(0.1)
    finally:
        demo.send_signal(signal.SIGINT)
        ended = demo.wait(90)
    assert ended == 130
    assert started(mark) == []
    assert "stopped; every process is ended" in log.read_text()
