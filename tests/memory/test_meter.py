"""What a process really used: peaks are seen, and what an allocator merely keeps is not taken for use."""

import json
import os
import subprocess
import sys

import pytest

from fedepth.memory.environment import environment, find_tcmalloc

MIB = 1 << 20

SCENE = """
import json, torch
from fedepth.memory import allocator
from fedepth.memory.meter import DataLimit, Meter
torch.ones(1 << 18).sum()
torch.ones(30 << 18).sum()  # 30 MiB, free again before the baseline
meter = Meter()
meter.reset()
before = meter.held_bytes
kept = [torch.ones(1 << 18) for _ in range(10)]
torch.ones(20 << 18).sum()
meter.sample()
first = meter.peak_bytes
held = meter.held_bytes
meter.reset()
second = meter.peak_bytes
failed = False
try:
    with DataLimit(meter.baseline.data_bytes, 40 << 20, 4 << 20):
        torch.ones(50 << 18)
except RuntimeError:
    failed = True
with DataLimit(meter.baseline.data_bytes, 40 << 20, 4 << 20):
    torch.ones(15 << 18)
print(json.dumps([allocator.name(), before, first, second, meter.anonymous_peak_bytes, failed]))
"""


@pytest.mark.parametrize("choice", ["glibc", "tcmalloc"])
def test_peaks_in_a_process_of_its_own(choice: str) -> None:
    if choice == "tcmalloc" and find_tcmalloc() is None:
        pytest.skip("tcmalloc is not installed: apt install libtcmalloc-minimal4")
    run = subprocess.run(
        [sys.executable, "-c", SCENE], env={**os.environ, **environment(choice)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    name, before, first, second, anonymous, failed = json.loads(run.stdout)
    assert choice in name
    assert before < MIB  # the 30 MiB are gone
    assert 29 * MIB <= first < 34 * MIB  # 10 kept and 20 for a moment
    assert 9 * MIB <= second < 14 * MIB  # the kept ones only
    assert 9 * MIB <= anonymous < 14 * MIB
    assert failed  # 10 kept and 50 more are beyond 40 + 4; 15 more are not
