"""A trainer whose training costs next to nothing: its update is the global weights, each a little larger.

It speaks the protocol of the agent's real trainer, whose place benchmarks.transport.agent gives it. It reads the
weights and writes a durable part as that does, so that a round shows what all but training costs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_client.outbox import part_name
from edge_client.trainer.protocol import TrainRequest
from fedepth.child import run_child
from fedepth.files import make_durable
from fedepth.layout import ModelLayout
from fedepth.models.traced import read_traced
from fedepth.task import PartInfo, Result, StageResult
from fedepth.weights import open_weights, save

GROWTH = np.float32(1.0001)
START_BYTES = 10 << 20


def main() -> None:
    """Trains what is asked for until standard input closes."""
    _tell(event="ready", start_bytes=START_BYTES, allocator="none")
    layouts: dict[str, ModelLayout] = {}
    for line in sys.stdin:
        message = msgspec.json.decode(line)
        message.pop("do")
        request = msgspec.convert(message, TrainRequest)
        if request.graph not in layouts:
            layouts[request.graph] = read_traced(Path(request.graph)).graph.layout()
        _tell(event="done", result=_trained(request, layouts[request.graph]))


def _trained(request: TrainRequest, layout: ModelLayout) -> Result:
    names = [tensor.name for tensor in layout.trained_tensors(request.plan)]
    with open_weights(Path(request.weights)) as reader:
        tensors: dict[str, Any] = {name: reader.read(name) for name in names}
    for tensor in tensors.values():
        if tensor.dtype == np.float32:
            np.multiply(tensor, GROWTH, out=tensor)
    path = Path(request.output) / part_name(0)
    digest = save(path, tensors)
    make_durable(path)
    task, plan = request.task, request.plan
    stages = tuple(
        StageResult(
            stage.first, stage.last, stage.micro_batch, stage.predicted_peak_bytes, stage.predicted_peak_bytes,
            stage.predicted_peak_bytes, stage.predicted_peak_bytes, request.budget.budget_bytes, 2.0, 1.0, 1,
            request.most_samples, 0.01,
        )
        for stage in plan.stages
    )  # fmt: skip
    return Result(
        task.task_id, task.attempt, request.device_id, task.round, request.most_samples, plan, plan.trained_units,
        stages, (PartInfo(0, path.stat().st_size, digest),), 0.01, "none", START_BYTES, task.weights_digest,
    )  # fmt: skip


def _tell(**message: Any) -> None:
    sys.stdout.write(msgspec.json.encode(message).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    run_child(main)
