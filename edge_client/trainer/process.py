"""The trainer: a child process of the agent that trains one task at a time, inside its budget.

It speaks JSON lines over its standard streams and ends when its standard input closes. Nothing that it does can take
the agent down; its memory goes back for certain when it ends.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import msgspec
import torch

from edge_client.trainer.protocol import RESULT, TrainRequest
from fedepth.budget import Budget
from fedepth.child import run_child
from fedepth.errors import (
    DamagedFileError,
    DataError,
    DiskError,
    DivergedError,
    FedepthError,
    ModelError,
    OverBudgetError,
    PeerError,
    PlanError,
)
from fedepth.files import write_atomically
from fedepth.memory import allocator
from fedepth.memory.meter import Baseline, status_bytes
from fedepth.plan import Stage
from fedepth.task import Outcome, PartInfo, Result, StageResult
from fedepth.training.limits import is_out_of_memory
from fedepth.training.session import Assignment, Known, run
from fedepth.training.warmup import start

_OUTCOMES: dict[type[FedepthError], Outcome] = {
    PlanError: Outcome.DECLINED,
    OverBudgetError: Outcome.OVER_BUDGET,
    DataError: Outcome.DATA,
    DamagedFileError: Outcome.DATA,
    ModelError: Outcome.MODEL,
    DivergedError: Outcome.DIVERGED,
}


class Lines:
    """The agent's end of the standard streams, as the trainer's hooks."""

    def __init__(self, source: TextIO, sink: TextIO) -> None:
        self._source = source
        self._sink = sink
        self.epochs = 0
        self.baseline = Baseline(0, 0, 0, 0)

    def begin(self, epochs: int, baseline: Baseline) -> None:
        self.epochs, self.baseline = epochs, baseline

    def rehearsing(self) -> None:
        self.send(event="rehearsing")

    def send(self, **message: Any) -> None:
        self._sink.write(msgspec.json.encode(message).decode() + "\n")
        self._sink.flush()

    def receive(self) -> Any:
        line = self._source.readline()
        if not line:
            sys.exit(0)  # the agent is gone
        return msgspec.json.decode(line)

    def measure(self, stage: int, held_bytes: int) -> int:
        self.send(
            event="measure",
            stage=stage,
            held_bytes=held_bytes,
            baseline_bytes=self.baseline.resident_bytes,
            baseline_anonymous_bytes=self.baseline.anonymous_bytes,
        )
        return msgspec.convert(self.receive()["budget"], Budget).budget_bytes

    def stage_started(self, index: int, count: int, stage: Stage) -> None:
        self.send(
            event="stage_started",
            stage=index,
            stage_count=count,
            first=stage.first,
            last=stage.last,
            predicted_peak_bytes=stage.predicted_peak_bytes,
        )

    def progress(self, index: int, count: int, stage: Stage, epoch: int, loss: float) -> None:
        self.send(
            event="progress",
            stage=index,
            stage_count=count,
            first=stage.first,
            last=stage.last,
            epoch=epoch,
            epochs=self.epochs,
            loss=loss,
        )

    def waiting(self, index: int, stage: Stage, budget_bytes: int) -> None:
        self.send(event="waiting", stage=index, budget_bytes=budget_bytes)

    def stage_done(self, result: StageResult, part: PartInfo) -> None:
        self.send(event="stage_done", result=result, part=part)


def main() -> None:
    # The protocol keeps the real standard output; whatever a library prints goes to standard error.
    # By its number: the allocator's limit is set for a numbered device only.
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    lines = Lines(sys.stdin, os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    start(device)
    gc.freeze()  # what was imported stays, and need not be looked through again and again
    lines.send(event="ready", start_bytes=status_bytes("VmRSS"), allocator=allocator.name())
    known = Known()
    while True:
        message = lines.receive()
        request = msgspec.convert({k: v for k, v in message.items() if k != "do"}, TrainRequest)
        try:
            work = assignment(request)
            with full_disks(work.cache):
                result = run(work, lines, device, known)
            keep(result, work.output)
        except FedepthError as error:
            lines.send(
                event="failed",
                outcome=_OUTCOMES.get(type(error), Outcome.ERROR),
                message=str(error),
                needed_bytes=getattr(error, "needed_bytes", 0),
                budget_bytes=getattr(error, "budget_bytes", request.budget.budget_bytes),
                stage=getattr(error, "stage", 0),
                miss_bytes=getattr(error, "miss_bytes", 0),
                capped=getattr(error, "capped", False),
                disk=isinstance(error, DiskError),
                disk_bytes=error.needed_bytes if isinstance(error, DiskError) else 0,
                damaged=isinstance(error, DamagedFileError),
                peers=isinstance(error, PeerError),
            )
        except Exception as error:
            # A mistake, or a file that cannot be written: it is reported, and the agent starts another trainer. Running
            # out of memory is neither: that is a death, and the agent plans smaller.
            if is_out_of_memory(error):
                raise MemoryError(str(error)) from error
            what = f"{type(error).__name__}: {error}"
            text = f"the trainer stopped on an unexpected error: {what}; the agent's log names a file with its trace"
            lines.send(event="failed", outcome=Outcome.ERROR, message=text)
            raise
        else:
            lines.send(event="done", result=result)
        gc.collect()  # tensors in the reference cycles of a failed task must not count in the next one's baseline


def assignment(request: TrainRequest) -> Assignment:
    """A request as a session takes it."""
    return Assignment(
        task=request.task,
        plan=request.plan,
        graph=Path(request.graph),
        calibration=request.calibration,
        weights=Path(request.weights),
        data=Path(request.data),
        output=Path(request.output),
        cache=Path(request.cache),
        device_id=request.device_id,
        enforce=request.enforce,
        most_samples=request.most_samples,
        release_freed=request.release_freed,
        damage=frozenset(request.damage),
        peers=tuple(Path(path) if path else None for path in request.peers),
        peers_output=Path(request.peers_output) if request.peers_output else None,
        left_out=tuple(map(Path, request.left_out)),
        left_out_output=Path(request.left_out_output) if request.left_out_output else None,
    )


@contextlib.contextmanager
def full_disks(folder: Path) -> Iterator[None]:
    """Turns what a library meets on a full disk, such as when it decompresses data, into a DiskError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskError(f"the task cannot be trained in {folder}: {error.strerror}; free some space there") from error


def keep(result: Result, output: Path) -> None:
    """Leaves the result beside its parts, which are durable: whatever ends now, the agent finds what is trained.

    Where the disk does not take it, the agent, which has some space in reserve, is told of it all the same.
    """
    with contextlib.suppress(OSError):
        write_atomically(output / RESULT, msgspec.json.encode(result))


if __name__ == "__main__":
    run_child(main)
