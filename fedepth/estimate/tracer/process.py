"""The tracer: a child process that traces one model after the other, `python -m fedepth.estimate.tracer.process`.

It reads one request a line from its standard input and writes one answer a line to its standard output.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from fedepth.child import run_child
from fedepth.costs import ModelCosts
from fedepth.errors import FedepthError
from fedepth.estimate.tracer.protocol import TraceAnswer, TraceRequest

_SEED = 1


def _trace(request: TraceRequest) -> ModelCosts:
    from fedepth.models.traced import write_traced
    from fedepth.prepare import trace_model
    from fedepth.weights import save

    prepared = trace_model(request.model, request.training, seed=_SEED)
    write_traced(Path(request.graph), prepared.traced)
    save(Path(request.weights), {name: tensor.detach().numpy() for name, tensor in prepared.tensors.items()})
    return prepared.traced.in_training(request.training).costs


def main() -> None:
    # The protocol keeps the real standard output; whatever a library prints goes to standard error.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            try:
                answer = TraceAnswer(costs=_trace(msgspec.json.decode(line, type=TraceRequest)))
            except FedepthError as error:
                answer = TraceAnswer(error=str(error))
            answers.write(msgspec.json.encode(answer) + b"\n")
            answers.flush()


if __name__ == "__main__":
    run_child(main)
