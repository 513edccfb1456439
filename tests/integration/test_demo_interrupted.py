"""Ctrl-C on the demo ends every process that it started."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def processes_naming(text: str) -> list[int]:
    """Running processes with `text` in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if text in line:
            found.append(int(folder.name))
    return found


def test_ctrl_c_leaves_no_process_behind(tmp_path: Path, calibration_told: Path) -> None:
    log = tmp_path / "demo.log"
    with open(log, "wb") as output:
        demo = subprocess.Popen(
            [sys.executable, "-u", "-m", "benchmarks.demo", "--folder", str(tmp_path / "run")],
            cwd=ROOT,
            stdout=output,
            stderr=output,
        )
    deadline = time.monotonic() + 400
    while "trains units" not in log.read_text():
        assert demo.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.1)
    assert len(processes_naming(str(tmp_path))) >= 8  # the demo, its coordinator and six agents
    demo.send_signal(signal.SIGINT)
    assert demo.wait(90) == 130
    assert processes_naming(str(tmp_path)) == []
    assert "stopped; every process is ended" in log.read_text()
