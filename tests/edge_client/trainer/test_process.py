"""What a trainer's start has loaded does not come on top of the first stage that uses it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

MIB = 1 << 20
# A wide layer, as in the middle of any network, beside the narrow ones that the start might have left it at.
PROGRAM = """
import json, sys
import torch
from edge_client.trainer import process
from fedepth.memory.meter import status_bytes

if sys.argv[1] == "started":
    process.start(torch.device("cpu"))
else:
    torch.autograd.backward(torch.nn.Conv2d(16, 16, 3)(torch.rand(32, 16, 40, 40)).sum())
before = status_bytes("RssFile")
images = torch.rand(8, 64, 10, 10, requires_grad=True).contiguous(memory_format=torch.channels_last)
torch.autograd.backward(torch.nn.Conv2d(64, 64, 3, padding=1)(images).sum())
print(json.dumps(status_bytes("RssFile") - before))
"""


def loaded_by_a_wide_layer(start: str) -> int:
    told = subprocess.run([sys.executable, "-c", PROGRAM, start], stdout=subprocess.PIPE, check=True)
    return int(json.loads(told.stdout))


def test_kernels_of_wide_layers_are_there() -> None:
    after_a_narrow_one = loaded_by_a_wide_layer("narrow")
    if after_a_narrow_one < MIB:
        pytest.skip("this processor has the same kernels for wide layers and for narrow ones")
    assert loaded_by_a_wide_layer("started") < after_a_narrow_one // 2
