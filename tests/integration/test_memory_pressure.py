"""A second process takes the memory that training was promised, in the middle of a stage."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from edge_client.memory.probe import measure

MIB = 1 << 20
TRAINING_BYTES = 800 * MIB  # left for training by the operator's reserve
# Ready before the stage begins, which would be over on a busy machine by the time that Python has started.
HOG = (
    "import sys; print('ready', flush=True); sys.stdin.readline(); held = b'x' * int(sys.argv[1]); "
    "print('held', flush=True); sys.stdin.read()"
)


def test_a_stage_pauses_while_others_hold_the_memory_and_goes_on_afterwards(rig: Any) -> None:
    rig.start_coordinator(rig.job(devices=1, quorum=1, deadline=600), "--exit-when-done")
    # A trainer costs 500 to 600 MiB before it trains; the fraction of the available memory is 0.9 by default.
    reserve = int(measure().available_bytes * 0.9) - 600 * MIB - TRAINING_BYTES
    config = rig.folder / "client.toml"
    config.write_text(f'[memory]\nreserve = "{reserve}"\n')
    hog = subprocess.Popen(
        [sys.executable, "-c", HOG, str(2 * TRAINING_BYTES)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with hog:
        assert hog.stdin is not None and hog.stdout is not None and hog.stdout.readline() == b"ready\n"
        rig.agent(0, "--config", str(config), "--exit-when-done", images=120 * 96)
        rig.event("device-0", "stage started")
        hog.stdin.write(b"\n")
        hog.stdin.flush()
        assert hog.stdout.readline() == b"held\n"
        rig.event("device-0", "paused: others on this device hold the memory")
        assert not [line for line in rig.log("device-0") if line.get("event") == "stage done"]
        hog.communicate()  # its standard input closes, and it ends
    rig.event("device-0", "stage done")
    rig.event("device-0", "update accepted")
    assert rig.end("device-0") == 0
    # The pause has cost time and nothing else: the stage went on where it was.
    said = [line.get("event") for line in rig.log("device-0")]
    assert said.count("stage started") == said.count("stage done") == 1
    assert "a stage went over its budget" not in said
