"""The device's trainer, but with another allowance for freed memory: `python -m benchmarks.keeping SHARE BYTES`.

Run by benchmarks.trainer_settings, with a TrainRequest as JSON on standard input; writes {"seconds", "page_faults",
"peak_bytes"} to standard output. Both count from the rehearsal on, when the warm-up is over.
"""

from __future__ import annotations

import io
import resource
import sys
import time

import msgspec
import torch

from edge_client.trainer import process
from edge_client.trainer.protocol import TrainRequest
from fedepth.estimate import peak
from fedepth.training.session import Known, run
from fedepth.training.warmup import start


class Counting(process.Lines):
    """Grants the request's budget, and notes when the rehearsal begins."""

    def __init__(self, budget_bytes: int) -> None:
        super().__init__(sys.stdin, io.StringIO())
        self.budget_bytes = budget_bytes
        self.began, self.faults = 0.0, 0

    def measure(self, stage: int, held_bytes: int) -> int:
        return self.budget_bytes

    def rehearsing(self) -> None:
        self.began, self.faults = time.monotonic(), page_faults()


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def main() -> None:
    share, allowed_bytes = float(sys.argv[1]), int(sys.argv[2])
    peak.KEPT_SHARE, peak.KEPT_BYTES = share, allowed_bytes
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=TrainRequest)
    device = torch.device("cpu")
    start(device)
    lines = Counting(request.budget.budget_bytes)
    result = run(process.assignment(request), lines, device, Known())
    told = {
        "seconds": time.monotonic() - lines.began,
        "page_faults": page_faults() - lines.faults,
        "peak_bytes": max(stage.measured_peak_bytes for stage in result.stages),
    }
    print(msgspec.json.encode(told).decode(), flush=True)


if __name__ == "__main__":
    main()
