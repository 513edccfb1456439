"""A trainer that trains nothing: its updates are the global weights and a little noise.

The agent starts it in place of its own (shim.c). It speaks the real protocol, and its updates are real and small. No
two of them are equal, not even of one task, so that none can pass for another. What it does is written down:

    FAULTS_TRAININGS  a line of JSON when a training begins and when it is done; also counts over restarts
    FAULTS_ARCHIVE    a copy of every part, by its sha256
    FAULTS_SCENE      a file that says how it misbehaves, as JSON: {"do": "nan_loss"}; read at every task
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_client.outbox import part_name
from edge_client.trainer.protocol import RESULT, TrainRequest
from fedepth.child import run_child
from fedepth.files import file_digest, write_atomically
from fedepth.models.traced import read_traced
from fedepth.task import PartInfo, StageResult
from fedepth.weights import Array, open_weights, save

START_BYTES = 10 << 20
NOISE = 1e-3
TRAINING_S = 0.3


def main() -> None:
    """Trains what is asked for until standard input closes."""
    trainings = Path(os.environ["FAULTS_TRAININGS"])
    _tell(event="ready", start_bytes=START_BYTES, allocator="fake 1")
    for line in sys.stdin:
        message = json.loads(line)
        message.pop("do")
        request = msgspec.convert(message, TrainRequest)
        number = len(trainings.read_text().splitlines()) if trainings.exists() else 0
        task = request.task
        scene = _scene()
        said = {"task": task.task_id, "attempt": task.attempt, "device": request.device_id, "number": number}
        _write_down(trainings, {**said, "event": "begun", "scene": scene})
        try:
            parts = _train(request, scene, number)
        except OSError as error:  # a disk that is full
            _tell(event="failed", outcome="error", message=f"{error.filename}: {error.strerror}", disk=True)
            continue
        if parts is not None:
            _write_down(trainings, {**said, "event": "done", "digests": [part.digest for part in parts]})
            result = _result(request, parts, scene)
            with contextlib.suppress(OSError):
                write_atomically(Path(request.output) / RESULT, msgspec.json.encode(result))
            _tell(event="done", result=result)
            if scene == "die_after":
                os.kill(os.getpid(), signal.SIGKILL)


def changed(tensors: dict[str, Array], scene: str, seed: int) -> dict[str, Array]:
    """What a scene makes of the global weights; by default they move by a little noise."""
    random = np.random.default_rng(seed)
    fill = {"nan_update": np.nan, "huge": 3e38, "zero": 0.0}.get(scene)
    found = {}
    for name, tensor in tensors.items():
        if not np.issubdtype(tensor.dtype, np.floating):
            found[name] = tensor
        elif fill is not None:
            found[name] = np.full_like(tensor, fill)
            if scene == "zero":
                found[name].flat[0] = random.normal(0, NOISE)  # so that no two updates are equal
            elif scene == "huge":
                found[name].flat[0] *= random.uniform(0.5, 1)
        else:
            found[name] = tensor + random.normal(0, NOISE, tensor.shape).astype(tensor.dtype)
    return found


def _train(request: TrainRequest, scene: str, number: int) -> tuple[PartInfo, ...] | None:
    plan = request.plan
    for index, stage in enumerate(plan.stages):
        _tell(
            event="stage_started",
            stage=index,
            stage_count=len(plan.stages),
            first=stage.first,
            last=stage.last,
            predicted_peak_bytes=stage.predicted_peak_bytes,
        )
    if scene == "die_before":
        os.kill(os.getpid(), signal.SIGKILL)
    if scene == "hang":
        time.sleep(3600)
    if scene == "babble":
        print("not JSON", flush=True)
        return None
    time.sleep(TRAINING_S)
    layout = read_traced(Path(request.graph)).in_training(request.task.training).graph.layout()
    names = [tensor.name for tensor in layout.trained_tensors(plan)]
    with open_weights(Path(request.weights)) as reader:
        tensors = {name: reader.read(name) for name in names}
    path = Path(request.output) / part_name(0)
    seed = int.from_bytes(f"{request.device_id}/{request.task.task_id}/{number}".encode()[-32:], "little")
    digest = save(path, changed(tensors, scene, seed))
    assert digest == file_digest(path)
    shutil.copyfile(path, Path(os.environ["FAULTS_ARCHIVE"]) / digest)
    if scene == "die_with_part":
        os.kill(os.getpid(), signal.SIGKILL)
    return (PartInfo(0, path.stat().st_size, digest),)


def _result(request: TrainRequest, parts: tuple[PartInfo, ...], scene: str) -> dict[str, Any]:
    loss = float("nan") if scene == "nan_loss" else 1.0
    stages = [
        StageResult(
            stage.first,
            stage.last,
            stage.micro_batch,
            stage.predicted_peak_bytes,
            stage.predicted_peak_bytes,
            stage.predicted_peak_bytes,
            stage.predicted_peak_bytes,
            request.budget.budget_bytes,
            2.0,
            loss,
            1,
            request.most_samples,
            0.01,
        )
        for stage in request.plan.stages
    ]
    return {
        "task_id": request.task.task_id,
        "attempt": request.task.attempt,
        "device_id": request.device_id,
        "round": request.task.round,
        "sample_count": request.most_samples,
        "plan": request.plan,
        "trained_units": request.plan.trained_units,
        "stages": stages,
        "parts": parts,
        "seconds": 0.01,
        "allocator": "fake 1",
        "baseline_bytes": START_BYTES,
        "weights_digest": request.task.weights_digest,
    }


def _scene() -> str:
    path = Path(os.environ.get("FAULTS_SCENE", ""))
    return str(json.loads(path.read_text())["do"]) if path.is_file() else ""


def _write_down(path: Path, entry: dict[str, Any]) -> None:
    line = json.dumps({**entry, "time": round(time.time(), 3)}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def _tell(**message: Any) -> None:
    sys.stdout.write(msgspec.json.encode(message).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    run_child(main)
