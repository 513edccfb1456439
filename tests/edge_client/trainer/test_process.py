"""What a trainer's start has loaded does not come on top of the first stage that uses it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_client.outbox import trained_result
from edge_client.trainer import process
from fedepth.errors import DiskError
from fedepth.plan import Plan, Policy
from fedepth.task import Result

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


@pytest.mark.parametrize(
    ("code", "kind"),
    [(errno.ENOSPC, DiskError), (errno.EDQUOT, DiskError), (errno.ENOENT, OSError)],
    ids=["ENOSPC", "EDQUOT", "ENOENT"],
)
def test_a_full_disk_is_told_from_a_mistake(tmp_path: Path, code: int, kind: type[Exception]) -> None:
    with pytest.raises(kind), process.full_disks(tmp_path):
        raise OSError(code, os.strerror(code))


def test_a_result_that_cannot_be_left_is_told_all_the_same(tmp_path: Path) -> None:
    result = Result("t", 1, "a", 1, 6, Plan((), (), Policy.AUTO, 0), (), (), (), 0.5, "none", 0)
    process.keep(result, tmp_path / "missing")
    process.keep(result, tmp_path)
    assert trained_result(tmp_path) == result
