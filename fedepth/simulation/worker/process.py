"""What runs in a worker: `python -m fedepth.simulation.worker.process`. See `protocol`."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from fedepth import evaluation
from fedepth.child import end_with_parent, run_child
from fedepth.data.read import DIGITS, Images, open_images
from fedepth.data.rows import Rows
from fedepth.errors import (
    DataError,
    DiskError,
    DivergedError,
    FedepthError,
    ModelError,
    OverBudgetError,
    PeerError,
    PlanError,
    ProtocolError,
)
from fedepth.files import disk_errors, write_atomically
from fedepth.models.load import load_model
from fedepth.models.traced import read_traced
from fedepth.preparation import Preparation
from fedepth.prepare import write_prepared
from fedepth.simulation.partitions import load_partition
from fedepth.simulation.worker.peak import measure_peak
from fedepth.simulation.worker.protocol import (
    NAMES,
    RESULT,
    Evaluate,
    MeasurePeak,
    Open,
    Request,
    Train,
)
from fedepth.task import Outcome
from fedepth.training.session import Assignment, Granted, Known, run
from fedepth.training.warmup import start

_OUTCOMES: dict[type[FedepthError], Outcome] = {
    PlanError: Outcome.DECLINED,
    OverBudgetError: Outcome.OVER_BUDGET,
    DataError: Outcome.DATA,
    ModelError: Outcome.MODEL,
    DivergedError: Outcome.DIVERGED,
}


@dataclass(frozen=True)
class View:
    """Some of the images of a data set, by their places in it. Nothing is copied."""

    images: Images
    places: npt.NDArray[np.int32]

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return self.images.labels[self.places]

    def __len__(self) -> int:
        return len(self.places)

    def read(self, indices: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        return self.images.read(self.places[indices])


class Worker:
    """Answers requests, one at a time; keeps data and model open between them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = Known()
        self._opened: Open | None = None
        self._images: Images | None = None
        self._tests: Images | None = None
        self._places: tuple[npt.NDArray[np.int32], ...] = ()
        self._actions: dict[str, tuple[type[Request], Callable[[Any], dict[str, Any]]]] = {
            NAMES[Preparation]: (Preparation, write_prepared),
            NAMES[MeasurePeak]: (MeasurePeak, measure_peak),
            NAMES[Open]: (Open, self._open),
            NAMES[Train]: (Train, self._train),
            NAMES[Evaluate]: (Evaluate, self._evaluate),
        }

    def answer(self, line: bytes) -> dict[str, Any]:
        """The answer to one request, with the processor time of it. Errors that are not FedepthError are raised."""
        began = time.process_time()
        try:
            try:
                message = msgspec.json.decode(line, type=dict[str, Any])
                kind, action = self._actions[message.pop("do")]
                request = msgspec.convert(message, kind)
            except (msgspec.MsgspecError, KeyError) as error:
                raise ProtocolError(f"a worker got a request that it cannot read: {error}") from error
            with disk_errors("a worker cannot go on", Path.cwd()):
                return {"ok": action(request), "cpu_seconds": time.process_time() - began}
        except FedepthError as error:
            kind_of_error = DataError if isinstance(error, DataError) else type(error)
            return {
                "error": {
                    "type": kind_of_error.__name__,
                    "message": str(error),
                    "outcome": _OUTCOMES.get(kind_of_error, Outcome.ERROR).value,
                    "disk": isinstance(error, DiskError),
                    "capped": getattr(error, "capped", False),
                    "miss_bytes": getattr(error, "miss_bytes", 0),
                    "peers": isinstance(error, PeerError),
                },
                "cpu_seconds": time.process_time() - began,
            }

    def _open(self, request: Open) -> dict[str, Any]:
        scratch = Path(request.scratch)
        scratch.mkdir(parents=True, exist_ok=True)
        graph = Path(request.graph)
        traced = self._known.traced[graph] = read_traced(graph)
        source = request.data if request.data == DIGITS else Path(request.data)
        self._images = open_images(source, request.model, "train", scratch, frozenset(request.damage), traced.tokenizer)
        partition = load_partition(Path(request.partition))
        self._places = tuple(np.array(share.samples, np.int32) for share in partition.clients)
        if request.test_data:
            self._tests = evaluation.open_test_images(request.test_data, request.model, traced.tokenizer)
            if isinstance(self._tests, Rows):
                evaluation.check_rows(self._tests, request.most_damaged)
        self._opened = request
        gc.collect()
        gc.freeze()  # what is open stays, and need not be looked through again and again
        return {"tests": len(self._tests) if self._tests is not None else 0}

    def _train(self, request: Train) -> dict[str, Any]:
        if self._opened is None or self._images is None:
            raise ProtocolError("a worker was asked to train before its data was opened")
        output, cache = Path(request.output), Path(request.cache)
        for folder in (output, cache):
            shutil.rmtree(folder, ignore_errors=True)
        assignment = Assignment(
            task=request.task,
            plan=request.plan,
            graph=Path(self._opened.graph),
            calibration=request.calibration,
            weights=Path(request.weights),
            data=Path(self._opened.data),
            output=output,
            cache=cache,
            device_id=request.device_id,
            enforce=request.enforce,
            release_freed=request.release_freed,
            images=View(self._images, self._places[request.client]),
            rehearse=request.enforce,
            peers=tuple(Path(path) if path else None for path in request.peers),
            peers_output=Path(request.peers_output) if request.peers_output else None,
            left_out=tuple(map(Path, request.left_out)),
            left_out_output=Path(request.left_out_output) if request.left_out_output else None,
        )
        try:
            result = run(assignment, Granted(request.budget_bytes), self._device, self._known)
            # Whatever ends now, whoever goes on finds what is trained.
            write_atomically(output / RESULT, msgspec.json.encode(result))
        finally:
            gc.collect()  # tensors in the reference cycles of a failed task must not count in the next one's baseline
            shutil.rmtree(cache, ignore_errors=True)
        return {"result": result}

    def _evaluate(self, request: Evaluate) -> dict[str, Any]:
        if self._opened is None or self._tests is None:
            raise ProtocolError("a worker was asked to evaluate without test data")
        model = load_model(self._known.traced[Path(self._opened.graph)].graph, Path(request.weights))
        rows = evaluation.batches(model, self._tests, self._opened.model, request.first, request.last)
        return {"figures": list(rows)}


def serve(requests: BinaryIO, answers: BinaryIO, device: torch.device) -> None:
    """Answers requests until there are no more."""
    worker = Worker(device)

    def write(message: dict[str, Any]) -> None:
        answers.write(msgspec.json.encode(message) + b"\n")
        answers.flush()

    write({"event": "ready"})
    for line in requests:
        write(worker.answer(line))


def main() -> None:
    end_with_parent()
    # The protocol keeps the real standard output; whatever a library prints goes to standard error.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        start(device)
        serve(sys.stdin.buffer, answers, device)


if __name__ == "__main__":
    run_child(main)
